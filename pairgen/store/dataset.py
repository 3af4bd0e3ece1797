"""Pairs for training: a map-style data set, and shuffled batches whose complete state is one integer."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from d2g.core.errors import SettingError, UserError
from d2g.core.logs import EVERY_RANK, logger
from d2g.core.shuffle import permuted_batch
from pairgen.store.hdf5 import PairBatch, StoreSpec

ORDERED = 4096  # positions of the random order computed at a time
AHEAD = 4  # batches announced in advance in a full shuffle


class Rows(Protocol):
    """Rows by position."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int], dtype: torch.dtype | None = torch.float32) -> PairBatch: ...


class AnnouncedRows(Rows, Protocol):
    """Rows that are announced before they are read: what `pair_loader` reads."""

    def prefetch(self, rows: Sequence[int], block: int = 1) -> None: ...


class PairRows(AnnouncedRows, Protocol):
    """The rows of pair stores: the interface that PairReader and JoinedReader share."""

    @property
    def spec(self) -> StoreSpec: ...


class PairDataset(Dataset[PairBatch]):
    """The rows of a store as a map-style data set: a position, or a list of positions, gives a PairBatch.

    Use it with a PairSampler, or a BatchSampler around another sampler, and `batch_size=None` in a DataLoader
    of your own; `pair_loader` does that.

    dtype: of noise and latents [B, C, H, W]; None keeps the stored type (float16 halves the bytes to move).

    >>> import tempfile
    >>> from pathlib import Path
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
    >>> dataset = PairDataset(PairReader(folder))
    >>> sampler = PairSampler(len(dataset), batch_size=2, seed=0)
    >>> batch = next(iter(DataLoader(dataset, sampler=sampler, batch_size=None)))
    >>> batch.noise.shape, sorted(batch.index.tolist())
    (torch.Size([2, 4, 8, 8]), [0, 1])
    """

    def __init__(self, reader: AnnouncedRows, dtype: torch.dtype | None = torch.float32) -> None:
        self.reader, self.dtype = reader, dtype

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, rows: int | Sequence[int]) -> PairBatch:
        return self.reader.read(np.atleast_1d(rows).tolist(), self.dtype)


class PairSampler(Sampler[list[int]]):
    """Endless batches of positions in random order; each rank takes its slice of every global batch.

    The order is a function of `seed` alone, and global batch k is positions [kB, (k + 1)B) of it. Every epoch
    contains each row once, whatever the number of ranks, workers and restarts. The only state is the number
    of images seen by all ranks together: pass it as `start` to resume.

    block, window: permute blocks of `block` neighboring rows, then shuffle the rows of `window` blocks, for
    disks and networks that are slow at random rows (`d2g.core.shuffle.permuted_blocks`). 0 shuffles all rows.
    Raises SettingError for impossible sizes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        block: int = 0,
        window: int = 0,
    ) -> None:
        # Every rank takes the same number of rows of each global batch.
        if size < 1 or batch_size < 1 or batch_size % world_size:
            raise SettingError(
                f"batches of {batch_size} from {size} pairs for {world_size} processes; expected pairs, "
                "and a batch size that the number of processes divides"
            )
        # Shuffling by blocks needs both `block` and `window`.
        if min(start, block, window) < 0 or bool(block) != bool(window):
            raise SettingError(
                f"start {start}, block {block}, window {window}; expected 0 or more, block with window"
            )
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.rank, self.world_size, self.block, self.window = rank, world_size, block, window

    def __iter__(self) -> Iterator[list[int]]:
        # Compute the order in large pieces, and take this rank's slice of each global batch.
        local, size = self.batch_size // self.world_size, self.batch_size
        batches = max(1, ORDERED // size)
        for start in count(self.start, batches * size):
            rows = permuted_batch(self.seed, self.size, start, batches * size, self.block, self.window)
            for first in range(self.rank * local, len(rows), size):
                yield rows[first : first + local]


class _WithLookahead(Sampler[tuple[list[int], list[int]]]):
    """Each batch together with rows of a later batch to prefetch, at least one shuffle window ahead."""

    def __init__(self, sampler: PairSampler) -> None:
        self.sampler = sampler
        self.batches = max(AHEAD, -(-sampler.block * sampler.window // sampler.batch_size) + 1)

    def __iter__(self) -> Iterator[tuple[list[int], list[int]]]:
        order = iter(self.sampler)
        waiting = deque(islice(order, self.batches))
        ahead = [row for rows in waiting for row in rows]
        while True:
            yield waiting.popleft(), ahead
            waiting.append(ahead := next(order))


class _BatchOrError(Dataset["PairBatch | _Packed | UserError"]):
    """Returns a UserError as an item: raised in a worker, it would arrive wrapped in a traceback."""

    def __init__(self, dataset: PairDataset, block: int) -> None:
        self.dataset, self.block = dataset, block

    def __getitem__(self, item: tuple[list[int], list[int]]) -> "PairBatch | _Packed | UserError":
        rows, ahead = item
        try:
            self.dataset.reader.prefetch(ahead, max(1, self.block))
            batch = self.dataset[rows]
        except UserError as error:
            return error
        return batch if get_worker_info() is None else _Packed.of(batch)


@dataclass(frozen=True)
class _Packed:
    """A batch on its way from a worker: pickled, with its tensors in shared memory.

    A queue pickles in a thread of its own. What fails there (open files, file size, space in /dev/shm) is
    only printed, and the trainer would wait for the batch forever.
    """

    data: bytes

    @classmethod
    def of(cls, batch: PairBatch) -> "_Packed | UserError":
        """Pack a batch, or return the error that the trainer raises."""
        try:
            return cls(bytes(ForkingPickler.dumps(batch)))
        except (OSError, RuntimeError, MemoryError) as error:
            return _cannot_pass(error)

    def pin_memory(self) -> "PairBatch | UserError":
        """The batch in page-locked memory: DataLoader's thread calls this."""
        batch = self.unpack()
        return batch.pin_memory() if isinstance(batch, PairBatch) else batch

    def unpack(self) -> "PairBatch | UserError":
        """The batch, or the error that the trainer raises."""
        try:
            batch: PairBatch = ForkingPickler.loads(self.data)
        except (OSError, RuntimeError, EOFError) as error:
            return _cannot_pass(error)
        return batch


