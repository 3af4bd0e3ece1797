"""Improved precision and recall, density and coverage: fidelity and diversity by nearest neighbours."""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """Fractions in [0, 1]; density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, *, k: int, chunk: int = 1024) -> Neighbours:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    real [N, D], fake [M, D]. A row's ball reaches to its k-th neighbour in its own set, itself not counted.
    Precision: the share of fakes inside some real ball; recall: of reals inside some fake ball. Raises
    UserError unless both sets have more than k rows.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(
            f"precision and recall with k = {k} need more than {k} images, got {len(real)} and {len(fake)}"
        )
    centre = real.double().mean(0)  # distances from dot products lose digits far from the origin
    real, fake = real.double() - centre, fake.double() - centre
    radius_real, radius_fake = _radii(real, k, chunk), _radii(fake, k, chunk)
    balls = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    recalled, covered = 0, 0
    for start in range(0, len(real), chunk):
        squared = _squared(real[start : start + chunk], fake)
        inside = squared <= radius_real[start : start + chunk, None]
        balls += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((squared <= radius_fake).any(1).sum())
    return Neighbours(
        precision=(balls > 0).double().mean().item(),
        recall=recalled / len(real),
        density=balls.sum().item() / (k * len(fake)),
        coverage=covered / len(real),
    )


def _radii(rows: Tensor, k: int, chunk: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row."""
    radii = []
    for start in range(0, len(rows), chunk):
        squared = _squared(rows[start : start + chunk], rows)
        own = torch.arange(len(squared), device=rows.device)
        squared[own, start + own] = torch.inf
        radii.append(squared.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [len(a), len(b)]."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)
