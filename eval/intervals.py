"""95 % bootstrap intervals, seeded."""

import numpy as np
import torch
from torch import Tensor

from core.progress import Progress
from core.seeds import generator
from eval.frechet import frechet_distance
from eval.stats import FeatureStats


def mean_interval(name: str, values: Tensor, resamples: int, seed: int) -> dict[str, list[float]]:
    """95 % percentile interval of the mean of `values` [N]."""
    if resamples == 0:
        return {}
    stream = generator(seed, 2)
    draws = (torch.randint(len(values), (len(values),), generator=stream) for _ in range(resamples))
    means = [values[rows].mean().item() for rows in draws]
    return {name: [float(q) for q in np.percentile(means, [2.5, 97.5])]}


def frechet_interval(
    estimate: float, fake: FeatureStats, real: FeatureStats, resamples: int, seed: int, progress: Progress
) -> dict[str, list[float]]:
    """estimate +- 1.96 standard deviations over bootstrap resamples of the generated rows."""
    # 2048 x 2048 eigenvalues take seconds each, and 20 resamples give the deviation to about 16 %.
    resamples = min(resamples, 20) if fake.dim > 512 else resamples
    if resamples < 2:
        return {}
    rows, stream = fake.rows.double(), generator(seed, 3)
    distances = []
    for i in range(resamples):
        drawn = rows[torch.randint(len(rows), (len(rows),), generator=stream)]
        distances.append(frechet_distance(drawn.mean(0), drawn.T.cov(), real.mean, real.covariance))
        progress("bootstrap of the Frechet distance", i + 1, resamples)
    margin = 1.96 * float(np.std(distances, ddof=1))
    return {"fid": [estimate - margin, estimate + margin]}
