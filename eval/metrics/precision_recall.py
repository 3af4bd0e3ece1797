"""Precision and recall, density and coverage: fidelity and diversity by nearest neighbors."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2g.core.errors import UserError
from eval.metrics.distances import CenteredRows, DistanceBlock, blocks, kth_neighbor_distances


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionRecall:
    """Values in [0, 1]; density may exceed 1.

    density_error: standard error of the density over other fake rows, with the real rows fixed.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    density_error: float = field(default=0.0, compare=False)


def precision_recall(real: Tensor, fake: Tensor, *, k: int, chunk: int = 2048) -> PrecisionRecall:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    `real` [N, D], `fake` [M, D]. The ball around a row reaches to its k-th nearest neighbor in its own set,
    the row itself not counted. Precision is the share of fake rows inside some real ball, recall the share of
    real rows inside some fake ball. Needs O(chunk^2) memory beside the rows. Raises UserError unless both
    sets have more than k rows, and for rows that are not finite.

    >>> import torch
    >>> real = torch.arange(10.0)[:, None]
    >>> values = precision_recall(real, torch.full((10, 1), 4.5), k=3)  # a collapsed generator
    >>> values.precision, values.recall
    (1.0, 0.0)
    """
    return precision_recalls(real, fake, ks=(k,), chunk=chunk)[k]


def precision_recalls(
    real: Tensor, fake: Tensor, *, ks: tuple[int, ...], chunk: int = 2048
) -> dict[int, PrecisionRecall]:
    """Compute `precision_recall` at several k, for little more than the cost of one. Returns values by k."""
    largest = max(ks)
    if min(len(real), len(fake)) <= largest:
        raise UserError(
            f"precision and recall with k = {largest} need more than {largest} images, "
            f"got {len(real)} and {len(fake)}"
        )
    for side, features in (("real", real), ("generated", fake)):
        if len(broken := (~features.isfinite()).any(1).nonzero()):
            raise UserError(
                f"row {int(broken[0])} of the {side} features is not finite; look for a broken image or "
                "broken weights"
            )
    # Squared radii of the balls of both sets, each set centered around its own mean.
    center = real.double().mean(0)
    real_rows = CenteredRows(real, center)
    real_radius = kth_neighbor_distances(real_rows, ks, chunk)
    fake_radius = kth_neighbor_distances(CenteredRows(fake, fake.double().mean(0)), ks, chunk)

    # Compare the sets block by block, around one common center. Count the real balls around each fake row. Of
    # each real row, note whether its ball contains a fake row, and whether it lies in a fake ball.
    fake_rows = CenteredRows(fake, center)
    balls = torch.zeros(len(ks), len(fake), device=fake.device)  # float32 counts are exact up to 2^24
    covered, recalled = (torch.zeros(len(ks), len(real), dtype=torch.bool, device=real.device) for _ in "ab")
    for rows in blocks(len(real), chunk):
        for columns in blocks(len(fake), chunk):
            block = DistanceBlock(real_rows, rows, fake_rows, columns)
            for i in range(len(ks)):
                inside = block.within(real_radius[rows, i, None])
                balls[i, columns] += inside.float().sum(0)
                covered[i, rows] |= inside.any(1)
                recalled[i, rows] |= block.within(fake_radius[None, columns, i]).any(1)
    return {
        k: PrecisionRecall(
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
