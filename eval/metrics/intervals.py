"""95 % intervals: closed forms, and a seeded bootstrap where there is none."""

from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from d2g.core.progress import Progress, quiet
from d2g.core.seeds import EvalStream, generator
from eval.metrics.feature_stats import FeatureStats
from eval.metrics.frechet import frechet_standard_error, frechet_to

Z = NormalDist().inv_cdf(0.975)


def around(estimate: float, standard_error: float) -> tuple[float, float]:
    """estimate +- 1.96 standard errors."""
    return estimate - Z * standard_error, estimate + Z * standard_error


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share in [0, 1] of `count` independent cases.

    Of precision and recall it says what other samples would give against the same balls of the other set.
    """
    middle = share + Z**2 / (2 * count)
    half = Z * (share * (1 - share) / count + Z**2 / (4 * count**2)) ** 0.5
    scale = 1 + Z**2 / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def mean_interval(name: str, values: Tensor, resamples: int, seed: int) -> dict[str, list[float]]:
    """Percentile interval of the mean of `values` [N] over bootstrap resamples (Efron & Tibshirani 1993)."""
    if resamples == 0:
        return {}
    stream = generator(seed, EvalStream.BOOTSTRAP_MEAN)
    draws = (torch.randint(len(values), (len(values),), generator=stream) for _ in range(resamples))
    means = [values[rows].mean().item() for rows in draws]
    return {name: [float(q) for q in np.percentile(means, [2.5, 97.5])]}


def frechet_interval(
    estimate: float,
    fake: FeatureStats,
    real: FeatureStats,
    resamples: int,
    seed: int,
    progress: Progress = quiet,
) -> dict[str, list[float]]:
    """estimate +- 1.96 standard errors of the Frechet distance, with the reference fixed.

    In closed form (`frechet_standard_error`) from two rows per feature on, else the deviation over bootstrap
    resamples of the generated rows; not their percentiles, which are biased upwards and would miss the
    estimate.
    """
    if resamples < 2:
        return {}
    rows = fake.rows
    if len(rows) >= 2 * fake.dim:
        return {"fid": list(around(estimate, frechet_standard_error(rows, real.mean, real.covariance)))}
    # 20 resamples give the deviation to about 16 %, and at 2048 features each takes a second.
    resamples = min(resamples, 20) if fake.dim > 512 else resamples
    distance, stream = frechet_to(real.mean, real.covariance), generator(seed, EvalStream.BOOTSTRAP_FRECHET)
    distances = []
    for i in range(resamples):
        distances.append(distance(rows[torch.randint(len(rows), (len(rows),), generator=stream)]))
        progress("bootstrap of the Frechet distance", i + 1, resamples)
    return {"fid": list(around(estimate, float(np.std(distances, ddof=1))))}
