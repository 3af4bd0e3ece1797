"""Writing one shard of a pair store: resumable after a kill; a shard appears complete or not at all."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from d2g.core.errors import UserError
from pairgen.store.hdf5 import PairBatch, encode_rows, join_conditions, load_rows, redraw_noise
from pairgen.store.spec import (
    StoreSpec,
    encode_record,
    quarantine_path,
    shard_path,
    shards_present,
    write_through_scratch,
    writing,
)


class PairWriter:
    """Writes the rows of one shard, in any order, and puts the complete shard in place with `commit`.

    Appended rows are buffered in memory and written to DIR/partial every `flush_seconds`, as small files in
    the shard's own format, so a killed process loses at most one flush. `commit` joins them into the shard
    and needs twice its size in memory. Leaving the `with` block early (Ctrl-C, an error) flushes the buffer.
    `retry`: start from the existing shard and write only its quarantined rows. Only one writer per shard may
    run at a time (`pairgen.shard_claims`).

    >>> import tempfile
    >>> from pairgen import PairReader, PairWriter
    >>> from d2g.core.seeds import noise
    >>> from d2g.diffusion.latents import LatentSpace
    >>> from pairgen.store.spec import StoreSpec, create_store
    >>> spec = StoreSpec(
    ...     teacher="my-teacher", teacher_sha256="0" * 64, prompts_sha256="0" * 64, num_prompts=1,
    ...     num_pairs=2, solver="ddim", steps=50, spacing="leading", final_alpha_one=True, guidance=8.0,
    ...     seed=0, latent_shape=(4, 8, 8), latent_space=LatentSpace(channels=4, downscale=8, scale=0.18215),
    ...     shard_size=2,
    ... )
    >>> folder = Path(tempfile.mkdtemp())
    >>> spec = create_store(folder, spec)
    >>> with PairWriter(folder, spec, shard=0) as writer:
    ...     z = noise(spec.seed, writer.missing, spec.latent_shape, spec.torch_dtype)
    ...     writer.append(z, 0.5 * z, ["a red cube"] * 2, writer.missing)
    ...     writer.commit()
    >>> PairReader(folder).read([0]).prompts
    ['a red cube']
    """

    def __init__(
        self, folder: Path, spec: StoreSpec, shard: int, retry: bool = False, flush_seconds: float = 60.0
    ) -> None:
        self.folder, self.spec, self.shard = Path(folder), spec, shard
        self.retry, self.flush_seconds = retry, flush_seconds
        self.path, self._scratch = shard_path(self.folder, shard), self.folder / "partial"
        self.quarantined: dict[int, dict[str, Any]] = {}
        """Appended rows whose latents are not finite: pair index -> entry of the quarantine record."""
        self._missing = set(spec.rows(shard))
        self._buffer: list[PairBatch] = []
        self._on_disk = 0

    def __enter__(self) -> Self:
        self.open()
        return self

    def open(self) -> list[int]:
        """Resume from the partial files of a killed writer and return `missing`.

        Raises UserError if the shard is already complete, unless `retry` is set.
        """
        if self.path.exists() and not self.retry:
            raise UserError(
                f"{self.path} is already complete; run the same command again to generate the missing shards"
            )
        # Remove unfinished files, and count the rows of flushed ones as present.
        with writing(self.folder, "nothing was lost"):
            for temporary in self._scratch.glob(f"{self.path.stem}.*.tmp"):
                temporary.unlink(missing_ok=True)
            for part in self._sources():
                index = load_rows(part, self.spec).index.tolist()
                self._missing -= set(index)
                self._on_disk += len(index)
        self._flushed_at = time.monotonic()
        return self.missing

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    @property
    def missing(self) -> list[int]:
        """Sorted indices of the pairs of this shard that are neither on disk nor appended yet."""
        return sorted(self._missing)

    def append(
        self,
        noise: Tensor,
        latents: Tensor,
        prompts: Sequence[str],
        index: Tensor | np.ndarray | Sequence[int],
        condition: Tensor | None = None,
    ) -> None:
        """Add rows: noise exactly as the teacher received it, and scaled latents, both floats [B, C, H, W].

        condition: the latents of the stage before, as the teacher received them, where the spec has them.

        Latents are rounded to the stored type; rows that are then not finite go to `quarantined`. Raises
        UserError for a wrong shape, type, prompt or index, naming the pairs; earlier rows stay valid.
        """
        # Check the rows completely before any of them is added.
        number = torch.as_tensor(index).to("cpu", torch.int64)
        if len(set(number.tolist()) & self._missing) != len(number) or len(number) == 0:
            expected = f"distinct indices out of {self.missing[:1]}...{self.missing[-1:]}"
            raise UserError(f"{self.path.name}: got pairs {number.tolist()}, expected {expected}")
        if len(prompts) != len(number) or any("\0" in prompt for prompt in prompts):
            raise UserError(
                f"pairs {number.tolist()}: expected {len(number)} prompts, none with a NUL character"
            )
        # Round to the stored type, and check that a reader gets the same noise back.
        rows = PairBatch(
            noise=self._rounded("noise", noise, number),
            latents=self._rounded("latents", latents, number),
            prompts=list(prompts),
            index=number,
            condition=None if condition is None else self._rounded("condition", condition, number),
        )
        self._check_noise(rows, noise)
        # Rows that are not finite after rounding are quarantined instead of written.
        finite = rows.latents.flatten(1).isfinite().all(dim=1)
        for row in (~finite).nonzero().flatten().tolist():
            reason = f"its latent is not finite in {self.spec.dtype}"
            pair = int(number[row])
            self.quarantined[pair] = {"index": pair, "prompt": rows.prompts[row], "reason": reason}
        self._missing -= set(number.tolist())
        if finite.any():
            self._buffer.append(_select_rows(rows, finite))
        # Write to disk from time to time, so that a killed process loses little.
        if time.monotonic() - self._flushed_at >= self.flush_seconds:
            self.flush()

    def _rounded(self, name: str, values: Tensor, number: Tensor) -> Tensor:
        shape = self.spec.condition_shape if name == "condition" else self.spec.latent_shape
        expected = (len(number), *(shape or ()))
        if tuple(values.shape) != expected or not values.is_floating_point():
            got = f"{tuple(values.shape)} {values.dtype}"
            raise UserError(f"{name} of pairs {number.tolist()} is {got}, expected floats {expected}")
        return values.detach().to("cpu", self.spec.torch_dtype).contiguous()

    def _check_noise(self, rows: PairBatch, noise: Tensor) -> None:
        """Raise UserError unless a reader gets back `noise` exactly, from the file or from (seed, index)."""
        number = rows.index.tolist()
        stored = redraw_noise(self.spec, number) if self.spec.noise == "seeded" else rows.noise
        if not torch.equal(stored.float(), noise.detach().cpu().float()):
            dtype, seed = self.spec.dtype, self.spec.seed
            text = f"noise of pairs {number} cannot be read back as the teacher received it"
            raise UserError(f"{text}: draw it with seeds.noise({seed}, index, shape, {dtype}) first")

    def flush(self) -> None:
        """Write the rows appended since the last flush to DIR/partial."""
        self._flushed_at = time.monotonic()
        if self._buffer:
            rows = _join(self._buffer)
            self._write(rows, self._scratch / f"{self.path.stem}.rows-{int(rows.index[0]):010d}.h5")
            self._buffer = []
            self._on_disk += len(rows.index)

    def commit(self) -> None:
        """Write the complete shard under its final name and remove its partial files.

        Every row must be appended or quarantined. The quarantine record is written before the shard.
        """
        assert not self._missing, f"{self.path.name}: commit with {len(self._missing)} rows missing"
        # Collect all rows. Another process may have deleted partial files meanwhile.
        sources, quarantined = self._sources(), sorted(self.quarantined)
        rows = _join([load_rows(source, self.spec) for source in sources] + self._buffer, self.spec)
        if sorted([*rows.index.tolist(), *quarantined]) != list(self.spec.rows(self.shard)):
            text = f"partial files of {self.path.name} vanished from {self._scratch} during the run"
            raise UserError(f"{text}; see that no other run writes there, and run the same command again")
        # Write the record first: a shard never lacks rows without one.
        record = quarantine_path(self.folder, self.shard)
        if quarantined:
            with writing(self.folder, f"{self._on_disk} rows of {self.path.name} are safe"):
                record.parent.mkdir(exist_ok=True)
                content = encode_record(self.shard, [self.quarantined[pair] for pair in quarantined])
                write_through_scratch(content, record, self._scratch)
        self._write(rows, self.path, quarantined)
        self._buffer = []
        # Remove partial files, and the record of a shard that lacks no rows any more.
        for leftover in [*self._parts(), *([] if quarantined else [record])]:
            leftover.unlink(missing_ok=True)

    def _write(self, rows: PairBatch, path: Path, quarantined: Sequence[int] = ()) -> None:
        complete = len(shards_present(self.folder, self.spec))
        safe = f"{complete} complete shards and {self._on_disk} rows of {self.path.name} are safe"
        try:
            with writing(self.folder, safe):
                write_through_scratch(encode_rows(self.spec, rows, quarantined), path, self._scratch)
        except UserError:
            self._buffer = []  # __exit__ must not write again and raise the same error a second time
            raise

    def _parts(self) -> list[Path]:
        return sorted(self._scratch.glob(f"{self.path.stem}.rows-*.h5"))

    def _sources(self) -> list[Path]:
        """The files that already hold rows of this shard."""
        return ([self.path] if self.retry and self.path.exists() else []) + self._parts()


class BackgroundWriter:
    """A thread that writes while the teacher computes. Calls run in order, and at most `depth` are queued.

    After the first error no further call runs; the next `submit` or `finish` raises that error.
    """

    def __init__(self, depth: int = 4) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pair-writer")
        self._calls: deque[Future[Any]] = deque()
        self._failed = False
        self.depth = depth

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)

    def submit(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Queue `call(*arguments)`; blocks while `depth` calls are queued."""
        while self._calls and (self._calls[0].done() or len(self._calls) >= self.depth):
            self._calls.popleft().result()
        self._calls.append(self._pool.submit(self._run, call, arguments))

    def _run(self, call: Callable[..., Any], arguments: Sequence[Any]) -> None:
        if self._failed:
            return  # the next `submit` raises the error
        try:
            call(*arguments)
        except BaseException:
            self._failed = True
            raise

    def finish(self) -> None:
        """Wait until all queued calls are done."""
        while self._calls:
            self._calls.popleft().result()


