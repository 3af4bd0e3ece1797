"""What a run tells of itself: reports, the panel, previews, validations, watchmen. Rank 0 writes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from d2g.core.distributed import process_group
from d2g.core.distributed.checkpoint import complete_points
from d2g.core.distributed.sharded_checkpoint import Writer
from d2g.core.errors import Interrupted, UserError
from d2g.core.tracking.run_directory import Pace, RunLog
from d2g.diffusion import pretrained
from distill.config.run import DistillConfig
from distill.losses.regression.regression import Regression
from distill.models.row_dropout import switch
from distill.monitoring import collapse
from distill.monitoring.plots import plot_health
from distill.sampling import OneStep
from distill.training.preview import preview, preview_latents, preview_text
from distill.training.state import State
from distill.training.text_cache import TextCache
from distill.training.validation import Validate, averaged, best, draw_together, held_out, measure
from pairgen.store.dataset import PairRows


class Watching:
    """Reports and validations of one run. Every method is called on every rank."""

    def __init__(
        self,
        config: DistillConfig,
        log: RunLog,
        reader: PairRows,
        state: State,
        regression: Regression,
        encode: TextCache,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[None]],
        also: Validate | None,
    ) -> None:
        self.config, self.log, self.reader, self.state = config.train, log, reader, state
        self.regression, self.encode, self.device = regression, encode, device
        self.autocast, self.also = autocast, also
        self.folder, self.seed, self.told = log.folder / "checkpoints", config.seed, set[str]()
        self.guided = config.student.guidance_conditioning
        self.batch = max(
            1, self.config.batch_size // process_group.world_size() // config.engine.gradient_accumulation
        )
        self.vae: Any = None
        if self.config.preview_prompts:
            self.vae = pretrained.load_vae(config.teacher).to(device)

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Around training: whatever ends it, loggers are closed, the panel is drawn, and it is written down
        how it ended. A run that was at its end before is left alone.
        """
        if self.state.nimg >= self.config.images:
            yield
            return self.log.close()
        self.log.begin()
        try:
            yield
        except BaseException as error:
            self.log.close()
            with suppress(
                UserError
            ):  # what is on its way up says more than a disk that is full for this, too
                self.log.end("stopped" if isinstance(error, Interrupted) else "failed", str(error))
                if isinstance(error, Exception):  # else somebody is in a hurry
                    self.panel()
            raise
        self.log.close()
        self.panel()
        self.log.end("done" if self.state.nimg >= self.config.images else "minutes")

    def report(self, values: Mapping[str, Tensor | float], pace: Pace, writer: Writer) -> None:
        """One line of stats.jsonl, and a preview; then the watchmen, who may stop the run."""
        nimg = self.state.nimg
        means = process_group.mean({name: float(value) for name, value in values.items()})
        means["ema/drift"] = self.state.ema.drift(self.state.student.module)
        self.log.write(nimg, {**means, **pace.report(nimg)})
        self._preview(nimg)
        found: list[collapse.Finding] = []
        if process_group.rank() == 0:
            found = collapse.findings(self.log.read())
        told = self.told if process_group.rank() == 0 else set()
        for part in process_group.gather_objects(found)[:1]:  # what rank 0 saw stops all
            quiet = None if process_group.rank() == 0 else _say_nothing
            try:
                collapse.act(part, self.config.on_collapse, told, quiet)
            except collapse.Collapse:
                writer.finish()  # what is being written is kept
                raise

    def _preview(self, nimg: int) -> None:
        if self.vae is None:
            return
        rows = range(len(self.reader))[-self.config.validate_pairs :][: self.config.preview_prompts]
        pairs = self.reader.read(list(rows))
        with self._averaged():
            drawn, stored = preview_latents(self._draw, pairs, self.device, self.batch)
        if process_group.rank() == 0:
            picture = preview(drawn, stored, self.vae)
            self.log.picture(nimg, "preview", picture, preview_text(pairs.prompts, nimg))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged student, without dropout."""
        module = self.state.student.module
        switch(module, on=False)
        with averaged(module, self.state.ema.tensors):
            yield
        switch(module, on=True)

    @torch.no_grad()
    def _draw(self, noise: Tensor, prompts: Sequence[str], *told: Tensor) -> Tensor:
        with self.autocast():
            latents: Tensor = self.state.student.forward_frozen(
                noise, self.encode(prompts), *(t.to(self.device) for t in told)
            )
        return latents

    def _drawn(self, seed: int, prompts: Sequence[str]) -> Tensor:
        return draw_together(
            self._draw,
            self.reader.spec.latent_shape,
            seed,
            prompts,
            batch_size=self.batch,
            device=self.device,
            guidance=OneStep.guidance if self.guided else None,
        )

    def due(self, now: bool) -> bool:
        """Whether it is time to validate; `now`: at the end it is, if ever."""
        interval, nimg = self.config.validate_images, self.state.nimg
        return bool(interval) and (now or nimg // interval > (nimg - self.config.batch_size) // interval)

    def missed(self) -> bool:
        """Whether the point that a run goes on from was to be validated, and a kill came first."""
        nimg = self.state.nimg
        done = any(line["nimg"] == nimg and "val/psnr" in line for line in self.log.read())
        return process_group.gather_objects(self.due(nimg >= self.config.images) and not done)[0]

    def validate(self) -> bool:
        """Measure the averaged student; whether this point is a new best, to be kept."""
        nimg = self.state.nimg
        with self._averaged():
            values = measure(
                self._draw,
                self.reader,
                held_out(len(self.reader), self.config.validate_pairs),
                self.regression.validation_distance,
                batch_size=self.batch,
                device=self.device,
                seed=self.seed,
            )
            if self.also is not None:
                values |= self.also(self._drawn, nimg)
        self.log.write(nimg, values)
        return self.config.keep_best and self.best(nimg) == nimg

    def best(self, nimg: int) -> int | None:
        """The best validated point among those saved and `nimg`, as rank 0 sees it."""
        found = None
        if process_group.rank() == 0 and (
            point := best(self.log.read(), {*complete_points(self.folder), nimg})
        ):
            found = point[0]
        return process_group.gather_objects(found)[0]

    def panel(self) -> None:
        """RUN/health.png of all reports so far."""
        if process_group.rank() == 0 and (lines := self.log.read()):
            plot_health(lines, self.log.folder / "health.png", str(self.log.folder))

    def spare(self) -> set[str]:
        """Names of checkpoints that stay beside the newest, when this point is saved."""
        point = self.best(self.state.nimg) if self.config.keep_best else None
        return set() if point is None else {f"{point:09d}"}


def _say_nothing(text: str) -> None:
    pass
