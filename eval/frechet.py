"""Distances between two sets of features: Frechet (FID) and kernel (KID)."""

from dataclasses import dataclass

import torch
from torch import Tensor


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) in float64 (Heusel et al. 2017, eq. 6). Means [D], covs
    [D, D].

    tr (A B)^(1/2) is taken as the sum of the square roots of the eigenvalues of A^(1/2) B A^(1/2), which is
    symmetric: no complex parts, and singular covariances (fewer images than features) need no offset.
    """
    a, b = cov_a.double(), cov_b.double()
    root = _root(a)
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a.double() - mean_b.double()).square().sum() + a.trace() + b.trace() - 2 * cross
    return max(float(distance), 0.0)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelDistance:
    """Mean over random subsets of the unbiased squared MMD, and its standard error."""

    mean: float
    standard_error: float


def kernel_distance(
    a: Tensor, b: Tensor, generator: torch.Generator, *, subsets: int = 100, size: int = 1000
) -> KernelDistance:
    """KID (Binkowski et al. 2018) of a [N, D] and b [M, D]: unbiased MMD^2 on random subsets.

    The kernel is (x.y / D + 1)^3.
    """
    size = min(size, len(a), len(b))
    assert size >= 2, "the unbiased estimate needs two rows on either side"
    values = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size]].double()
        y = b[torch.randperm(len(b), generator=generator)[:size]].double()
        values[i] = _mmd(x, y)
    error = values.std().item() / subsets**0.5 if subsets > 1 else float("inf")
    return KernelDistance(mean=values.mean().item(), standard_error=error)


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    n = len(x)
    xx, yy, xy = (((p @ q.T) / x.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return within - 2 * xy.mean()
