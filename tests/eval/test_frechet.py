"""eval.metrics.frechet against closed forms, SciPy, torch-fidelity and torchmetrics."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from d2g.core.errors import UserError
from d2g.core.seeds import generator
from eval.metrics.frechet import (
    factor,
    frechet_distance,
    frechet_infinity,
    frechet_standard_error,
    frechet_to,
    subset_sizes,
)


def rows(count: int, dim: int, seed: int = 0) -> Tensor:
    mix = torch.randn(dim, dim, generator=generator(seed, 1), dtype=torch.float64)
    return torch.randn(count, dim, generator=generator(seed), dtype=torch.float64) @ mix + 3


def distance(a: Tensor, b: Tensor) -> float:
    return frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())


def test_with_equal_covariances_the_distance_is_that_of_the_means() -> None:
    for count in (50, 4):  # of full rank, and of rank 3 in 6 dimensions
        cov = rows(count, 6).T.cov()
        shift = torch.arange(6.0)
        got = frechet_distance(torch.zeros(6), cov, shift, cov)
        assert got == pytest.approx(float(shift @ shift), rel=1e-9)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    fine, broken = rows(50, 6), rows(50, 6)
    broken[3, 4] = value
    mean, covariance = fine.mean(0), fine.T.cov()
    with pytest.raises(UserError, match=r"^mean_a is not finite; look for a broken image or broken"):
        frechet_distance(broken.mean(0), covariance, mean, covariance)
    with pytest.raises(UserError, match="cov_b is not finite"):
        frechet_distance(mean, covariance, mean, broken.T.cov())
    with pytest.raises(UserError, match="covariance is not finite"):
        frechet_to(mean, broken.T.cov())
    with pytest.raises(UserError, match="row 3 of the features is not finite"):
        frechet_to(mean, covariance)(broken)
    with pytest.raises(UserError, match="row 3 of the features is not finite"):
        frechet_standard_error(broken, mean, covariance)


def test_other_shapes_are_refused() -> None:
    """A mean of one number, or features in place of their mean, would be broadcast."""
    x = rows(50, 6)
    mean, covariance = x.mean(0), x.T.cov()
    for other in (mean[:1], x, mean[None]):
        for arguments in ((other, covariance, mean, covariance), (mean, covariance, other, covariance)):
            with pytest.raises(
                UserError, match=r"expected means \[D\] and covariances \[D, D\] of the same D"
            ):
                frechet_distance(*arguments)
    with pytest.raises(UserError, match=r"got the shapes \(6,\), \(6, 6\), \(5,\), \(5, 5\); expected"):
        frechet_distance(mean, covariance, mean[:5], covariance[:5, :5])


def test_diagonal_covariances_have_a_closed_form() -> None:
    a, b = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 4.0, 2.0])
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    zero = torch.zeros(3)
    assert frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(expected, rel=1e-6)


def test_distance_is_symmetric_and_invariant_to_rotation() -> None:
    a, b = rows(200, 5), rows(200, 5, seed=7) - 1
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator(3)))[0]
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)
    assert distance(a @ rotation, b @ rotation) == pytest.approx(distance(a, b), rel=1e-9)


@pytest.mark.parametrize(("count", "dim"), [(300, 8), (900, 64)])
def test_agrees_with_sqrtm_torch_fidelity_and_torchmetrics(count: int, dim: int) -> None:
    a, b = rows(count, dim), rows(count, dim, seed=5)
    got = distance(a, b)
    root = sqrtm((a.T.cov() @ b.T.cov()).numpy()).real
    by_scipy = (a.mean(0) - b.mean(0)).square().sum() + (a.T.cov() + b.T.cov()).trace() - 2 * np.trace(root)
    assert got == pytest.approx(float(by_scipy), rel=1e-8)
    statistics = (fid_features_to_statistics(x) for x in (a, b))
    by_fidelity = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert got == pytest.approx(by_fidelity, rel=1e-8)
    torchmetrics_fid = FrechetInceptionDistance(feature=PassThrough(dim)).set_dtype(torch.float64)
    torchmetrics_fid.update(a, real=True)
    torchmetrics_fid.update(b, real=False)
    assert got == pytest.approx(torchmetrics_fid.compute().item(), rel=1e-8)


class PassThrough(nn.Module):
    """A feature network for torchmetrics that returns its input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, features: Tensor) -> Tensor:
        return features


def test_identical_sets_have_distance_zero_even_with_fewer_rows_than_features() -> None:
    few = rows(10, 64)
    assert distance(few, few) < 1e-10 * few.T.cov().trace()
    many = rows(500, 8)
    assert distance(many, many) < 1e-10 * many.T.cov().trace()


