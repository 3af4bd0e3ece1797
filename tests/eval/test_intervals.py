"""eval.metrics.intervals: 95 % intervals contain the true value in about 95 % of cases."""

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from d2g.core.seeds import generator
from eval.metrics.feature_stats import FeatureStats, Origin
from eval.metrics.frechet import frechet_distance, frechet_standard_error
from eval.metrics.intervals import (
    Z,
    frechet_error,
    interval_of,
    mean_interval,
    normal_interval,
    wilson_interval,
)
from eval.protocols.metric import Estimate

ORIGIN = Origin(features="test", features_sha256="0" * 64, resize="native", source="rows")


def stats_of(rows: Tensor) -> FeatureStats:
    stats = FeatureStats(rows.shape[1], ORIGIN)
    stats.update(rows)
    return stats


def test_z_is_the_normal_quantile() -> None:
    assert pytest.approx(norm.ppf(0.975), rel=1e-12) == Z
    assert normal_interval(3.0, 0.5) == (pytest.approx(3 - 0.5 * Z), pytest.approx(3 + 0.5 * Z))


def test_wilson_covers_shares() -> None:
    count, truth = 50, 0.9
    draws = (torch.rand(2000, count, generator=generator(0)) < truth).double().mean(1)
    covered = sum(
        low <= truth <= high for low, high in (wilson_interval(share, count) for share in draws.tolist())
    )
    assert 0.93 < covered / 2000 < 0.98
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1) and wilson_interval(0.0, 10)[0] == pytest.approx(
        0, abs=1e-12
    )


def test_wilson_contains_the_share_at_every_count() -> None:
    """Rounding left 1 out at 7 cases and 0 at 5, for example."""
    for count in range(1, 200):
        for share in (0.0, 1.0, 1 / count):
            low, high = wilson_interval(share, count)
            assert 0 <= low <= share <= high <= 1 and low < high, (share, count)


def test_the_bootstrap_covers_means() -> None:
    draws = torch.randn(200, 60, generator=generator(1)).exp()  # skewed, mean exp(1/2)
    covered = sum(
        low <= torch.tensor(0.5).exp().item() <= high
        for low, high in (mean_interval(draw, 200, 0) for draw in draws)
    )
    assert 0.84 < covered / 200 < 0.98
    assert mean_interval(draws[0], 200, 0) == mean_interval(draws[0], 200, 0)
    # One resample gives no interval.
    assert interval_of("bootstrap", Estimate(value=0.0, values=draws[0]), 0, 0) is None
    assert interval_of("bootstrap", Estimate(value=0.0, values=draws[0]), 1, 0) is None


@pytest.mark.parametrize("error", [float("inf"), float("nan")])
def test_an_error_that_is_not_finite_gives_no_interval(error: float) -> None:
    """A kernel distance of one subset, say, has an infinite error, which is no JSON number."""
    assert interval_of("normal", Estimate(value=0.3, standard_error=error), 1000, 0) is None
    assert interval_of("normal", Estimate(value=0.3, standard_error=0.1), 1000, 0) is not None


@pytest.mark.parametrize(("count", "dim"), [(200, 4), (6, 4)])
def test_frechet_intervals_contain_the_estimate(count: int, dim: int) -> None:
    """The error is the closed form with enough rows, and bootstrapped with few."""
    fake = stats_of(torch.randn(count, dim, generator=generator(2)) + 0.5)
    real = stats_of(torch.randn(500, dim, generator=generator(3)))
    estimate = frechet_distance(fake.mean, fake.covariance, real.mean, real.covariance)
    bootstrapped = frechet_error(fake, real, 60, 0)
    assert bootstrapped is not None
    low, high = normal_interval(estimate, bootstrapped)
    assert (low + high) / 2 == pytest.approx(estimate) and low < estimate < high
    error = frechet_standard_error(fake.rows, real.mean, real.covariance)
    assert ((high - low) / 2 == pytest.approx(Z * error)) == (count == 200)
    assert frechet_error(fake, real, 60, 0) == bootstrapped
    assert frechet_error(fake, real, 0, 0) is None


def test_the_bootstrap_reports_progress() -> None:
    reports: list[tuple[int, int]] = []
    few = stats_of(torch.randn(6, 8, generator=generator(2)))
    real = stats_of(torch.randn(50, 8, generator=generator(3)))
    frechet_error(few, real, 5, 0, lambda _, done, total: reports.append((done, total)))
    assert reports == [(i, 5) for i in range(1, 6)]
