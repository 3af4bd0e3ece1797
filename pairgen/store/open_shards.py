"""The shards that a reader has open: checked once, read by chunk, each value against its checksum."""

import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2g.core.errors import UserError
from pairgen.store.hdf5 import DamagedShard, ShardMap, damaged, map_shard
from pairgen.store.hdf5_chunks import I64, U8, Descriptor, fletcher32, hint, read_chunk, read_chunks
from pairgen.store.source import Source

OPEN_FILES = 128
BOUNDED_FILES = 8  # of shards that make room for others: a file keeps its room as long as it is open
TEXT_CHUNKS = 256  # of decoded prompts that are kept

Bad = dict[int, str]  # place in a batch -> why its row cannot be trusted


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one open shard [K], and the places in the batch where they go [K]."""

    shard: int
    map: ShardMap
    file: Descriptor
    row: I64
    where: I64


class OpenShards:
    """Opens a source's shards when they are needed, a bounded number. May cross a fork or be pickled.

    aside: shard -> the pairs that it must lack, because they are quarantined.
    """

    def __init__(self, source: Source, aside: dict[int, list[int]], bad: dict[int, str]) -> None:
        self.source, self.aside, self.bad = source, aside, bad
        self._maps: dict[int, tuple[ShardMap, tuple[int, int, int]]] = {}
        self._forget()

    def _forget(self) -> None:
        self._files: OrderedDict[int, Descriptor] = OrderedDict()
        self._texts: OrderedDict[tuple[int, int], list[str]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_files", "_texts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def part(self, shard: int, row: I64, where: I64) -> Part:
        """Rows of a shard. Raises DamagedShard when it cannot be trusted as a whole."""
        file = self._files.pop(shard, None) or self._open(shard)  # threads may meet here
        self._files[shard] = file
        if len(self._files) > (BOUNDED_FILES if self.source.bounded else OPEN_FILES):
            self._files.popitem(last=False)
        return Part(shard, self._maps[shard][0], file, row, where)

    def error(self, shard: int, reason: str) -> DamagedShard:
        """The error that names a shard, what is wrong, and the remedy."""
        return damaged(self.source.name(shard), reason, self.source.remedy)

    def hint(self, shard: int, first: int, last: int) -> None:
        """Announce rows `first` to `last` of a shard. Damaged or out of reach: reading will say so."""
        try:
            if shard in self.bad or not self.source.bring(shard):
                return
            part = self.part(shard, np.empty(0, np.int64), np.empty(0, np.int64))
        except UserError:
            return
        for chunks in part.map.values.values():
            hint(part.file, chunks, first // chunks.rows, last // chunks.rows)

    def _open(self, shard: int) -> Descriptor:
        """Open a shard, and check it unless it is the very file that was checked before."""
        if shard in self.bad:
            raise self.error(shard, self.bad[shard])
        try:
            file = self.source.open(shard)
            found = os.fstat(file.number)
            identity = (found.st_ino, found.st_size, found.st_mtime_ns)
            if shard not in self._maps or self._maps[shard][1] != identity:
                self._maps[shard] = self._map(shard, file), identity
        except DamagedShard as error:
            self.bad[shard] = error.reason
            raise self.error(shard, error.reason) from error
        except OSError as error:
            self.bad[shard] = f"unreadable ({error.strerror})"
            raise self.error(shard, self.bad[shard]) from error
        return file

    def _map(self, shard: int, file: Descriptor) -> ShardMap:
        found = map_shard(file, Path(self.source.name(shard)), self.source.spec, shard)
        if list(found.quarantined) != (expected := self.aside.get(shard, [])):
            reason = f"sets pairs {list(found.quarantined)} aside, the record in quarantine/ says {expected}"
            raise self.error(shard, reason)
        return found

    def read_text(self, part: Part, text: list[str]) -> Bad:
        """Prompts, or labels in decimal, to text[part.where]; empty without either."""
        bad: Bad = {}
        if (chunks := part.map.column) is None:
            return bad
        for chunk in np.unique(part.row // chunks.rows).tolist():
            inside = part.row // chunks.rows == chunk
            where, row = part.where[inside].tolist(), (part.row[inside] % chunks.rows).tolist()
            try:
                column = self._column(part, chunk)
            except (OSError, ValueError, zlib.error) as error:
                bad |= dict.fromkeys(where, f"unreadable (prompts: {error})")
                continue
            for place, number in zip(where, row, strict=True):
                text[place] = column[number]
        return bad

    def _column(self, part: Part, chunk: int) -> list[str]:
        column = self._texts.pop((part.shard, chunk), None)
        if column is None:
            assert part.map.column is not None
            values = np.frombuffer(read_chunk(part.file, part.map.column, chunk), part.map.column_type)
            text = values.dtype.kind == "S"
            column = [value.decode() if text else str(value) for value in values.tolist()]
        self._texts[part.shard, chunk] = column
        if len(self._texts) > TEXT_CHUNKS:
            self._texts.popitem(last=False)
        return column


def read_values(parts: Sequence[Part], name: str, out: U8) -> Bad:
    """Rows of dataset `name` to out[part.where] [B, row bytes]; a row is bad with the chunk that holds it."""
    bad: Bad = {}
    sums = np.zeros(len(out), "<u4")
    single: list[Part] = []
    for part in parts:
        chunks = part.map.values[name]
        if chunks.rows == 1:  # straight to where they go, all checked together below
            failed = read_chunks(part.file, chunks.place(part.row)[0], part.where, out, sums)
            bad |= dict.fromkeys(part.where[failed].tolist(), f"unreadable ({name} is cut short)")
            single.append(part)
        else:
            bad |= _read_shared(part, name, out)
    if single:
        where = np.concatenate([part.where for part in single])
        every = len(where) == len(out)
        wrong = fletcher32(out) != sums if every else fletcher32(out[where]) != sums[where]
        for place in (np.flatnonzero(wrong) if every else where[wrong]).tolist():
            bad.setdefault(place, _mismatch(name))
    return bad


def _read_shared(part: Part, name: str, out: U8) -> Bad:
    """Rows of chunks that hold several: each chunk is read and checked once."""
    chunks = part.map.values[name]
    chunk, slot = np.unique(part.row // chunks.rows, return_inverse=True)
    data = np.empty((len(chunk), chunks.rows * out.shape[1]), np.uint8)
    sums = np.zeros(len(chunk), "<u4")
    failed = read_chunks(part.file, chunks.place(chunk)[0], np.arange(len(chunk)), data, sums)
    wrong = fletcher32(data) != sums
    wrong[failed] = True
    out[part.where] = data.reshape(len(chunk), chunks.rows, -1)[slot, part.row % chunks.rows]
    return dict.fromkeys(part.where[wrong[slot]].tolist(), _mismatch(name))


def _mismatch(name: str) -> str:
    return f"unreadable ({name} does not match its checksum)"
