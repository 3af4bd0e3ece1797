"""Random access to the rows of a pair store: a folder, or a URL behind a local cache."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2g.core.errors import UserError
from pairgen.store.hdf5 import DamagedShard, IntArray, PairBatch, redraw
from pairgen.store.shards import Damage, OpenShards, open_source
from pairgen.store.spec import StoreSpec, quarantined_rows, require_same_spec

HINTED = 1024  # blocks that the system is not told of again


class PairReader:
    """Random access to the rows of a store, whole or not: positions 0 to len - 1 in order of pair index.

    In a complete store without quarantined rows a position is the pair's index. Opening reads 512 bytes a
    shard; its header and index are checked before its first row is read, every row whenever it is. A reader
    may cross a fork or be pickled to a worker.

    folder: a path, or an fsspec URL (`s3://bucket/pairs`), whose shards are copied to the folder `cache` as
    they are needed; `cache_gib` bounds it, 0 does not (`pairgen.store.remote`).

    skip_bad: for a row whose bytes are not what was written, give the row at the same offset of the next
    shard, and note the file in `skipped`. Which rows those are depends on the files alone; `index` says what
    was read.

    Raises UserError for a folder of another spec than `expect`, and DamagedShard, here or when reading, for
    what cannot be trusted; with `skip_bad` UserError when no shard has a sound row for a position.
    """

    def __init__(
        self,
        folder: Path | str,
        expect: StoreSpec | None = None,
        *,
        skip_bad: bool = False,
        cache: Path | str | None = None,
        cache_gib: float = 0.0,
    ) -> None:
        self.folder, self.skip_bad = folder, skip_bad
        self._source = open_source(folder, cache, cache_gib)
        self.spec = self._source.spec
        if expect is not None:
            require_same_spec(folder, self.spec, expect)
        self.skipped: dict[str, str] = {}
        """Damaged files that this process met, and why; with `skip_bad` only."""
        bad = self._source.check()
        self._open = OpenShards(self._source, self._quarantined(bad), bad)
        for shard, reason in bad.items():
            self._refuse(shard, reason, self.skipped)
        self._shards = np.array(self._source.shards, dtype=np.int64)
        missing = [len(self._open.quarantined.get(shard, [])) for shard in self._source.shards]
        rows = [len(self.spec.rows(shard)) for shard in self._source.shards]
        self._ends = np.cumsum([0, *rows]) - np.cumsum([0, *missing])
        self._hinted: OrderedDict[tuple[int, int], None] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hinted": OrderedDict()}

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shards(self) -> int:
        """Shards that are there."""
        return len(self._shards)

    @property
    def gib(self) -> float:
        """Size of the shards that are there."""
        return self._source.size / 2**30

    @property
    def bounded(self) -> bool:
        """Whether the cache is too small for copies of all shards."""
        return self._source.bounded

    @property
    def quarantined(self) -> list[int]:
        """Pairs that whole shards lack because the teacher gave no finite latent for them."""
        return sorted(pair for pairs in self._open.quarantined.values() for pair in pairs)

    @property
    def complete(self) -> bool:
        """Whether every pair of the spec is there, or quarantined."""
        return len(self) + len(self.quarantined) == self.spec.num_pairs

    def read(self, rows: Sequence[int], dtype: torch.dtype | None = torch.float32) -> PairBatch:
        """The rows at these positions, in this order, repeats allowed: noise and latent [B, C, H, W].

        dtype: of noise and latent; None leaves them as stored.
        """
        position = np.asarray(rows, dtype=np.int64)
        if position.size and not (0 <= position.min() and position.max() < len(self)):
            raise IndexError(f"positions {position.min()} to {position.max()} of {len(self)} pairs")
        nth = np.searchsorted(self._ends, position, side="right") - 1
        row = position - self._ends[nth]
        shape = (len(position), *self.spec.latent_shape)
        values = {name: np.empty(shape, self.spec.dtype) for name in self._open.value_names}
        text = [""] * len(position)
        skipped: dict[str, str] = {}
        todo, tries = np.arange(len(position)), 0
        while bad := self._read_into(nth, row, todo, values, text):
            for place in sorted(bad):
                self._refuse(int(self._shards[nth[place]]), bad[place], skipped)
            todo, tries = np.array(sorted(bad)), tries + 1
            if tries == len(self._shards):
                raise UserError(f"{self.folder}: no sound row for {len(todo)} pairs; {self._source.remedy}")
            nth[todo], row[todo] = self._next(nth[todo], row[todo])
        self.skipped = skipped | self.skipped
        index = self._index(nth, row)
        tensors = {name: torch.from_numpy(out) for name, out in values.items()}
        noise = tensors["noise"] if "noise" in tensors else redraw(self.spec, index.tolist())
        return PairBatch(
            noise=noise.to(dtype or noise.dtype),
            latents=tensors["latent"].to(dtype or noise.dtype),
            prompts=text,
            index=torch.from_numpy(index),
            skipped=skipped,
        )

    def prompts(self) -> list[str]:
        """The different prompts of the rows present, in order of first use."""
        found: dict[str, None] = {}
        for number, rows in enumerate(np.diff(self._ends).tolist()):
            nth, every, text = np.full(rows, number), np.arange(rows), [""] * rows
            bad = self._read_into(nth, every, every, {}, text)
            for place in sorted(bad):
                self._refuse(int(self._shards[number]), bad[place], self.skipped)
            found.update(dict.fromkeys(prompt for place, prompt in enumerate(text) if place not in bad))
        return list(found)

    def prefetch(self, rows: Sequence[int], block: int = 1) -> None:
        """Announce positions that will be read, and with each its whole block of `block` positions.

        The system, or the cache of a URL, brings them while other work goes on; values do not depend on it.
        """
        for number in dict.fromkeys((np.asarray(rows, dtype=np.int64) // block).tolist()):
            if (block, number) not in self._hinted:
                self._hint(number * block, min((number + 1) * block, len(self)))
            self._hinted.pop((block, number), None)
            self._hinted[block, number] = None
            if len(self._hinted) > HINTED:
                self._hinted.popitem(last=False)

    def _hint(self, start: int, stop: int) -> None:
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right") - 1
        for nth in range(first, last + 1):
            begin, end = int(self._ends[nth]), int(self._ends[nth + 1])
            if begin < end:
                low, high = max(start, begin) - begin, min(stop, end) - begin - 1
                self._open.hint(int(self._shards[nth]), low, high)

    def _quarantined(self, bad: dict[int, str]) -> dict[int, list[int]]:
        recorded = quarantined_rows(self._source.folder, self.spec)
        found: dict[int, list[int]] = {}
        for shard in sorted(recorded.keys() & set(self._source.shards)):
            found[shard] = sorted(int(row["index"]) for row in recorded[shard])
            try:
                if shard not in bad:
                    found[shard] = self._source.quarantined(shard, found[shard])
            except DamagedShard as error:
                bad[shard] = error.reason
        return found

    def _refuse(self, shard: int, reason: str, skipped: dict[str, str]) -> None:
        """Note a damaged shard in `skipped`, or raise DamagedShard."""
        if not self.skip_bad:
            raise self._open.error(shard, reason)
        skipped.setdefault(self._source.name(shard), reason)

    def _next(self, nth: IntArray, row: IntArray) -> tuple[IntArray, IntArray]:
        """The same offsets in the next shards that have rows."""
        rows = np.diff(self._ends)
        held = np.flatnonzero(rows)
        nth = held[np.searchsorted(held, nth, side="right") % len(held)]
        return nth, row % rows[nth]

    def _index(self, nth: IntArray, row: IntArray) -> IntArray:
        shard = self._shards[nth]
        index = shard * self.spec.shard_size + row
        for number in sorted(self._open.quarantined.keys() & set(shard.tolist())):
            rows = self.spec.rows(number)
            there = np.setdiff1d(np.arange(rows.start, rows.stop), self._open.quarantined[number])
            index[shard == number] = there[row[shard == number]]
        return index

    def _read_into(
        self, nth: IntArray, row: IntArray, todo: IntArray, values: dict[str, NDArray[Any]], text: list[str]
    ) -> Damage:
        """Read the places `todo` of the batch to values[name][place] and text[place]. Returns the damage."""
        damage: Damage = {}
        for number in np.unique(nth[todo]).tolist():
            places = todo[nth[todo] == number]
            shard = int(self._shards[number])
            try:
                damage |= self._open.get(shard).read_rows(row[places], places, values)
                damage |= self._open.read_text(shard, row[places], places, text)
            except DamagedShard as error:
                damage |= dict.fromkeys(places.tolist(), error.reason)
        return damage
