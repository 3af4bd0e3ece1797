"""Reports, previews, validation and collapse detection of a run. Rank 0 writes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from d2g.core.distributed import process_group
from d2g.core.distributed.checkpoint import complete_points
from d2g.core.distributed.engine import DistributedModule
from d2g.core.distributed.sharded_checkpoint import Writer
from d2g.core.errors import Interrupted, LostFolder, UserError
from d2g.core.logs import logger
from d2g.core.seeds import noise
from d2g.core.tracking.run_directory import Pace, RunLog, speed_in_words
from d2g.diffusion.conditioning import Conditioning
from distill.config.run import TrainConfig
from distill.models.row_dropout import set_row_dropout
from distill.models.student import Student
from distill.monitoring import collapse
from distill.monitoring.best_point import (
    SELECTION_METRICS,
    best_validation,
    comparable_reports,
    record_measure,
)
from distill.monitoring.plots import plot_health
from distill.training.preview import (
    decode_images,
    preview,
    preview_latents,
    preview_statistics,
    preview_text,
)
from distill.training.real_rows import ImageRows
from distill.training.state import State
from distill.training.validation import (
    Validate,
    held_out,
    measure,
    sample_across_ranks,
    use_ema_weights,
)
from latent_lpips.distance import ELatentLPIPS
from pairgen.store.dataset import Rows
from pairgen.store.hdf5 import PairBatch


@dataclass(frozen=True)
class StudentSampler:
    """Samples latents with the student's current weights, in the precision of training."""

    student: DistributedModule
    encode: Callable[[Sequence[str]], Conditioning]
    device: torch.device
    autocast: Callable[[], AbstractContextManager[None]]

    @torch.no_grad()
    def __call__(
        self, noise: Tensor, prompts: Sequence[str], *guidance: Tensor, prior: Tensor | None = None
    ) -> Tensor:
        """Sample scaled latents [B, C, h, w] from noise [B, *noise_shape] and B prompts.

        guidance: a scale per row [B], for a student that takes it. prior: latents of the stage before, for a
        later stage of a cascade.
        """
        cond = self.encode(prompts)
        cond = cond if prior is None else cond.with_prior(prior)
        with self.autocast():
            latents: Tensor = self.student.forward_frozen(
                noise, cond, *(scale.to(self.device) for scale in guidance)
            )
        return latents


