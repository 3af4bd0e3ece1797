"""Writing one shard of a pair store: crash-safe, resumable, whole or not there."""

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
from pairgen.store.hdf5 import PairBatch, encode_rows, load_rows, redraw
from pairgen.store.spec import (
    StoreSpec,
    encode_record,
    quarantine_path,
    shard_path,
    shards_present,
    write_atomically,
    writing,
)


class PairWriter:
    """Writes one shard. Rows gather in memory and reach DIR/partial every `flush_seconds`, in small files
    of the shard's own format, so a killed run loses at most one flush; `commit` joins them under its name.

        with PairWriter(folder, spec, shard) as writer:
            for batch in batches_of(writer.missing):
                writer.append(noise, latent, prompts, index)
            writer.commit()

    Leaving the block early (Ctrl-C, an error) flushes first. `commit` holds the shard twice in memory.
    `retry`: start from the whole shard that is there and make only its quarantined rows. One writer per shard
    at a time: `pairgen.shard_claims` sees to it.
    """

    def __init__(
        self, folder: Path, spec: StoreSpec, shard: int, retry: bool = False, flush_seconds: float = 60.0
    ) -> None:
        self.folder, self.spec, self.shard = Path(folder), spec, shard
        self.retry, self.flush_seconds = retry, flush_seconds
        self.path, self._scratch = shard_path(self.folder, shard), self.folder / "partial"
        self.quarantined: dict[int, dict[str, Any]] = {}
        """Rows appended without a finite latent: index -> what their record says."""
        self._missing = set(spec.rows(shard))
        self._buffer: list[PairBatch] = []
        self._on_disk = 0

    def __enter__(self) -> Self:
        self.open()
        return self

    def open(self) -> list[int]:
        """Take up what a killed writer left; returns `missing`. UserError if whole already (no `retry`)."""
        if self.path.exists() and not self.retry:
            raise UserError(f"{self.path} is already whole; run the same command again to make what is left")
        with writing(self.folder, "nothing was lost"):
            for temporary in self._scratch.glob(f"{self.path.stem}.*.tmp"):
                temporary.unlink(missing_ok=True)
            for part in self._sources():
                found = load_rows(part, self.spec).index.tolist()
                self._missing -= set(found)
                self._on_disk += len(found)
        self._flushed_at = time.monotonic()
        return self.missing

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    @property
    def missing(self) -> list[int]:
        """Pair indices of this shard that are neither on disk nor appended yet, sorted."""
        return sorted(self._missing)

    def append(
        self,
        noise: Tensor,
        latent: Tensor,
        prompts: Sequence[str],
        index: Tensor | np.ndarray | Sequence[int],
    ) -> None:
        """Add rows: noise as the teacher saw it, scaled latent (rounded here), both [B, C, H, W].

        A row whose latent is not finite in the stored type is set aside in `quarantined`. Raises UserError
        for a wrong shape, type, prompt or index, naming the pairs; a refused batch leaves earlier rows as
        they are.
        """
        number = torch.as_tensor(index).to("cpu", torch.int64)
        if len(set(number.tolist()) & self._missing) != len(number) or len(number) == 0:
            expected = f"different numbers out of {self.missing[:1]}...{self.missing[-1:]}"
            raise UserError(f"{self.path.name}: got pairs {number.tolist()}, expected {expected}")
        if len(prompts) != len(number) or any("\0" in prompt for prompt in prompts):
            raise UserError(
                f"pairs {number.tolist()}: expected {len(number)} prompts, none with a NUL character"
            )
        rows = PairBatch(
            noise=self._rounded("noise", noise, number),
            latents=self._rounded("latent", latent, number),
            prompts=list(prompts),
            index=number,
        )
        self._check_noise(rows, noise)
        finite = rows.latents.flatten(1).isfinite().all(dim=1)
        for row in (~finite).nonzero().flatten().tolist():
            reason = f"its latent is not finite in {self.spec.dtype}"
            pair = int(number[row])
            self.quarantined[pair] = {"index": pair, "prompt": rows.prompts[row], "reason": reason}
        self._missing -= set(number.tolist())
        if finite.any():
            self._buffer.append(_chosen(rows, finite))
        if time.monotonic() - self._flushed_at >= self.flush_seconds:
            self.flush()

    def _rounded(self, name: str, values: Tensor, number: Tensor) -> Tensor:
        expected = (len(number), *self.spec.latent_shape)
        if tuple(values.shape) != expected or not values.is_floating_point():
            got = f"{tuple(values.shape)} {values.dtype}"
            raise UserError(f"{name} of pairs {number.tolist()} is {got}, expected floats {expected}")
        return values.detach().to("cpu", self.spec.torch_dtype).contiguous()

    def _check_noise(self, rows: PairBatch, given: Tensor) -> None:
        number = rows.index.tolist()
        stored = redraw(self.spec, number) if self.spec.noise == "seeded" else rows.noise
        if not torch.equal(stored.float(), given.detach().cpu().float()):
            dtype, seed = self.spec.dtype, self.spec.seed
            text = f"noise of pairs {number} cannot be read back as the teacher saw it"
            raise UserError(f"{text}: draw it with seeds.noise({seed}, index, shape, {dtype}) first")

    def flush(self) -> None:
        """Bring the rows appended since the last flush to disk."""
        self._flushed_at = time.monotonic()
        if self._buffer:
            rows = _joined(self._buffer)
            self._publish(rows, self._scratch / f"{self.path.stem}.rows-{int(rows.index[0]):010d}.h5")
            self._buffer = []
            self._on_disk += len(rows.index)

    def commit(self) -> None:
        """Bring the whole shard under its name and drop its partial files. Every row must be there, or
        quarantined: then the record of those is written first."""
        assert not self._missing, f"{self.path.name}: commit with {len(self._missing)} rows missing"
        sources, aside = self._sources(), sorted(self.quarantined)
        rows = _joined([load_rows(source, self.spec) for source in sources] + self._buffer, self.spec)
        if sorted([*rows.index.tolist(), *aside]) != list(self.spec.rows(self.shard)):
            text = f"partial files of {self.path.name} vanished from {self._scratch} during the run"
            raise UserError(f"{text}; see that no other run writes there, and run the same command again")
        record = quarantine_path(self.folder, self.shard)
        if aside:
            with writing(self.folder, f"{self._on_disk} rows of {self.path.name} are safe"):
                record.parent.mkdir(exist_ok=True)
                content = encode_record(self.shard, [self.quarantined[pair] for pair in aside])
                write_atomically(content, record, self._scratch)
        self._publish(rows, self.path, aside)
        self._buffer = []
        for leftover in [*self._parts(), *([] if aside else [record])]:
            leftover.unlink(missing_ok=True)

    def _publish(self, rows: PairBatch, path: Path, aside: Sequence[int] = ()) -> None:
        whole = len(shards_present(self.folder, self.spec))
        safe = f"{whole} whole shards and {self._on_disk} rows of {self.path.name} are safe"
        try:
            with writing(self.folder, safe):
                write_atomically(encode_rows(self.spec, rows, aside), path, self._scratch)
        except UserError:
            self._buffer = []  # leaving the block must not try again and hide this error behind its twin
            raise

    def _parts(self) -> list[Path]:
        return sorted(self._scratch.glob(f"{self.path.stem}.rows-*.h5"))

    def _sources(self) -> list[Path]:
        """The files that hold rows of this shard already."""
        return ([self.path] if self.retry and self.path.exists() else []) + self._parts()


