"""eval.stats and eval.frechet against closed forms."""

import math
from pathlib import Path

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from core.errors import UserError
from core.seeds import generator
from eval.frechet import frechet_distance, kernel_distance
from eval.stats import FeatureStats, Origin

ORIGIN = Origin(features="test", features_sha256="0" * 64, resize="native", source="rows")


def rows(count: int, dim: int, seed: int = 0) -> Tensor:
    mix = torch.randn(dim, dim, generator=generator(seed, 1))
    return torch.randn(count, dim, generator=generator(seed)) @ mix + 100


def stats_of(features: Tensor, batch: int = 64) -> FeatureStats:
    stats = FeatureStats(features.shape[1], ORIGIN)
    for start in range(0, len(features), batch):
        stats.update(features[start : start + batch])
    return stats


def distance(a: FeatureStats, b: FeatureStats) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def test_equal_covariances_leave_the_squared_distance_of_the_means() -> None:
    cov = rows(50, 6).double().T.cov()
    shift = torch.arange(6.0)
    assert frechet_distance(torch.zeros(6), cov, shift, cov) == pytest.approx(float(shift @ shift), rel=1e-9)


def test_diagonal_covariances_have_a_closed_form() -> None:
    a, b = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 4.0, 2.0])
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    zero = torch.zeros(3)
    assert frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(expected, rel=1e-6)


def test_distance_is_symmetric_and_invariant_to_rotation() -> None:
    a, b = stats_of(rows(200, 5)), stats_of(rows(200, 5, seed=7) - 1)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator(3)))[0]
    turned = frechet_distance(
        turn @ a.mean, turn @ a.covariance @ turn.T, turn @ b.mean, turn @ b.covariance @ turn.T
    )
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)
    assert turned == pytest.approx(distance(a, b), rel=1e-9)


def test_agrees_with_scipys_matrix_square_root() -> None:
    a, b = stats_of(rows(300, 8)), stats_of(rows(300, 8, seed=5))
    root = torch.from_numpy(sqrtm((a.covariance @ b.covariance).numpy()).real.copy())
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance - 2 * root).trace()
    assert distance(a, b) == pytest.approx(float(expected), rel=1e-8)


def test_identical_sets_are_at_zero_even_with_fewer_rows_than_features() -> None:
    few = stats_of(rows(10, 32))
    assert distance(few, few) == pytest.approx(0, abs=1e-3 * few.covariance.trace().item())
    many = stats_of(rows(500, 8))
    assert distance(many, many) < 1e-6


def test_batches_and_merging_do_not_change_the_statistics() -> None:
    features = rows(101, 7)
    whole = stats_of(features, batch=101)
    parts = stats_of(features[:40], batch=3)
    parts.merge(stats_of(features[40:], batch=50))
    for other in (stats_of(features, batch=1), stats_of(features, batch=16), parts):
        assert other.count == 101
        torch.testing.assert_close(other.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(other.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
        assert torch.equal(other.rows, features)
    torch.testing.assert_close(whole.covariance, features.double().T.cov(), rtol=1e-9, atol=1e-9)


def test_save_and_load(tmp_path: Path) -> None:
    stats = stats_of(rows(60, 4))
    stats.save(tmp_path / "all.safetensors")
    stats.save(tmp_path / "some.safetensors", keep=10)
    loaded, some = (FeatureStats.load(tmp_path / f"{name}.safetensors") for name in ("all", "some"))
    assert loaded.origin == ORIGIN and loaded.count == some.count == 60
    torch.testing.assert_close(loaded.covariance, stats.covariance, rtol=1e-12, atol=0)
    assert torch.equal(loaded.rows, stats.rows)
    assert torch.equal(some.rows, stats.sample(10)) and len(some.rows) == 10
    assert sorted(file.name for file in tmp_path.iterdir()) == ["all.safetensors", "some.safetensors"]


def test_bad_statistics_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.safetensors: no such statistics file"):
        FeatureStats.load(tmp_path / "gone.safetensors")
    stats_of(rows(9, 3)).save(tmp_path / "cut.safetensors")
    data = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut.safetensors is no feature statistics file"):
        FeatureStats.load(tmp_path / "cut.safetensors")


def test_one_row_and_non_finite_rows_are_refused() -> None:
    with pytest.raises(UserError, match="needs at least 2"):
        _ = stats_of(rows(1, 3)).covariance
    with pytest.raises(UserError, match="not finite"):
        stats_of(torch.tensor([[1.0, math.nan]]))


def test_kernel_distance_is_unbiased_at_zero_and_grows_with_the_shift() -> None:
    a, b = torch.randn(400, 6, generator=generator(1)), torch.randn(400, 6, generator=generator(2))
    near = kernel_distance(a, b, generator(0), subsets=20, size=200)
    far = kernel_distance(a, b + 1, generator(0), subsets=20, size=200)
    assert abs(near.mean) < 0.1 < far.mean
    assert kernel_distance(a, b, generator(0), subsets=20, size=200) == near


def test_kernel_distance_equals_the_double_sum() -> None:
    a, b = (
        torch.randn(5, 3, generator=generator(1)).double(),
        torch.randn(5, 3, generator=generator(2)).double(),
    )

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(5) for j in range(5)]
    within = sum(kernel(a[i], a[j]) + kernel(b[i], b[j]) for i, j in pairs if i != j) / 20
    expected = within - 2 * sum(kernel(a[i], b[j]) for i, j in pairs) / 25
    assert kernel_distance(a, b, generator(0), subsets=1).mean == pytest.approx(expected, rel=1e-9)
