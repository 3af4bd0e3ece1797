"""Streaming mean and covariance of features in float64, and the features themselves, in one small file."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core.errors import UserError
from core.seeds import generator


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What the features of a FeatureStats are features of. Distances need equal networks and resizing."""

    features: str
    features_sha256: str
    resize: str
    source: str


class FeatureStats:
    """Mean and covariance of rows in any batches (Chan et al. 1979, float64), and the rows in fp32."""

    def __init__(self, dim: int, origin: Origin) -> None:
        self.origin = origin
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self._rows: list[Tensor] = []

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """[D, D] float64, divided by count - 1. Needs two rows."""
        if self.count < 2:
            raise UserError(f"{self.origin.source}: {self.count} image(s); a covariance needs at least 2")
        return self._scatter / (self.count - 1)

    @property
    def rows(self) -> Tensor:
        """The kept features [N, D] fp32; N < count after a load of a file saved with fewer."""
        return torch.cat(self._rows) if self._rows else torch.empty(0, self.dim)

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """`count` kept rows chosen at random (all of them, in order, for 0 or when there are no more)."""
        rows = self.rows
        if count in (0, len(rows)) or count > len(rows):
            return rows
        chosen = torch.randperm(len(rows), generator=generator(seed, len(rows)))[:count]
        return rows[chosen.sort().values]

    def update(self, features: Tensor) -> None:
        """Add rows [B, D]. Raises UserError when one is not finite."""
        if not torch.isfinite(features).all():
            raise UserError(
                f"{self.origin.source}: features are not finite; look for broken images or weights"
            )
        rows = features.detach().to("cpu", torch.float64)
        mean = rows.mean(0)
        centred = rows - mean
        self._combine(len(rows), mean, centred.T @ centred)
        self._rows.append(features.detach().to("cpu", torch.float32))

    def merge(self, other: "FeatureStats") -> None:
        """Add what another FeatureStats of the same features has seen."""
        assert self.dim == other.dim
        self._combine(other.count, other.mean, other._scatter)
        self._rows += other._rows

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def save(self, file: str | Path, *, keep: int = 0) -> None:
        """Write a .safetensors file with `keep` random feature rows (0: all), whole or not at all."""
        from safetensors.torch import save_file

        names = ("features", "features_sha256", "resize", "source")
        facts = {name: getattr(self.origin, name) for name in names} | {"count": self.count}
        tensors = {"mean": self.mean, "covariance": self.covariance, "rows": self.sample(keep)}
        partial = Path(f"{file}.tmp")
        save_file(tensors, partial, {"feature_stats": json.dumps(facts, sort_keys=True)})
        os.replace(partial, file)

    @classmethod
    def load(cls, file: str | Path) -> "FeatureStats":
        """Read what `save` wrote. Raises UserError for a missing, damaged or foreign file."""
        from safetensors import SafetensorError, safe_open

        if not Path(file).is_file():
            raise UserError(f"{file}: no such statistics file; make one with `d2g eval stats`")
        try:
            with safe_open(str(file), "pt") as tensors:
                facts = json.loads((tensors.metadata() or {})["feature_stats"])
                mean, covariance, rows = (tensors.get_tensor(name) for name in ("mean", "covariance", "rows"))
            count = int(facts.pop("count"))
            stats = cls(len(mean), Origin(**facts))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file} is no feature statistics file ({error}); make it with `d2g eval stats`"
            ) from error
        stats._combine(count, mean, covariance * (count - 1))
        stats._rows = [rows]
        return stats
