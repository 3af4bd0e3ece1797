"""Streaming mean and covariance of features in float64, and the features themselves."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.seeds import generator

UPDATE_ROWS = 1024
"""Rows per covariance update. Large blocks are fast; a fixed size makes results independent of batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where the features of a FeatureStats come from. Distances need equal networks and preprocessing."""

    features: str
    features_sha256: str
    resize: str
    source: str


class FeatureStats:
    """Mean and covariance in float64 of rows in batches of any size (Chan et al. 1979), and the rows in fp32.

    Rows may carry the index of their image. Then `rows` is sorted by index, so that a random subset does not
    depend on which process saw which image.
    """

    def __init__(self, dim: int, origin: Origin) -> None:
        self.origin = origin
        self._count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self._pending: list[Tensor] = []
        self._waiting = 0
        self._rows: list[Tensor] = []
        self._indices: list[Tensor] = []

    @property
    def dim(self) -> int:
        return len(self._mean)

    @property
    def count(self) -> int:
        """Number of rows."""
        return self._count + self._waiting

    @property
    def mean(self) -> Tensor:
        """[D] float64."""
        self._settle()
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """[D, D] float64, divided by count - 1; its rank is at most count - 1. Needs two rows."""
        self._settle()
        if self.count < 2:
            raise UserError(f"{self.origin.source}: {self.count} image(s); a covariance needs at least 2")
        return self._scatter / (self.count - 1)

    @property
    def rows(self) -> Tensor:
        """The features [N, D] fp32; N < count where a file keeps only a subset (`tensors`)."""
        rows = torch.cat(self._rows) if self._rows else torch.empty(0, self.dim)
        return rows[torch.cat(self._indices).argsort()] if self._indices else rows

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """A random subset of `count` rows; all rows, in order, for 0 or when there are not more."""
        rows = self.rows
        if count in (0, len(rows)) or count > len(rows):
            return rows
        numbers = torch.randperm(len(rows), generator=generator(seed, len(rows)))[:count]
        return rows[numbers.sort().values]

    def update(self, features: Tensor, indices: Tensor | None = None) -> None:
        """Add rows [B, D] of the images `indices` [B]. Raises UserError when a value is not finite."""
        if not torch.isfinite(features).all():
            raise UserError(
                f"{self.origin.source}: features are not finite; look for broken images or weights"
            )
        if self._rows:
            assert (indices is not None) == bool(self._indices), "give every batch its indices or none"
        if indices is not None:
            assert indices.shape == features.shape[:1], (indices.shape, features.shape)
            self._indices.append(indices.to("cpu", torch.int64))
        # Rows are kept in fp32; moments are accumulated in fp64.
        self._rows.append(features.detach().to("cpu", torch.float32))
        self._pending.append(features.detach().to("cpu", torch.float64))
        self._waiting += len(features)
        if self._waiting >= UPDATE_ROWS:
            rows = torch.cat(self._pending)
            # Only whole blocks are added; the rest waits.
            complete = len(rows) // UPDATE_ROWS * UPDATE_ROWS
            for block in rows[:complete].split(UPDATE_ROWS):
                self._add(block)
            self._pending, self._waiting = [rows[complete:].clone()], len(rows) - complete

    def merge(self, other: "FeatureStats") -> None:
        """Add the rows of another FeatureStats of the same features."""
        assert self.dim == other.dim
        assert not (self._rows and other._rows) or bool(self._indices) == bool(other._indices)
        other._settle()
        self._settle()
        self._combine(other._count, other._mean, other._scatter)
        self._rows += other._rows
        self._indices += other._indices

    def gather(self) -> "FeatureStats":
        """The statistics and rows of all processes, merged in rank order, on every process.

        With several processes, all rows need the indices of their images.
        """
        if process_group.world_size() == 1:
            return self
        self._settle()
        assert not self._rows or self._indices, "rows of several processes need their images' indices"
        indices = torch.cat(self._indices) if self._indices else torch.empty(0, dtype=torch.int64)
        rows = torch.cat(self._rows) if self._rows else torch.empty(0, self.dim)
        # Exchange counts, moments and rows.
        counts = torch.cat(process_group.gather(torch.tensor([self._count])))
        parts = (
            process_group.gather(part) for part in (self._mean[None], self._scatter[None], rows, indices)
        )
        # Merge in rank order, so that every process has the same sums.
        merged = FeatureStats(self.dim, self.origin)
        for count, mean, scatter, part, numbers in zip(counts.tolist(), *parts, strict=True):
            merged._combine(count, mean[0], scatter[0])
            merged._rows.append(part)
            merged._indices.append(numbers)
        indices = torch.cat(merged._indices)
        assert len(indices.unique()) == len(indices), "an image was measured twice"
        return merged

    def _settle(self) -> None:
        """Add the rows that wait for a whole block."""
        rows = torch.cat(self._pending) if self._pending else torch.empty(0, self.dim)
        self._pending, self._waiting = [], 0
        if len(rows):
            self._add(rows)

    def _add(self, rows: Tensor) -> None:
        mean = rows.mean(0)
        centered = (rows - mean).numpy()
        # NumPy notices that both factors are one matrix and computes one triangle only (dsyrk).
        self._combine(len(rows), mean, torch.from_numpy(centered.T @ centered))

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if count == 0:
            return
        total = self._count + count
        delta = mean - self._mean
        self._scatter.add_(scatter).addr_(delta, delta, alpha=self._count * count / total)
        # Not in place: a caller may have a reference to the mean.
        self._mean = self._mean + delta * (count / total)
        self._count = total

    def tensors(self, keep: int = 0) -> dict[str, Tensor]:
        """Mean, covariance and `keep` random rows (0: all) to save; `restored` is the inverse."""
        return {"mean": self.mean, "covariance": self.covariance, "rows": self.sample(keep)}

    @classmethod
    def restored(cls, origin: Origin, count: int, tensors: Mapping[str, Tensor]) -> "FeatureStats":
        """Rebuild from `tensors`. Raises KeyError or ValueError for anything else."""
        stats = cls(len(tensors["mean"]), origin)
        if tensors["covariance"].shape != (stats.dim, stats.dim) or tensors["rows"].shape[1:] != (stats.dim,):
            raise ValueError("mean, covariance and rows are of different widths")
        stats._combine(count, tensors["mean"], tensors["covariance"] * (count - 1))
        stats._rows = [tensors["rows"]]
        return stats