class BackgroundWriter:
    """A thread that writes while the teacher computes. Calls run in order; at most `depth` of them wait.

    The first error of a call stops all later ones and is raised by the next `put` or by `finish`.
    """

    def __init__(self, depth: int = 4) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pen")
        self._calls: deque[Future[Any]] = deque()
        self._failed = False
        self.depth = depth

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)

    def put(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Run `call(*arguments)` after those before it."""
        while self._calls and (self._calls[0].done() or len(self._calls) >= self.depth):
            self._calls.popleft().result()
        self._calls.append(self._pool.submit(self._run, call, arguments))

    def _run(self, call: Callable[..., Any], arguments: Sequence[Any]) -> None:
        if self._failed:
            return  # its `put` is about to raise why
        try:
            call(*arguments)
        except BaseException:
            self._failed = True
            raise

    def finish(self) -> None:
        """Wait until all is written."""
        while self._calls:
            self._calls.popleft().result()


def _chosen(rows: PairBatch, keep: Tensor) -> PairBatch:
    prompts = [prompt for prompt, kept in zip(rows.prompts, keep.tolist(), strict=True) if kept]
    return PairBatch(
        noise=rows.noise[keep], latents=rows.latents[keep], prompts=prompts, index=rows.index[keep]
    )


def _joined(batches: Sequence[PairBatch], spec: StoreSpec | None = None) -> PairBatch:
    """All rows of `batches`, each once, in order of index. `spec` gives the shape when there are none."""
    if not batches:
        assert spec is not None
        empty = torch.empty(0, *spec.latent_shape, dtype=spec.torch_dtype)
        return PairBatch(noise=empty, latents=empty, prompts=[], index=torch.empty(0, dtype=torch.int64))
    index = torch.cat([b.index for b in batches])
    order = np.unique(index.numpy(), return_index=True)[1]
    prompts = [prompt for b in batches for prompt in b.prompts]
    return PairBatch(
        noise=torch.cat([b.noise for b in batches])[order],
        latents=torch.cat([b.latents for b in batches])[order],
        prompts=[prompts[i] for i in order.tolist()],
        index=index[order],
    )
