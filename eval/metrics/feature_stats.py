"""Streaming mean and covariance of features in float64, and the features themselves."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.seeds import generator

UPDATE_ROWS = 1024
"""Rows per rank-k update: larger blocks multiply faster, and fixed ones make batches of any size agree."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What the features of a FeatureStats are features of. Distances need equal networks and resizing."""

    features: str
    features_sha256: str
    resize: str
    source: str


class FeatureStats:
    """Mean and covariance of rows in any batches (Chan et al. 1979, float64), and the rows in fp32.

    Rows may carry their image's index. Then `rows` is sorted by it, so that samplers of rows draw the same
    ones whichever process saw which image.
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
        """Rows seen."""
        return self._count + self._waiting

    @property
    def mean(self) -> Tensor:
        """[D] float64."""
        self._settle()
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """[D, D] float64, divided by count - 1: of rank count - 1 at most. Needs two rows."""
        self._settle()
        if self.count < 2:
            raise UserError(f"{self.origin.source}: {self.count} image(s); a covariance needs at least 2")
        return self._scatter / (self.count - 1)

    @property
    def rows(self) -> Tensor:
        """The kept features [N, D] fp32; N < count where `tensors` kept fewer."""
        rows = torch.cat(self._rows) if self._rows else torch.empty(0, self.dim)
        return rows[torch.cat(self._indices).argsort()] if self._indices else rows

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """`count` kept rows chosen at random (all of them, in order, for 0 or when there are no more)."""
        rows = self.rows
        if count in (0, len(rows)) or count > len(rows):
            return rows
        chosen = torch.randperm(len(rows), generator=generator(seed, len(rows)))[:count]
        return rows[chosen.sort().values]

    def update(self, features: Tensor, indices: Tensor | None = None) -> None:
        """Add rows [B, D] of the images `indices` [B]. Raises UserError when one is not finite."""
        if not torch.isfinite(features).all():
            raise UserError(
                f"{self.origin.source}: features are not finite; look for broken images or weights"
            )
        if self._rows:
            assert (indices is not None) == bool(self._indices), "give every batch its indices or none"
        if indices is not None:
            assert indices.shape == features.shape[:1], (indices.shape, features.shape)
            self._indices.append(indices.to("cpu", torch.int64))
        self._rows.append(features.detach().to("cpu", torch.float32))
        self._pending.append(features.detach().to("cpu", torch.float64))
        self._waiting += len(features)
        if self._waiting >= UPDATE_ROWS:
            rows = torch.cat(self._pending)
            whole = len(rows) // UPDATE_ROWS * UPDATE_ROWS
            for block in rows[:whole].split(UPDATE_ROWS):
                self._add(block)
            self._pending, self._waiting = [rows[whole:].clone()], len(rows) - whole

    def merge(self, other: "FeatureStats") -> None:
        """Add what another FeatureStats of the same features has seen."""
        assert self.dim == other.dim
        assert not (self._rows and other._rows) or bool(self._indices) == bool(other._indices)
        other._settle()
        self._settle()
        self._combine(other._count, other._mean, other._scatter)
        self._rows += other._rows
        self._indices += other._indices

    def gather(self) -> "FeatureStats":
        """All processes' statistics and rows, merged in rank order on every process.

        Every process must give its rows their images' indices, or there must be one process only.
        """
        if process_group.world_size() == 1:
            return self
        self._settle()
        assert not self._rows or self._indices, "rows of several processes need their images' indices"
        indices = torch.cat(self._indices) if self._indices else torch.empty(0, dtype=torch.int64)
        rows = torch.cat(self._rows) if self._rows else torch.empty(0, self.dim)
        counts = torch.cat(process_group.gather(torch.tensor([self._count])))
        parts = (
            process_group.gather(part) for part in (self._mean[None], self._scatter[None], rows, indices)
        )
        merged = FeatureStats(self.dim, self.origin)
        for count, mean, scatter, part, numbers in zip(counts.tolist(), *parts, strict=True):
            merged._combine(count, mean[0], scatter[0])
            merged._rows.append(part)
            merged._indices.append(numbers)
        seen = torch.cat(merged._indices)
        assert len(seen.unique()) == len(seen), "an image was measured twice"
        return merged

    def _settle(self) -> None:
        """Count what waits for a whole block."""
        rows = torch.cat(self._pending) if self._pending else torch.empty(0, self.dim)
        self._pending, self._waiting = [], 0
        if len(rows):
            self._add(rows)

    def _add(self, rows: Tensor) -> None:
        mean = rows.mean(0)
        centred = (rows - mean).numpy()
        # NumPy sees that the factors are one matrix and computes one triangle (dsyrk); PyTorch both.
        self._combine(len(rows), mean, torch.from_numpy(centred.T @ centred))

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if count == 0:
            return
        total = self._count + count
        delta = mean - self._mean
        self._scatter.add_(scatter).addr_(delta, delta, alpha=self._count * count / total)
        # Not in place: a caller may hold the mean.
        self._mean = self._mean + delta * (count / total)
        self._count = total

    def tensors(self, keep: int = 0) -> dict[str, Tensor]:
        """Mean, covariance and `keep` random rows (0: all), for a file; `restored` takes them back."""
        return {"mean": self.mean, "covariance": self.covariance, "rows": self.sample(keep)}

    @classmethod
    def restored(cls, origin: Origin, count: int, tensors: Mapping[str, Tensor]) -> "FeatureStats":
        """What `tensors` gave. Raises KeyError or ValueError for others."""
        stats = cls(len(tensors["mean"]), origin)
        if tensors["covariance"].shape != (stats.dim, stats.dim) or tensors["rows"].shape[1:] != (stats.dim,):
            raise ValueError("mean, covariance and rows are of different widths")
        stats._combine(count, tensors["mean"], tensors["covariance"] * (count - 1))
        stats._rows = [tensors["rows"]]
        return stats
