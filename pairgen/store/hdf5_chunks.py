"""HDF5 chunks without HDF5: where a dataset's chunks lie in its file, their bytes, their Fletcher-32.

HDF5 tells once where the chunks are (`pairgen.store.hdf5.map_shard`). Reading them here takes no global lock,
holds no handle that a fork breaks, and checks many chunks at once: random rows come several times as fast.
"""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

SUM = 4  # bytes of the checksum behind each chunk
LINE = 256  # 64-bit words: chunks are summed along lines of them and across
CHECKED = 1 << 18  # bytes summed at a time: what a core's cache holds three times
VECTORS = 512  # chunks of one preadv, two vectors each: IOV_MAX is 1024
HINT = 1 << 17  # Linux reads ahead no more than its window for one call, 128 KiB unless set otherwise
LANES = np.uint64(0x0000FFFF0000FFFF)
MODULUS = np.uint64(65535)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunks:
    """Where the chunks of one dataset lie: a few runs of chunks of one size, one behind the other."""

    rows: int  # of a chunk
    deflated: bool
    first: I64  # [R] number of each run's first chunk
    offset: I64  # [R] where that stands in the file
    size: I64  # [R] stored bytes of each chunk of the run, checksum included

    @classmethod
    def of(cls, rows: int, deflated: bool, offset: Sequence[int], size: Sequence[int]) -> "Chunks":
        """From each chunk's place, in order of chunk."""
        at, long = np.asarray(offset, np.int64), np.asarray(size, np.int64)
        starts = np.ones(len(at), bool)
        starts[1:] = (at[1:] != at[:-1] + long[:-1]) | (long[1:] != long[:-1])
        first = np.flatnonzero(starts)
        return cls(rows=rows, deflated=deflated, first=first, offset=at[first], size=long[first])

    def place(self, chunk: I64) -> tuple[I64, I64]:
        """Offset and stored size of chunks [K], each [K]."""
        run = np.searchsorted(self.first, chunk, side="right") - 1
        return self.offset[run] + (chunk - self.first[run]) * self.size[run], self.size[run]


