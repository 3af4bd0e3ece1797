"""Pairs for training: a map-style dataset, and batches in a random order whose whole state is one integer."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from d2g.core.errors import SettingError, UserError
from d2g.core.logs import EVERY_RANK, logger
from d2g.core.shuffle import permuted_batch
from pairgen.store.hdf5 import PairBatch, StoreSpec

ORDERED = 4096  # positions whose order is computed at a time
AHEAD = 4  # batches of a full shuffle that are announced before they are read


class PairRows(Protocol):
    """Rows by position: a PairReader, or what reads like one."""

    @property
    def spec(self) -> StoreSpec: ...

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int], dtype: torch.dtype | None = torch.float32) -> PairBatch: ...

    def prefetch(self, rows: Sequence[int], block: int = 1) -> None: ...


class PairDataset(Dataset[PairBatch]):
    """The rows of a store: a position, or a list of positions, gives a PairBatch of those rows.

        sampler = PairSampler(len(reader), batch_size=64, seed=0)
        DataLoader(PairDataset(reader), sampler=sampler, batch_size=None, num_workers=4)

    dtype: of noise and latent; None leaves them as stored, mostly half the bytes to move.
    """

    def __init__(self, reader: PairRows, dtype: torch.dtype | None = torch.float32) -> None:
        self.reader, self.dtype = reader, dtype

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, rows: int | Sequence[int]) -> PairBatch:
        return self.reader.read([rows] if isinstance(rows, int) else rows, self.dtype)


class PairSampler(Sampler[list[int]]):
    """Endless batches of positions in a random order; each rank takes its slice of every global batch.

    The stream is a function of `seed`, and global batch k is its positions [kB, (k + 1)B): every epoch gives
    each row once, and nothing depends on ranks, workers or restarts. The state is the number of images seen
    over all ranks: give it as `start` to go on.

    block, window: permute blocks of `block` neighbouring rows, and rows within `window` blocks, for disks and
    networks that are slow at random rows (`d2g.core.shuffle.permuted_blocks`); 0 shuffles all rows.
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
        if size < 1 or batch_size < 1 or batch_size % world_size:
            raise SettingError(
                f"batches of {batch_size} from {size} pairs for {world_size} processes; expected pairs, "
                "and a batch size that the number of processes divides"
            )
        if min(start, block, window) < 0 or bool(block) != bool(window):
            raise SettingError(
                f"start {start}, block {block}, window {window}; expected 0 or more, block with window"
            )
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.rank, self.world_size, self.block, self.window = rank, world_size, block, window

    def __iter__(self) -> Iterator[list[int]]:
        local, size = self.batch_size // self.world_size, self.batch_size
        many = max(1, ORDERED // size)
        for start in count(self.start, many * size):
            rows = permuted_batch(self.seed, self.size, start, many * size, self.block, self.window)
            for first in range(self.rank * local, len(rows), size):
                yield rows[first : first + local]


class _Ahead(Sampler[tuple[list[int], list[int]]]):
    """Each batch, and rows of later ones: far enough on that a window's blocks come while one is used."""

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


class _Answers(Dataset[PairBatch | UserError]):
    """Batches, or the error instead: raised in a worker, it would arrive wrapped in a traceback."""

    def __init__(self, dataset: PairDataset, block: int) -> None:
        self.dataset, self.block = dataset, block

    def __getitem__(self, item: tuple[list[int], list[int]]) -> PairBatch | UserError:
        rows, ahead = item
        try:
            self.dataset.reader.prefetch(ahead, max(1, self.block))
            return self.dataset[rows]
        except UserError as error:
            return error


def _apart(worker: int) -> None:
    """A signal to the trainer's process group (torchrun's, Ctrl-C) is the trainer's to answer: without its
    workers it could not finish the step. One to the worker itself still ends it, as its parent does at exit.
    """
    os.setpgid(0, 0)


def pair_loader(
    reader: PairRows,
    sampler: PairSampler,
    *,
    workers: int = 0,
    dtype: torch.dtype | None = torch.float32,
    pin_memory: bool = False,
    context: str | None = None,
    on_skip: Callable[[str], None] | None = None,
) -> Iterator[PairBatch]:
    """The sampler's endless batches, read ahead by `workers` processes (0: in this one).

    dtype: of noise and latent, None as stored. pin_memory: page-locked, for copies to a GPU that overlap its
    work. context: how workers start, "fork" or "spawn". on_skip: told once of each damaged file whose rows a
    reader with `skip_bad` replaces; logged as a warning if None. Errors of workers are raised here, as the one
    line they are.
    """
    loader: DataLoader[Any] = DataLoader(
        _Answers(PairDataset(reader, dtype), sampler.block),
        sampler=_Ahead(sampler),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        multiprocessing_context=context if workers else None,
        worker_init_fn=_apart if workers else None,
    )
    known: set[str] = set()
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        for file, reason in batch.skipped.items():
            if file not in known:
                known.add(file)
                (on_skip or _log_warning)(
                    f"{file}: {reason}; its rows are replaced by those of the next sound shard"
                )
        yield batch


def _log_warning(text: str) -> None:
    logger.warning(text, extra=EVERY_RANK)