def test_with_few_rows_the_trace_term_is_a_nuclear_norm() -> None:
    """tr (A B)^(1/2) is the sum of the singular values of X Y^T / sqrt((n - 1) (m - 1)), X and Y centered."""
    for n, m in ((9, 14), (14, 9), (9, 200)):
        a, b = rows(n, 40), rows(m, 40, seed=2)
        x, y = a - a.mean(0), b - b.mean(0)
        cross = torch.linalg.svdvals(x @ y.T).sum() / ((n - 1) * (m - 1)) ** 0.5
        expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * cross
        assert distance(a, b) == pytest.approx(float(expected), rel=1e-9)
        assert frechet_to(b.mean(0), b.T.cov())(a) == pytest.approx(float(expected), rel=1e-7)


def test_a_factor_has_the_rank_of_the_covariance() -> None:
    for count, rank in ((8, 7), (200, 20)):
        cov = rows(count, 20).T.cov()
        root = factor(cov)
        assert root.shape == (20, rank)
        torch.testing.assert_close(root @ root.T, cov, rtol=0, atol=1e-12 * cov.trace().item())


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_the_standard_error_equals_the_deviation_over_samples(shift: float) -> None:
    dim, count = 6, 400
    real = rows(4000, dim, seed=9)
    mean, cov = real.mean(0), real.T.cov()
    to_real = frechet_to(mean, cov)
    draws = (rows(120 * count, dim, seed=5) + shift).split(count)
    deviation = torch.tensor([to_real(draw) for draw in draws]).std().item()
    estimated = torch.tensor([frechet_standard_error(draw, mean, cov) for draw in draws[:20]])
    assert estimated.mean().item() == pytest.approx(
        deviation, rel=0.2
    )  # the deviation of 120 draws is known to 6.5 %
    assert estimated.std() < 0.2 * estimated.mean()
    with pytest.raises(UserError, match="more rows than features, got 6 for 6"):
        frechet_standard_error(draws[0][:6], mean, cov)


def test_fid_infinity_removes_the_bias() -> None:
    """Both sets have the same distribution, so the distance is only the bias of finite counts."""
    dim = 16
    generated = torch.randn(4000, dim, generator=generator(1), dtype=torch.float64)
    mean, cov = torch.zeros(dim), torch.eye(dim)
    finite = frechet_to(mean, cov)(generated[:500])
    estimate = frechet_infinity(generated, mean, cov, generator(0), smallest=500)
    assert estimate.counts[0] == 500 and estimate.counts[-1] == 4000 and len(estimate.distances) == 15
    assert abs(estimate.value) < 0.1 * finite and 0 < estimate.standard_error < 0.1 * finite
    again = frechet_infinity(generated, mean, cov, generator(0), smallest=500)
    assert again == estimate
    assert frechet_infinity(generated, mean, cov, generator(0)).counts[0] == 2000, (
        "with fewer than 10,000 rows the smallest subset is half of them"
    )
    with pytest.raises(
        UserError, match=r"16 features .* from 32 images on, got 15 points and subsets of 20 to 40"
    ):
        frechet_infinity(generated[:40], mean, cov, generator(0))


def test_the_smallest_subset_of_fid_infinity_is_5000_if_possible() -> None:
    assert subset_sizes(50_000, 2048)[::14] == [5_000, 50_000] and len(subset_sizes(50_000, 2048)) == 15
    with pytest.raises(UserError, match=r"2048 features takes .* from 4096 images on"):
        subset_sizes(5_000, 2048)


def test_fid_infinity_fits_a_line_as_numpy_does() -> None:
    generated = rows(300, 5)
    estimate = frechet_infinity(generated, torch.zeros(5), torch.eye(5), generator(2), points=6, smallest=50)
    fit = np.polyfit(1 / np.array(estimate.counts), estimate.distances, 1)
    assert estimate.value == pytest.approx(fit[1], rel=1e-9)
    all_rows = frechet_distance(generated.mean(0), generated.T.cov(), torch.zeros(5), torch.eye(5))
    assert estimate.distances[-1] == pytest.approx(all_rows, rel=1e-9), "the last subset is all rows"


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_error_of_fid_infinity_equals_the_deviation_over_samples(shift: float) -> None:
    """Subsets of the same rows agree with each other more than sets of other rows do."""
    dim, count = 8, 800
    draws = (torch.randn(80 * count, dim, generator=generator(4), dtype=torch.float64) + shift).split(count)
    estimates = [
        frechet_infinity(draw, torch.zeros(dim), torch.eye(dim), generator(number))
        for number, draw in enumerate(draws)
    ]
    values, errors = zip(*((e.value, e.standard_error) for e in estimates), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.2)
    assert np.mean(values) == pytest.approx(dim * shift**2, abs=0.03)
