"""Random access to the rows of a pair store, in a local folder or at a URL."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2g.core.errors import UserError
from pairgen.store.hdf5 import DamagedShard, IntArray, PairBatch, redraw_noise
from pairgen.store.shards import Damage, OpenShards, open_source
from pairgen.store.spec import StoreSpec, quarantined_rows, require_same_spec

HINTED = 1024  # blocks remembered as announced, so that they are announced once


class PairReader:
    """Random access to the rows of a pair store by position, 0 to len - 1, in the order of their pair index.

    In a complete store without quarantined rows, a row's position equals its pair index. An unfinished store
    can be read too. Opening reads the first 512 bytes of each shard. Header and index are checked before a
    shard's first row is read, and the checksum of each row whenever it is read. A reader can be used after a
    fork and can be pickled.

    folder: a path, or an fsspec URL such as `s3://bucket/pairs`. Shards of a URL are downloaded to the folder
    `cache` when they are needed. `cache_gib` limits that folder's size, 0 does not (`pairgen.store.remote`).

    skip_bad: replace a damaged row by the row at the same offset in the next shard, and report the damaged
    file in `skipped`. The replacement depends on the files alone; a batch's `index` names the pairs read.

    Raises UserError if the store's spec is not `expect`, and DamagedShard, here or in `read`, for damaged
    files. With `skip_bad`, `read` raises UserError if no shard has an intact row to replace a damaged one.

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
    >>> reader = PairReader(folder)
    >>> batch = reader.read([1, 0])
    >>> batch.latents.shape, batch.index.tolist()
    (torch.Size([2, 4, 8, 8]), [1, 0])
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
        # Open the store, and check the spec that the caller expects.
        self._source = open_source(folder, cache, cache_gib)
        self.spec = self._source.spec
        if expect is not None:
            require_same_spec(folder, self.spec, expect)
        self.skipped: dict[str, str] = {}
        """File -> damage, for the damaged files that this process has read; filled with `skip_bad` only."""
        # Damage that is visible without reading rows: raise it, or report it with `skip_bad`.
        damage = self._source.check()
        self._open = OpenShards(self._source, self._quarantined(damage), damage)
        for shard, reason in damage.items():
            self._report(shard, reason, self.skipped)
        # Rows of all present shards in order: shard number k holds positions _ends[k] to _ends[k + 1] - 1.
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
        """Number of shards present."""
        return len(self._shards)

    @property
    def gib(self) -> float:
        """Size in GiB of the shards present."""
        return self._source.size / 2**30

    @property
    def bounded(self) -> bool:
        """Whether `cache_gib` is too small to cache all shards at once."""
        return self._source.bounded

    @property
    def quarantined(self) -> list[int]:
        """Indices of the pairs that present shards lack because their latents were not finite."""
        return sorted(pair for pairs in self._open.quarantined.values() for pair in pairs)

    @property
    def complete(self) -> bool:
        """Whether every pair of the spec is present or quarantined."""
        return len(self) + len(self.quarantined) == self.spec.num_pairs

    def read(self, rows: Sequence[int], dtype: torch.dtype | None = torch.float32) -> PairBatch:
        """Read the rows at these positions, in this order; positions may repeat.

        dtype: of noise and latents [B, C, H, W]; None keeps the stored type. Raises IndexError for a position
        outside the store, DamagedShard and UserError as the class says.
        """
        # Translate each position to a shard and a row in it.
        position = np.asarray(rows, dtype=np.int64)
        if position.size and not (0 <= position.min() and position.max() < len(self)):
            raise IndexError(f"positions {position.min()} to {position.max()} of {len(self)} pairs")
        nth = np.searchsorted(self._ends, position, side="right") - 1
        row = position - self._ends[nth]
        # Rows are read straight into the arrays of the batch.
        shapes = self.spec.row_shapes
        values = {
            name: np.empty((len(position), *shapes[name]), self.spec.dtype) for name in self._open.value_names
        }
        text = [""] * len(position)
        skipped: dict[str, str] = {}
        # Read all rows; with skip_bad, move the damaged ones to the next shard and try again.
        todo, tries = np.arange(len(position)), 0
        while damage := self._read_into(nth, row, todo, values, text):
            for place in sorted(damage):
                self._report(int(self._shards[nth[place]]), damage[place], skipped)
            todo, tries = np.array(sorted(damage)), tries + 1
            if tries == len(self._shards):
                raise UserError(f"{self.folder}: no intact row for {len(todo)} pairs; {self._source.remedy}")
            nth[todo], row[todo] = self._next(nth[todo], row[todo])
        self.skipped = skipped | self.skipped
        # Replaced rows have other pair indices, so seeded noise is drawn for the pairs that were read.
        index = self._index(nth, row)
        tensors = {name: torch.from_numpy(out) for name, out in values.items()}
        noise = tensors["noise"] if "noise" in tensors else redraw_noise(self.spec, index.tolist())
        return PairBatch(
            noise=noise.to(dtype or noise.dtype),
            latents=tensors["latent"].to(dtype or noise.dtype),
            prompts=text,
            index=torch.from_numpy(index),
            skipped=skipped,
            condition=tensors["condition"].to(dtype or noise.dtype) if "condition" in tensors else None,
        )

    def prompts(self) -> list[str]:
        """The distinct prompts of all rows present, in order of first use."""
        distinct: dict[str, None] = {}
        # Shard by shard; damaged rows are reported like those of `read`.
        for number, count in enumerate(np.diff(self._ends).tolist()):
            nth, rows, text = np.full(count, number), np.arange(count), [""] * count
            damage = self._read_into(nth, rows, rows, {}, text)
            for place in sorted(damage):
                self._report(int(self._shards[number]), damage[place], self.skipped)
            distinct.update(dict.fromkeys(prompt for row, prompt in enumerate(text) if row not in damage))
        return list(distinct)

    def prefetch(self, rows: Sequence[int], block: int = 1) -> None:
        """Announce positions that are read soon, each together with its block of `block` positions.

        The operating system, or the cache of a URL, loads them in the background. It never changes results.
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
        # A block of positions may span several shards.
        for nth in range(first, last + 1):
            begin, end = int(self._ends[nth]), int(self._ends[nth + 1])
            if begin < end:
                low, high = max(start, begin) - begin, min(stop, end) - begin - 1
                self._open.hint(int(self._shards[nth]), low, high)

    def _quarantined(self, damage: dict[int, str]) -> dict[int, list[int]]:
        """The quarantined pairs of each shard that has a record. Adds unreadable shards to `damage`."""
        records = quarantined_rows(self._source.folder, self.spec)
        pairs: dict[int, list[int]] = {}
        for shard in sorted(records.keys() & set(self._source.shards)):
            pairs[shard] = sorted(int(row["index"]) for row in records[shard])
            try:
                if shard not in damage:
                    pairs[shard] = self._source.quarantined(shard, pairs[shard])
            except DamagedShard as error:
                damage[shard] = error.reason
        return pairs

    def _report(self, shard: int, reason: str, skipped: dict[str, str]) -> None:
        """Add a damaged shard to `skipped` if `skip_bad` is set; otherwise raise DamagedShard."""
        if not self.skip_bad:
            raise self._open.error(shard, reason)
        skipped.setdefault(self._source.name(shard), reason)

    def _next(self, nth: IntArray, row: IntArray) -> tuple[IntArray, IntArray]:
        """Return the same row offsets in the next shard that has rows."""
        rows = np.diff(self._ends)
        filled = np.flatnonzero(rows)
        nth = filled[np.searchsorted(filled, nth, side="right") % len(filled)]
        return nth, row % rows[nth]

    def _index(self, nth: IntArray, row: IntArray) -> IntArray:
        """Pair indices of these rows; in shards with quarantined pairs, rows skip those."""
        shard = self._shards[nth]
        index = shard * self.spec.shard_size + row
        # Where pairs are quarantined, row r is the r-th pair that is present.
        for number in sorted(self._open.quarantined.keys() & set(shard.tolist())):
            rows = self.spec.rows(number)
            present = np.setdiff1d(np.arange(rows.start, rows.stop), self._open.quarantined[number])
            index[shard == number] = present[row[shard == number]]
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
