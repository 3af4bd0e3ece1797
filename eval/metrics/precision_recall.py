"""Improved precision and recall, density and coverage: fidelity and diversity by nearest neighbours."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2g.core.errors import UserError
from eval.metrics.distances import Block, Rows, blocks, reaches


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """Fractions in [0, 1]; density may exceed 1, and has a standard error: other fakes, the same balls."""

    precision: float
    recall: float
    density: float
    coverage: float
    density_error: float = field(default=0.0, compare=False)


def precision_recall(real: Tensor, fake: Tensor, *, k: int, chunk: int = 2048) -> Neighbours:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    real [N, D], fake [M, D]. A row's ball reaches to its k-th neighbour in its own set, itself not counted.
    Precision: the share of fakes inside some real ball; recall: of reals inside some fake ball. Memory is
    O(chunk^2) beside the rows. Raises UserError unless both sets have more than k rows.
    """
    return precision_recalls(real, fake, ks=(k,), chunk=chunk)[k]


def precision_recalls(
    real: Tensor, fake: Tensor, *, ks: tuple[int, ...], chunk: int = 2048
) -> dict[int, Neighbours]:
    """`precision_recall` at several k, at little more than the cost of one."""
    most = max(ks)
    if min(len(real), len(fake)) <= most:
        raise UserError(
            f"precision and recall with k = {most} need more than {most} images, "
            f"got {len(real)} and {len(fake)}"
        )
    centre = real.double().mean(0)
    a = Rows(real, centre)
    reach_a = reaches(a, ks, chunk)
    reach_b = reaches(Rows(fake, fake.double().mean(0)), ks, chunk)
    b = Rows(fake, centre)
    balls = torch.zeros(len(ks), len(fake), device=fake.device)  # float32 counts are exact up to 2^24
    covered, recalled = (torch.zeros(len(ks), len(real), dtype=torch.bool, device=real.device) for _ in "ab")
    for rows in blocks(len(real), chunk):
        for columns in blocks(len(fake), chunk):
            block = Block(a, rows, b, columns)
            for i in range(len(ks)):
                inside = block.within(reach_a[rows, i, None])
                balls[i, columns] += inside.float().sum(0)
                covered[i, rows] |= inside.any(1)
                recalled[i, rows] |= block.within(reach_b[None, columns, i]).any(1)
    return {
        k: Neighbours(
            precision=_share(balls[i] > 0),
            recall=_share(recalled[i]),
            density=balls[i].double().sum().item() / (k * len(fake)),
            coverage=_share(covered[i]),
            density_error=balls[i].double().std().item() / (k * len(fake) ** 0.5),
        )
        for i, k in enumerate(ks)
    }


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()
