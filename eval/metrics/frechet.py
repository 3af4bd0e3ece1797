"""Frechet distance between two sets of features (FID), without a matrix square root."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2g.core.errors import UserError


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Frechet distance of two Gaussians with means [D] and covariances [D, D], computed in float64.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017, eq. 6). tr (A B)^(1/2) is the sum of
    the square roots of the eigenvalues of F^T B F with A = F F^T. That matrix is symmetric, so there are no
    complex parts, and singular covariances (fewer images than features) need no offset. F factors the
    covariance of lower rank, so that no eigenvalue consists of rounding alone.

    Raises UserError for other shapes, and for values that are not finite.

    >>> import torch
    >>> frechet_distance(torch.zeros(2), torch.eye(2), torch.ones(2), 4 * torch.eye(2))
    4.0
    """
    # Other means would be broadcast.
    shapes = [tuple(value.shape) for value in (mean_a, cov_a, mean_b, cov_b)]
    dim = mean_a.numel()
    if shapes != [(dim,), (dim, dim)] * 2:
        raise UserError(
            f"frechet_distance got the shapes {', '.join(map(str, shapes))}; expected means [D] and "
            "covariances [D, D] of the same D, as of x.mean(0) and x.T.cov() of features x [N, D]"
        )
    _require_finite(mean_a=mean_a, cov_a=cov_a, mean_b=mean_b, cov_b=cov_b)
    a, b = cov_a.double(), cov_b.double()
    factor_a, factor_b = factor(a), factor(b)
    if factor_a.shape[1] <= factor_b.shape[1]:
        cross = _root_trace(factor_a.T @ b @ factor_a)
    else:
        cross = _root_trace(factor_b.T @ a @ factor_b)
    distance = (mean_a.double() - mean_b.double()).square().sum() + a.trace() + b.trace() - 2 * cross
    return max(float(distance), 0.0)


def factor(covariance: Tensor) -> Tensor:
    """F [D, r] of full column rank with F F^T = covariance [D, D], positive semi-definite of rank r.

    Uses Cholesky at full rank, else eigenvectors. Eigenvalues below D * eps * the largest one are rounding
    and are dropped.
    """
    cholesky: Tensor
    cholesky, failed = torch.linalg.cholesky_ex(covariance)
    if not int(failed):
        return cholesky
    values, vectors = torch.linalg.eigh(covariance)
    significant = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    root: Tensor = vectors[:, significant] * values[significant].sqrt()
    return root


def _require_finite(**values: Tensor) -> None:
    """Raise UserError naming the first tensor that is not finite; of rows [N, D], its first row."""
    for name, tensor in values.items():
        broken = (~tensor.isfinite()).flatten(1).any(1) if name == "rows" else ~tensor.isfinite()
        if broken.any():
            what = f"row {int(broken.nonzero()[0])} of the features" if name == "rows" else name
            raise UserError(f"{what} is not finite; look for a broken image or broken weights")


def _root_trace(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt().sum())


def frechet_to(mean: Tensor, covariance: Tensor) -> Callable[[Tensor], float]:
    """Factor a reference once; return a function of rows [N, D], N >= 2, that gives their distance to it.

    Both raise UserError for values that are not finite.
    """
    _require_finite(mean=mean, covariance=covariance)
    mean, covariance = mean.double(), covariance.double()
    root, trace = factor(covariance), float(covariance.trace())

    def distance(rows: Tensor) -> float:
        _require_finite(rows=rows)
        center = rows.double().mean(0)
        scaled = (rows.double() - center) / (len(rows) - 1) ** 0.5
        # Take the smaller of the two products with the same nonzero eigenvalues.
        if len(rows) <= root.shape[1]:
            cross = _root_trace(scaled @ covariance @ scaled.T)
        else:
            cross = _root_trace(root.T @ (scaled.T @ scaled) @ root)
        total = float((center - mean).square().sum() + scaled.square().sum()) + trace - 2 * cross
        return max(total, 0.0)

    return distance


