"""Writing one shard of a pair store: crash-safe, resumable, whole or not there."""

import fcntl
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from pairgen.layout import StoreSpec, publish, shard_path, shards_present, writing
from pairgen.store import PairBatch, encode_rows, load_rows, redraw


class PairWriter:
    """Writes one shard. Rows gather in memory and reach DIR/partial every `flush_seconds`, in small files
    of the shard's own format, so a killed run loses at most one flush; `commit` joins them under its name.

        with PairWriter(folder, spec, shard) as writer:
            for batch in batches_of(writer.missing):
                writer.append(noise, latent, prompts, index)
            writer.commit()

    Leaving the block early (Ctrl-C, an error) flushes first. `commit` holds the shard twice in memory.
    """

    def __init__(
        self, folder: Path, spec: StoreSpec, shard: int, resume: bool = True, flush_seconds: float = 60.0
    ) -> None:
        self.folder, self.spec, self.shard = Path(folder), spec, shard
        self.resume, self.flush_seconds = resume, flush_seconds
        self.path, self._scratch = shard_path(self.folder, shard), self.folder / "partial"
        self._missing = set(spec.rows(shard))
        self._buffer: list[PairBatch] = []
        self._on_disk = 0

    def __enter__(self) -> Self:
        with writing(self.folder, "nothing was lost"):
            self._lock = os.open(self._scratch / f"{self.path.stem}.lock", os.O_CREAT | os.O_RDWR)
            try:
                self._lock_shard()
                if self.path.exists():
                    text = f"{self.path} is already whole, made by another run"
                    raise UserError(f"{text}; run the same command again to make what is left")
                for part in self._parts():
                    self._recover(part)
            except BaseException:
                os.close(self._lock)
                raise
        self._flushed_at = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
        finally:
            os.close(self._lock)

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

        Raises UserError for a wrong shape, type, prompt or index, and FloatingPointError for a value that is
        not finite in the stored dtype; each names the pair. A refused batch leaves earlier rows as they are.
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
            latent=self._rounded("latent", latent, number),
            prompts=list(prompts),
            index=number,
        )
        seen = noise.detach().cpu().float()
        stored = redraw(self.spec, number.tolist()) if self.spec.noise == "seeded" else rows.noise
        if not torch.equal(stored.float(), seen):
            dtype, seed = self.spec.dtype, self.spec.seed
            text = f"noise of pairs {number.tolist()} cannot be read back as the teacher saw it"
            raise UserError(f"{text}: draw it with seeds.noise({seed}, index, shape, {dtype}) first")
        self._buffer.append(rows)
        self._missing -= set(number.tolist())
        if time.monotonic() - self._flushed_at >= self.flush_seconds:
            self.flush()

    def _rounded(self, name: str, values: Tensor, number: Tensor) -> Tensor:
        expected = (len(number), *self.spec.latent_shape)
        if tuple(values.shape) != expected or not values.is_floating_point():
            got = f"{tuple(values.shape)} {values.dtype}"
            raise UserError(f"{name} of pairs {number.tolist()} is {got}, expected floats {expected}")
        rounded = values.detach().to("cpu", self.spec.torch_dtype).contiguous()
        broken = number[~rounded.flatten(1).isfinite().all(dim=1)].tolist()
        if broken:
            raise FloatingPointError(f"{name} of pairs {broken} is not finite in {self.spec.dtype}")
        return rounded

    def flush(self) -> None:
        """Bring the rows appended since the last flush to disk."""
        self._flushed_at = time.monotonic()
        if self._buffer:
            rows = _joined(self._buffer)
            part = self._scratch / f"{self.path.stem}.rows-{int(rows.index[0]):010d}.h5"
            self._publish(rows, part)
            self._buffer = []
            self._on_disk += len(rows.index)

    def commit(self) -> None:
        """Bring the whole shard under its name and drop its partial files. Every row must be there."""
        assert not self._missing, f"{self.path.name}: commit with {len(self._missing)} rows missing"
        parts = self._parts()
        rows = _joined([load_rows(part, self.spec) for part in parts] + self._buffer)
        if rows.index.tolist() != list(self.spec.rows(self.shard)):
            text = f"partial files of {self.path.name} vanished from {self._scratch} during the run"
            raise UserError(f"{text}; see that no other run writes there, and run the same command again")
        self._publish(rows, self.path)
        self._buffer = []
        for leftover in [*parts, self._scratch / f"{self.path.stem}.lock"]:
            leftover.unlink(missing_ok=True)

    def _publish(self, rows: PairBatch, path: Path) -> None:
        whole = len(shards_present(self.folder, self.spec))
        safe = f"{whole} whole shards and {self._on_disk} rows of {self.path.name} are safe"
        try:
            with writing(self.folder, safe):
                publish(encode_rows(self.spec, rows), path, self._scratch)
        except UserError:
            self._buffer = []  # leaving the block must not try again and hide this error behind its twin
            raise

    def _parts(self) -> list[Path]:
        return sorted(self._scratch.glob(f"{self.path.stem}.rows-*.h5"))

    def _lock_shard(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = f"another process is writing {self.path.name} in {self.folder}"
            raise UserError(f"{text}; wait for it, or stop it and run the same command again") from error
        except OSError:
            # A file system without locks (some Lustre mounts): there, two runs at once do the work twice and
            # the last rename wins with equal rows. Their temporary files cannot be told from a dead run's.
            return
        for temporary in self._scratch.glob(f"{self.path.stem}.*.tmp"):
            temporary.unlink()

    def _recover(self, part: Path) -> None:
        if self.resume:
            found = load_rows(part, self.spec).index.tolist()
            self._missing -= set(found)
            self._on_disk += len(found)
        else:
            part.unlink()


def _joined(batches: Sequence[PairBatch]) -> PairBatch:
    """All rows of `batches`, each once, in order of index."""
    index = torch.cat([b.index for b in batches])
    order = np.unique(index.numpy(), return_index=True)[1]
    prompts = [prompt for b in batches for prompt in b.prompts]
    return PairBatch(
        noise=torch.cat([b.noise for b in batches])[order],
        latent=torch.cat([b.latent for b in batches])[order],
        prompts=[prompts[i] for i in order.tolist()],
        index=index[order],
    )