def _select_rows(rows: PairBatch, keep: Tensor) -> PairBatch:
    prompts = [prompt for prompt, keep_row in zip(rows.prompts, keep.tolist(), strict=True) if keep_row]
    return PairBatch(
        noise=rows.noise[keep],
        latents=rows.latents[keep],
        prompts=prompts,
        index=rows.index[keep],
        condition=None if rows.condition is None else rows.condition[keep],
    )


def _join(batches: Sequence[PairBatch], spec: StoreSpec | None = None) -> PairBatch:
    """Join the rows of all batches, without repeats, in order of index. An empty list needs `spec`."""
    # Without batches, there are rows of no length.
    if not batches:
        assert spec is not None
        empty = torch.empty(0, *spec.latent_shape, dtype=spec.torch_dtype)
        shape = spec.condition_shape
        return PairBatch(
            noise=empty,
            latents=empty,
            prompts=[],
            index=torch.empty(0, dtype=torch.int64),
            condition=None if shape is None else torch.empty(0, *shape, dtype=spec.torch_dtype),
        )
    # Sort by index; of equal indices, the first is kept.
    index = torch.cat([b.index for b in batches])
    order = np.unique(index.numpy(), return_index=True)[1]
    prompts = [prompt for b in batches for prompt in b.prompts]
    condition = join_conditions([b.condition for b in batches])
    return PairBatch(
        noise=torch.cat([b.noise for b in batches])[order],
        latents=torch.cat([b.latents for b in batches])[order],
        prompts=[prompts[i] for i in order.tolist()],
        index=index[order],
        condition=None if condition is None else condition[order],
    )
