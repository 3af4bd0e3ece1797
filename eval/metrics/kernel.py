"""Kernel distances between two sets of features: KID and CMMD."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from d2g.core.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelDistance:
    """Mean over random subsets of the unbiased squared MMD, its standard error, and the number of subsets.

    Random subsets overlap, so the error divides their deviation by the root of the number of disjoint subsets
    that fit into the rows. Where one subset holds all rows of a set, the error comes from the delta method:
    other samples of the first set, with the second set fixed.
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

    The kernel is (x.y / D + 1)^3. Of sets with fewer than `size` rows, all rows are used, and the `size` of
    the result says so. Raises UserError for fewer than two rows on either side.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        raise UserError(f"a kernel distance needs two rows on either side, got {len(a)} and {len(b)}")
    # Unbiased MMD of random subsets.
    values = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size]].double()
        y = b[torch.randperm(len(b), generator=generator)[:size]].double()
        values[i] = polynomial_mmd(x, y)
    deviation = values.std().item() if subsets > 1 else float("inf")
    # Subsets overlap, so only as many as fit side by side count as independent.
    disjoint = max(1, min(subsets, min(len(a), len(b)) // size))
    all_rows = size == min(len(a), len(b))
    # The mean over subsets is of more rows of `a` than one subset, if `a` is the larger set.
    averaged = max(1.0, min(subsets, len(a) / size))
    return KernelDistance(
        mean=values.mean().item(),
        deviation=deviation,
        standard_error=_delta_error(x, y) / averaged**0.5 if all_rows else deviation / disjoint**0.5,
        subsets=subsets,
        size=size,
    )


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD^2 of x [N, D] and y [N, D] under (x.y / D + 1)^3 (Gretton et al. 2012, eq. 3)."""
    n = len(x)
    xx, yy, xy = _polynomial(x, x), _polynomial(y, y), _polynomial(x, y)
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return float(within - 2 * xy.mean())


def _polynomial(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _delta_error(x: Tensor, y: Tensor) -> float:
    """Standard error of `polynomial_mmd`, from 2 (mean k(row, other x) - mean k(row, y)) of each row of x."""
    within = _polynomial(x, x)
    within_means = (within.sum(1) - within.diagonal()) / (len(x) - 1)
    return 2 * float((within_means - _polynomial(x, y).mean(1)).std()) / math.sqrt(len(x))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cmmd:
    """1000 * MMD^2, and its standard error over other samples of the first set, with the second set fixed."""

    value: float
    standard_error: float


def cmmd(a: Tensor, b: Tensor, *, sigma: float = 10.0, chunk: int = 1024) -> Cmmd:
    """CMMD (Jayasumana et al. 2024): 1000 * MMD^2 of unit-length CLIP embeddings, in O(chunk * N) memory.

    `a` [N, D] and `b` [M, D] are normalized here. The kernel is exp(-|x - y|^2 / (2 sigma^2)). As in the
    authors' code, the estimate is the biased one, which includes k(x_i, x_i) and is never negative. The
    paper's network is ViT-L/14 at 336 pixels. The standard error comes from the delta method, from
    2 (mean k(x, a) - mean k(x, b)) of each row x of `a`. Raises UserError for an empty set.
    """
    if not len(a) or not len(b):
        raise UserError(f"CMMD needs embeddings on either side, got {len(a)} and {len(b)}")
    a, b = normalize(a.double(), dim=1), normalize(b.double(), dim=1)
    within, between = _gaussian_means(a, a, sigma, chunk), _gaussian_means(a, b, sigma, chunk)
    value = within.mean() + _gaussian_means(b, b, sigma, chunk).mean() - 2 * between.mean()
    error = 2 * (within - between).std(correction=0) / len(a) ** 0.5
    return Cmmd(value=1000 * float(value), standard_error=1000 * float(error))


def _gaussian_means(x: Tensor, y: Tensor, sigma: float, chunk: int) -> Tensor:
    """[N]: mean kernel value of each unit row with all of y, minus 1. expm1 keeps digits at a large sigma."""
    squared = ((2 - 2 * (rows @ y.T)).clamp(min=0) for rows in x.split(chunk))
    return torch.cat([torch.expm1(-part / (2 * sigma**2)).mean(1) for part in squared])