def frechet_standard_error(rows: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """Standard error of the Frechet distance of rows [N, D] to a fixed reference, in closed form.

    Delta method: the influence function of the distance at row x, with d = x - mean of the rows, is
    d^T (I - T) d - tr((I - T) A) + 2 (mean of the rows - mean)^T d, where T = F (F^T A F)^(-1/2) F^T is the
    optimal transport map from the rows' Gaussian to the reference F F^T (Takatsu 2011, Lemma 2.4). It is
    accurate for N well above D. Raises UserError unless N > D, and for values that are not finite.
    """
    if len(rows) <= rows.shape[1]:
        raise UserError(
            f"the closed-form interval needs more rows than features, got {len(rows)} for {rows.shape[1]}; "
            "use the bootstrap"
        )
    _require_finite(rows=rows, mean=mean, covariance=covariance)
    root = factor(covariance.double())
    center = rows.double().mean(0)
    centered = rows.double() - center
    # T applied to each centered row, in the eigenbasis of F^T A F.
    projected = centered @ root
    values, vectors = torch.linalg.eigh(projected.T @ projected / (len(rows) - 1))
    transported = projected @ (vectors * values.clamp(min=values[-1] * 1e-12) ** -0.25)
    shift = centered @ (center - mean.double())
    influence = centered.square().sum(1) - transported.square().sum(1) + 2 * shift
    return float(influence.std()) / float(len(rows) ** 0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class FrechetInfinity:
    """The distance extrapolated to infinitely many images, its standard error, and the fitted points."""

    value: float
    standard_error: float
    counts: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_infinity(
    rows: Tensor,
    mean: Tensor,
    covariance: Tensor,
    generator: torch.Generator,
    *,
    points: int = 15,
    smallest: int = 0,
) -> FrechetInfinity:
    """FID-infinity (Chong & Forsyth 2020): the bias is linear in 1 / N; fit a line and read it at 1 / N = 0.

    The line goes through the distances of `points` random subsets of rows [N, D]. Their sizes are evenly
    spaced from `smallest` (0: the paper's 5,000, or N / 2 where that is less) to N. The value may be
    negative. Its error is that over other rows: subsets share rows, so their scatter around the line is less.
    Raises UserError as `subset_sizes` does.
    """
    counts = subset_sizes(*rows.shape, points=points, smallest=smallest)
    distance = frechet_to(mean, covariance)
    subsets = [torch.randperm(len(rows), generator=generator)[:count] for count in counts]
    distances = [distance(rows[subset]) for subset in subsets]
    # The line at 1 / N = 0, as a weighted sum of the distances.
    inverse = 1 / np.array(counts)
    slopes = (inverse - inverse.mean()) / np.square(inverse - inverse.mean()).sum()
    weights = 1 / points - inverse.mean() * slopes
    # Each distance is a mean of its rows' influences, so the value is a weighted sum of all rows' influences.
    # In the distance of all rows itself each has the weight 1 / N.
    row_weights = torch.zeros(len(rows), dtype=torch.float64)
    for subset, weight in zip(subsets, weights, strict=True):
        row_weights[subset] += weight / len(subset)
    error = frechet_standard_error(rows, mean, covariance) * len(rows) ** 0.5 * float(row_weights.norm())
    return FrechetInfinity(
        value=float(weights @ distances),
        standard_error=error,
        counts=tuple(counts),
        distances=tuple(distances),
    )


def subset_sizes(rows: int, dim: int, *, points: int = 15, smallest: int = 0) -> list[int]:
    """Subset sizes of FID-infinity for `rows` rows of `dim` features.

    Raises UserError for too few rows: below two rows per feature the bias is not linear.
    """
    smallest = smallest or min(5000, rows // 2)
    if points < 3 or smallest < 2 * dim or rows < smallest + points:
        raise UserError(
            f"extrapolating the Frechet distance of {dim} features takes 3 points or more from {2 * dim} "
            f"images on, got {points} points and subsets of {smallest} to {rows}; make more images, or "
            "leave fid_infinity out"
        )
    return [int(count) for count in np.linspace(smallest, rows, points)]
