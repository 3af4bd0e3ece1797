"""Batches of stored pairs in an order that is a function of (seed, images so far)."""

from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import DataLoader, Dataset, Sampler

from core import dist
from core.errors import UserError
from core.shuffle import permuted_batch
from pairgen.reader import PairReader
from pairgen.store import PairBatch


class PairRows(Dataset[PairBatch | UserError]):
    """A pair store indexed by lists of rows. Opened lazily in each worker, never before a fork.

    A damaged shard's error is returned: raised in a worker, it would arrive wrapped in a traceback.
    """

    def __init__(self, reader: PairReader) -> None:
        self.reader = reader

    def __getitem__(self, rows: list[int]) -> PairBatch | UserError:
        try:
            return self.reader.read(rows)
        except UserError as error:
            return error


AHEAD = 4096  # rows put in order at a time: a call takes about as long for one as for hundreds


class Rows(Sampler[list[int]]):
    """Endless batches of row numbers from image `start` on; each rank takes its slice of every global batch.

    Epochs are fresh permutations, so a resumed run reads what an unbroken one would, at any world size.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int) -> None:
        self.size, self.batch_size, self.seed, self.nimg = size, batch_size, seed, start

    def __iter__(self) -> Iterator[list[int]]:
        local = self.batch_size // dist.world_size()
        ahead = self.batch_size * max(1, AHEAD // self.batch_size)
        nimg = self.nimg
        while True:
            rows = permuted_batch(self.seed, self.size, nimg, ahead)
            for first in range(dist.rank() * local, ahead, self.batch_size):
                yield rows[first : first + local]
            nimg += ahead


def open_pairs(folder: str, teacher_sha256: str) -> PairReader:
    """The pairs of a run. Raises UserError for an empty or unfinished store, or one made by another
    teacher.
    """
    reader = PairReader(Path(folder))
    if not reader.complete:
        raise UserError(
            f"{folder} holds {len(reader)} of {reader.spec.num_pairs} pairs; "
            "run the same `d2g pairs generate` again to finish it"
        )
    if reader.spec.teacher_sha256 != teacher_sha256:
        raise UserError(
            f"{folder} was made by teacher {reader.spec.teacher} ({reader.spec.teacher_sha256[:12]}), "
            "--teacher has "
            f"sha256 {teacher_sha256[:12]}; give the teacher that made the pairs"
        )
    return reader


def pair_batches(
    reader: PairReader, batch_size: int, seed: int, start: int, workers: int
) -> Iterator[PairBatch]:
    """This rank's endless batches, read ahead by `workers` processes (0: in this one). UserError on
    damage.
    """
    loader = DataLoader(
        PairRows(reader),
        sampler=Rows(len(reader), batch_size, seed, start),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