class Descriptor:
    """An open file that closes when nobody holds it. Reads name their offset: threads and forks share it."""

    __slots__ = ("number",)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def fletcher32(data: U8) -> U32:
    """HDF5's Fletcher-32 of each row of `data` [K, n]: [K].

    With 16-bit words w_0 ... w_(m-1): low half sum(w_i), high half sum((m - i) w_i), both modulo 65535, which
    only words that are all zero leave at 0. HDF5 takes words as big-endian; to swap bytes is * 256 here.
    """
    count, size = data.shape
    lines = -(-size // (8 * LINE))  # 64-bit words 4j ... 4j + 3 of 16 bits, LINE of them to a line
    if size != lines * 8 * LINE or not data.flags.c_contiguous:
        padded = np.zeros((count, lines * 8 * LINE), np.uint8)
        padded[:, :size] = data
        data = padded
    four = data.view("<u8").reshape(count, lines, LINE)
    along = np.empty((count, lines), np.uint64)
    across, odd = np.empty((2, count, LINE), np.uint64)
    step = max(1, CHECKED // max(1, 8 * LINE * lines))
    scratch = np.empty((2, min(step, count), lines, LINE), np.uint64)
    for start in range(0, count, step):
        part, (singles, pairs) = slice(start, start + step), scratch[:, : count - start]
        np.bitwise_and(np.right_shift(four[part], np.uint64(16), out=singles), LANES, out=singles)
        np.add(np.bitwise_and(four[part], LANES, out=pairs), singles, out=pairs)
        np.add.reduce(singles, axis=1, out=odd[part])  # words 4j + 1, 4j + 3
        np.add.reduce(pairs, axis=1, out=across[part])  # 4j with 4j + 1, 4j + 2 with 4j + 3
        np.add.reduce(pairs, axis=2, out=along[part])
    number = np.arange(max(LINE, lines), dtype=np.uint64)
    by_line, by_column = _low(along) + _high(along), _low(across) + _high(across)
    total = by_line.sum(axis=1)
    place = (by_line * number[:lines]).sum(axis=1) * np.uint64(4 * LINE)
    place += (by_column * number[:LINE]).sum(axis=1) * np.uint64(4)
    place += (_low(odd) + _high(odd) + np.uint64(2) * _high(across)).sum(axis=1)
    weighted = np.uint64(-(-size // 2)) * total - place
    return (_folded(weighted) << np.uint64(16) | _folded(total)).astype(np.uint32)


def _low(pair: U64) -> U64:
    return pair & np.uint64(0xFFFFFFFF)


def _high(pair: U64) -> U64:
    return pair >> np.uint64(32)


def _folded(total: U64) -> U64:
    rest = total % MODULUS * np.uint64(256) % MODULUS
    return np.where((rest == 0) & (total > 0), MODULUS, rest)


def read_chunks(file: Descriptor, offset: I64, slot: I64, data: U8, sums: U32) -> list[int]:
    """The chunks at `offset` [K], bytes to data[slot] [N, n] and stored checksums to sums[slot] [N].

    Returns which of the K could not be read. Chunks that stand together in the file are read together.
    """
    size = data.shape[1]
    order = np.argsort(offset, kind="stable")
    places, slots = offset[order], slot[order].tolist()
    cuts = np.flatnonzero(np.diff(places) != size + SUM) + 1
    into = data.reshape(-1).data, sums.view(np.uint8).data
    failed: list[int] = []
    for begin, end in pairwise([0, *cuts.tolist(), len(slots)]):
        for start in range(begin, end, VECTORS):
            stop = min(end, start + VECTORS)
            if not _read(file, int(places[start]), slots[start:stop], size, *into):
                # Which one it is must not depend on its neighbours in the batch.
                alone = range(start, stop)
                failed += [
                    int(order[k]) for k in alone if not _read(file, int(places[k]), [slots[k]], size, *into)
                ]
    return failed


def _read(
    file: Descriptor, offset: int, slots: list[int], size: int, data: memoryview, sums: memoryview
) -> bool:
    vectors, expected = [], len(slots) * (size + SUM)
    for slot in slots:
        vectors += [data[slot * size : (slot + 1) * size], sums[slot * SUM : (slot + 1) * SUM]]
    try:
        if hasattr(os, "preadv"):
            return os.preadv(file.number, vectors, offset) == expected
        raw, start = os.pread(file.number, expected, offset), 0  # where the system has none: one copy more
        for vector in vectors if len(raw) == expected else []:
            vector[:] = raw[start : start + len(vector)]
            start += len(vector)
        return len(raw) == expected
    except OSError:
        return False


def read_chunk(file: Descriptor, chunks: Chunks, chunk: int) -> bytes:
    """The bytes of one chunk of any kind. Raises OSError or zlib.error when they are not as written."""
    (offset,), (size,) = chunks.place(np.array([chunk]))
    raw = os.pread(file.number, int(size), int(offset))
    stored = np.frombuffer(raw[-SUM:], "<u4")
    if len(raw) != size or fletcher32(np.frombuffer(raw[:-SUM], np.uint8)[None]) != stored:
        raise OSError("its bytes do not match their checksum")
    return zlib.decompress(raw[:-SUM]) if chunks.deflated else raw[:-SUM]


def hint(file: Descriptor, chunks: Chunks, first: int, last: int) -> None:
    """Tell the system that chunks `first` to `last` are read soon, where it can be told."""
    if not hasattr(os, "posix_fadvise"):
        return
    number = np.array([first, last])
    run_a, run_b = np.searchsorted(chunks.first, number, side="right") - 1
    starts = np.maximum(chunks.first[run_a : run_b + 1], first)
    ends = np.append(chunks.first[run_a + 1 : run_b + 1], last + 1)
    (begin, size), count = chunks.place(starts), ends - starts
    for at, length in zip(begin.tolist(), (count * size).tolist(), strict=True):
        for start in range(at, at + length, HINT):
            os.posix_fadvise(file.number, start, min(HINT, at + length - start), os.POSIX_FADV_WILLNEED)
