"""Pairs with the noise of other rows: a control experiment of the paper (supplement E)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from d2g.core.seeds import Stream, generator
from pairgen.store.dataset import PairRows
from pairgen.store.hdf5 import PairBatch
from pairgen.store.spec import StoreSpec


class RewiredReader:
    """Reads latents and prompts of a row, and the noise of another one.

    The first `rows` rows exchange their noise among themselves, by one random permutation of `seed`; the rows
    after them, which are held out, keep theirs.
    """

    def __init__(self, reader: PairRows, rows: int, seed: int) -> None:
        self.reader = reader
        permutation = torch.randperm(rows, generator=generator(seed, Stream.REWIRING)).numpy()
        self._noise_row = np.concatenate([permutation, np.arange(rows, len(reader))])

    @property
    def spec(self) -> StoreSpec:
        """The spec of the store."""
        return self.reader.spec

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, rows: Sequence[int], dtype: torch.dtype | None = torch.float32) -> PairBatch:
        """Read the rows at these positions like PairReader.read; `index` is that of the latents."""
        batch = self.reader.read(rows, dtype)
        other = self.reader.read(self._noise_row[list(rows)].tolist(), dtype)
        return replace(batch, noise=other.noise, skipped={**batch.skipped, **other.skipped})

    def prefetch(self, rows: Sequence[int], block: int = 1) -> None:
        """Announce positions that are read soon."""
        self.reader.prefetch(rows, block)
        self.reader.prefetch(self._noise_row[list(rows)].tolist())
