"""95 % intervals: closed forms, and a seeded bootstrap where there is no closed form."""

import math
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from d2g.core.progress import Progress, quiet
from d2g.core.seeds import EvalStream, generator
from eval.metrics.feature_stats import FeatureStats
from eval.metrics.frechet import frechet_standard_error, frechet_to
from eval.protocols.metric import Estimate, Interval

Z = NormalDist().inv_cdf(0.975)
"""The 97.5 % quantile of the standard normal distribution, about 1.96."""


def interval_of(
    method: Interval, estimate: Estimate, resamples: int, seed: int
) -> tuple[float, float] | None:
    """The interval of an estimate by `method`; None where it has no finite standard error, no cases or no
    values, or where a bootstrap has fewer than two resamples."""
    error = estimate.standard_error
    if method == "normal" and error is not None and math.isfinite(error):
        return normal_interval(estimate.value, error)
    if method == "wilson" and estimate.count:
        return wilson_interval(estimate.value, estimate.count)
    if method == "bootstrap" and estimate.values is not None and resamples > 1:
        return mean_interval(estimate.values, resamples, seed)
    return None


def normal_interval(estimate: float, standard_error: float) -> tuple[float, float]:
    """estimate +- 1.96 standard errors."""
    return estimate - Z * standard_error, estimate + Z * standard_error


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share in [0, 1] of `count` independent cases.

    For precision and recall it covers other samples compared with the same balls of the other set.
    """
    center = share + Z**2 / (2 * count)
    half = Z * (share * (1 - share) / count + Z**2 / (4 * count**2)) ** 0.5
    scale = 1 + Z**2 / count
    # The interval contains the share; rounding would leave out shares of 0 and 1.
    return min(share, max(0.0, (center - half) / scale)), max(share, min(1.0, (center + half) / scale))


def mean_interval(values: Tensor, resamples: int, seed: int) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean of `values` [N] (Efron & Tibshirani 1993)."""
    stream = generator(seed, EvalStream.BOOTSTRAP_MEAN)
    draws = (torch.randint(len(values), (len(values),), generator=stream) for _ in range(resamples))
    means = [values[rows].mean().item() for rows in draws]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def frechet_error(
    fake: FeatureStats,
    real: FeatureStats,
    resamples: int,
    seed: int,
    progress: Progress = quiet,
) -> float | None:
    """Standard error of the Frechet distance to a fixed reference. None for fewer than 2 `resamples`.

    With at least two rows per feature it is the closed form (`frechet_standard_error`). With fewer rows it is
    the standard deviation over bootstrap resamples of the generated rows. Percentiles of the bootstrap would
    not do: resampled distances are biased upwards, and the interval would miss the estimate.
    """
    if resamples < 2:
        return None
    rows = fake.rows
    if len(rows) >= 2 * fake.dim:
        return frechet_standard_error(rows, real.mean, real.covariance)
    # With 20 resamples the deviation is known to about 16 %; at 2048 features one resample takes a second.
    resamples = min(resamples, 20) if fake.dim > 512 else resamples
    distance, stream = frechet_to(real.mean, real.covariance), generator(seed, EvalStream.BOOTSTRAP_FRECHET)
    distances = []
    for i in range(resamples):
        distances.append(distance(rows[torch.randint(len(rows), (len(rows),), generator=stream)]))
        progress("bootstrap of the Frechet distance", i + 1, resamples)
    return float(np.std(distances, ddof=1))