def _cannot_pass(error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"a loader process cannot pass its batch on ({reason}); raise the limits of open files and file size "
        "(ulimit -n, ulimit -f) or the size of /dev/shm, or set train.loader_workers=0"
    )


def _leave_process_group(worker: int) -> None:
    """Put a worker in its own process group, so that Ctrl-C and torchrun's signals reach only the trainer.

    The trainer needs its workers to finish the current step, and ends them when it exits.
    """
    os.setpgid(0, 0)


def pair_loader(
    reader: AnnouncedRows,
    sampler: PairSampler,
    *,
    workers: int = 0,
    dtype: torch.dtype | None = torch.float32,
    pin_memory: bool = False,
    on_skip: Callable[[str], None] | None = None,
) -> Iterator[PairBatch]:
    """Yield the sampler's endless batches, read ahead by `workers` processes (0: by this process).

    - dtype: type of noise and latents; None keeps the stored type.
    - pin_memory: return page-locked memory, so that copies to a GPU overlap with its work.
    - on_skip: called once for each damaged file whose rows a reader with `skip_bad` replaces. The default
      logs a warning.

    A UserError of a worker is raised here without the worker's traceback.
    """
    # The sampler runs in this process, so the batches do not depend on the number of workers.
    loader: DataLoader[Any] = DataLoader(
        _BatchOrError(PairDataset(reader, dtype), sampler.block),
        sampler=_WithLookahead(sampler),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_process_group if workers else None,
    )
    reported: set[str] = set()
    for batch in _without_dead_workers(loader):
        if isinstance(batch, _Packed):
            batch = batch.unpack()
        if isinstance(batch, UserError):
            raise batch
        # Each worker skips damage on its own: report each file once.
        for file, reason in batch.skipped.items():
            if file not in reported:
                reported.add(file)
                (on_skip or _log_warning)(
                    f"{file}: {reason}; its rows are replaced by those of the next intact shard"
                )
        yield batch


def _without_dead_workers(loader: "DataLoader[Any]") -> Iterator[Any]:
    """The loader's batches; a worker that was killed or could not start becomes a UserError."""
    try:
        batches = iter(loader)
    except OSError as error:
        raise _ended(error) from error
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker (" in str(error):
            raise _ended(error) from error
        raise


def _ended(error: Exception) -> UserError:
    return UserError(
        f"a loader process ended or could not start ({' '.join(str(error).split())}); run again with "
        "fewer, with a larger /dev/shm, or with train.loader_workers=0"
    )


def _log_warning(text: str) -> None:
    logger.warning(text, extra=EVERY_RANK)