class RunMonitor:
    """Writes reports and previews of one run, and validates. Call every method on every rank.

    - reader: the rows of the run, of which `validate_pairs` are held out.
    - shape: shape (C, h, w) of the latents.
    - distance: a distance that validation measures beside PSNR.
    - microbatch_size: rows per batch in validation, as in training, because that fits into memory.
    - vae: decodes previews; None for no previews.
    - extra_validation: an additional measurement at each validation.
    - guidance: guidance scale of samples without pairs, for a student that takes it.
    """

    def __init__(
        self,
        options: TrainConfig,
        seed: int,
        log: RunLog,
        reader: Rows,
        shape: tuple[int, int, int],
        state: State,
        draw: StudentSampler,
        distance: ELatentLPIPS | None,
        microbatch_size: int,
        vae: nn.Module | None,
        extra_validation: Validate | None,
        guidance: float | None = None,
    ) -> None:
        self.options, self.seed, self.log, self.state = options, seed, log, state
        self.reader, self.shape = reader, shape
        self.draw, self.device, self.distance = draw, draw.device, distance
        self.batch, self.vae, self.extra_validation = microbatch_size, vae, extra_validation
        self.guidance = guidance
        self.folder, self.warned = log.folder / "checkpoints", set[str]()

    @contextmanager
    def record_ending(self) -> Iterator[None]:
        """Context of the training loop, which records how the run ended in RUN/ended.json.

        On exit it also closes the loggers and draws the health panel. A run that was finished before keeps
        its record.
        """
        # A finished run keeps its record.
        if self.state.nimg >= self.options.images:
            yield
            return self.log.close()
        self.log.begin()
        try:
            yield
        # Failed or stopped: record it, unless another run owns the folder now.
        except BaseException as error:
            self.log.close()
            if isinstance(error, LostFolder):
                raise
            with suppress(UserError):  # a full disk must not hide the original error
                self.log.end("stopped" if isinstance(error, Interrupted) else "failed", str(error))
                if isinstance(error, Exception):  # not on Ctrl-C, so that it ends quickly
                    self.panel()
            raise

        # Trained to the end, or to the time limit.
        self.log.close()
        self.panel()
        self.log.end("done" if self.state.nimg >= self.options.images else "minutes")

    def report(self, values: Mapping[str, Tensor | float], pace: Pace, writer: Writer) -> None:
        """Write one line of stats.jsonl and a preview; then look for a collapse, which may stop the run."""
        nimg = self.state.nimg
        # One line of stats.jsonl, with the statistics of the preview.
        means = process_group.mean({name: float(value) for name, value in values.items()})
        if nimg >= self.options.ema_start_images and not self.state.ema.copies:
            means["ema/drift"] = self.state.ema.drift(self.state.student.module)
        means |= self._preview(nimg)
        speed = pace.report(nimg)
        self.log.write(nimg, {**means, **speed})
        if self.device.type == "cuda":
            logger.info("%d images: %s", nimg, speed_in_words(speed))
        # Look for a collapse on rank 0, and act on it on every rank.
        findings: list[collapse.Finding] = []
        if process_group.rank() == 0:
            findings = collapse.findings(comparable_reports(self.log.folder, self.log.read()))
        warned = self.warned if process_group.rank() == 0 else set()
        findings = process_group.gather_objects(findings)[0]
        warn = None if process_group.rank() == 0 else _ignore
        try:
            collapse.handle_findings(findings, self.options.on_collapse, warned, warn)
        except collapse.Collapse:
            writer.finish()  # keep the checkpoint that is being written
            raise

    def _preview(self, nimg: int) -> dict[str, float]:
        """Write the preview and return its statistics, on rank 0; {} on other ranks and without previews."""
        if self.vae is None:
            return {}
        rows = range(len(self.reader))[-self.options.validate_pairs :][: self.options.preview_prompts]
        pairs = self.reader.read(list(rows))
        with self._ema_weights():
            generated, target = preview_latents(self.draw, self._student_rows(pairs), self.device, self.batch)
        if process_group.rank() != 0:
            return {}
        student, teacher = (decode_images(self.vae, latents, self.batch) for latents in (generated, target))
        text = preview_text(pairs.prompts, nimg, "real" if isinstance(self.reader, ImageRows) else "teacher")
        self.log.picture(nimg, "preview", preview(student, teacher), text)
        return preview_statistics(student, teacher, teacher.shape[-1] // target.shape[-1])

    def _student_rows(self, pairs: PairBatch) -> PairBatch:
        """Pairs with the noise of a student that draws its own, and an upsampler's small latents."""
        student = self.student
        if not student.own_noise:
            return pairs
        own_noise = noise(self.seed, pairs.index.tolist(), student.noise_shape)
        small = student.small_latents(pairs.latents.float())
        return replace(pairs, noise=own_noise, condition=pairs.condition if small is None else small)

    @property
    def student(self) -> Student:
        """The network in training."""
        module = self.state.student.module
        assert isinstance(module, Student)
        return module

    @contextmanager
    def _ema_weights(self) -> Iterator[None]:
        """Context in which the student has its EMA weights and no dropout."""
        module = self.state.student.module
        set_row_dropout(module, enabled=False)
        with use_ema_weights(module, self.state.ema.tensors):
            yield
        set_row_dropout(module, enabled=True)

    def _sample_latents(self, seed: int, prompts: Sequence[str]) -> Tensor:
        return sample_across_ranks(
            self.draw,
            self.student.noise_shape,
            seed,
            prompts,
            batch_size=self.batch,
            device=self.device,
            guidance=self.guidance,
        )

    def validation_due(self, finished: bool) -> bool:
        """Whether a validation is due: at each interval, and when the run is finished."""
        interval, nimg = self.options.validate_images, self.state.nimg
        return bool(interval) and (
            finished or nimg // interval > (nimg - self.options.batch_size) // interval
        )

    def validation_missed(self) -> bool:
        """Whether the run was killed between saving the resumed checkpoint and validating it."""
        nimg = self.state.nimg
        done = any(
            line["nimg"] == nimg and any(name.startswith("val/") for name in line) for line in self.log.read()
        )
        return process_group.gather_objects(self.validation_due(nimg >= self.options.images) and not done)[0]

    def validate(self) -> bool:
        """Validate the EMA student. Returns whether it is the best so far, so that it must be saved."""
        nimg, values = self.state.nimg, dict[str, float]()
        with self._ema_weights():
            if self.options.validate_pairs:
                values |= measure(
                    self.draw,
                    self.reader,
                    held_out(len(self.reader), self.options.validate_pairs),
                    self.distance,
                    batch_size=self.batch,
                    device=self.device,
                    seed=self.seed,
                )
            if self.extra_validation is not None:
                values |= self.extra_validation(self._sample_latents, nimg)
        self._record_measure(values)
        self.log.write(nimg, values)
        return self.options.keep_best and self.best_point(nimg) == nimg

    def _record_measure(self, values: Mapping[str, float]) -> None:
        """Record the settings of the metric that selects the best checkpoint; log a change."""
        metric = next((name for name in SELECTION_METRICS if name in values), "")
        if process_group.rank() != 0 or not metric:
            return
        rows = held_out(len(self.reader), self.options.validate_pairs)  # they move when a store grows
        how: Mapping[str, object] = {"pairs": [rows.start, rows.stop]}
        if self.extra_validation is not None and metric == "val/fid":
            how = self.extra_validation.facts
        if changes := record_measure(self.log.folder, {"metric": metric, **how}, self.state.nimg):
            logger.info(
                "%d images: the settings of the validation have changed (%s); "
                "earlier ones no longer count as best",
                *(self.state.nimg, ", ".join(changes)),
            )

    def best_point(self, nimg: int) -> int | None:
        """Images seen at the best validation among saved checkpoints and `nimg`, as rank 0 sees them.

        Only validations that measure the same as the last one count.
        """
        images = None
        if process_group.rank() == 0:
            lines = comparable_reports(self.log.folder, self.log.read())
            if point := best_validation(lines, {*complete_points(self.folder), nimg}):
                images = point[0]
        return process_group.gather_objects(images)[0]

    def panel(self) -> None:
        """Plot all reports so far to RUN/health.png, if `train.plot` is set."""
        if self.options.plot and process_group.rank() == 0 and (lines := self.log.read()):
            plot_health(lines, self.log.folder / "health.png", str(self.log.folder))

    def checkpoints_to_keep(self) -> set[str]:
        """Names of the checkpoints that must not be deleted when the current one is saved: the best one."""
        point = self.best_point(self.state.nimg) if self.options.keep_best else None
        return set() if point is None else {f"{point:09d}"}


def _ignore(text: str) -> None:
    """Print nothing: only rank 0 prints warnings."""
