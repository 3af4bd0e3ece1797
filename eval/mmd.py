"""Kernel distances between two sets of features: KID and CMMD."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from core.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelDistance:
    """Mean over random subsets of the unbiased squared MMD, its standard error, and the subsets drawn.

    Subsets of the same rows overlap, so the error divides their deviation by the root of the number of
    subsets that would fit side by side, not of those drawn.
    """

    mean: float
    deviation: float
    standard_error: float
    subsets: int
    size: int


def kernel_distance(
    a: Tensor, b: Tensor, generator: torch.Generator, *, subsets: int = 100, size: int = 1000
) -> KernelDistance:
    """KID (Binkowski et al. 2018, section 4) of a [N, D] and b [M, D]: unbiased MMD^2 on random subsets.

    The kernel is (x.y / D + 1)^3. Sets of fewer than `size` rows are drawn whole, and `size` says so. Raises
    UserError for fewer than two rows on either side.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        raise UserError(f"a kernel distance needs two rows on either side, got {len(a)} and {len(b)}")
    values = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size]].double()
        y = b[torch.randperm(len(b), generator=generator)[:size]].double()
        values[i] = polynomial_mmd(x, y)
    deviation = values.std().item() if subsets > 1 else float("inf")
    apart = max(1, min(subsets, min(len(a), len(b)) // size))
    return KernelDistance(
        mean=values.mean().item(),
        deviation=deviation,
        standard_error=deviation / apart**0.5,
        subsets=subsets,
        size=size,
    )


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD^2 of x [N, D] and y [N, D] under (x.y / D + 1)^3 (Gretton et al. 2012, eq. 3)."""
    n = len(x)
    xx, yy, xy = (((p @ q.T) / x.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return float(within - 2 * xy.mean())


def cmmd(a: Tensor, b: Tensor, *, sigma: float = 10.0, chunk: int = 1024) -> float:
    """CMMD (Jayasumana et al. 2024): 1000 * MMD^2 of unit-length CLIP embeddings, in memory of O(chunk * N).

    a [N, D], b [M, D], brought to unit length here; kernel exp(-|x - y|^2 / (2 sigma^2)). As the authors'
    code, the minimum-variance estimate, which keeps x_i with itself: never negative. The paper's network is
    ViT-L/14 at 336 pixels. Raises UserError for an empty set.
    """
    if not len(a) or not len(b):
        raise UserError(f"CMMD needs embeddings on either side, got {len(a)} and {len(b)}")
    a, b = normalize(a.double(), dim=1), normalize(b.double(), dim=1)
    within = _gaussian_mean(a, a, sigma, chunk) + _gaussian_mean(b, b, sigma, chunk)
    return 1000 * (within - 2 * _gaussian_mean(a, b, sigma, chunk))


def _gaussian_mean(x: Tensor, y: Tensor, sigma: float, chunk: int) -> float:
    """Mean kernel value minus 1 over all pairs of unit rows; expm1 keeps the digits that sigma 10 costs."""
    total = 0.0
    for rows in x.split(chunk):
        squared = (2 - 2 * (rows @ y.T)).clamp(min=0)
        total += float(torch.expm1(-squared / (2 * sigma**2)).sum())
    return total / (len(x) * len(y))
