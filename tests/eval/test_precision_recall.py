"""eval.metrics.precision_recall and distances against brute force, prdc and torch-fidelity."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prdc import compute_prdc
from torch import Tensor
from torch_fidelity.metric_prc import calculate_precision_recall_part

from d2g.core.errors import UserError
from d2g.core.seeds import generator
from eval.metrics import distances as pairwise
from eval.metrics.precision_recall import PrecisionRecall, precision_recall, precision_recalls


def points(count: int, seed: int, scale: float = 1.0, dim: int = 4) -> Tensor:
    return torch.randn(count, dim, generator=generator(seed)) * scale


def brute_force(real: Tensor, fake: Tensor, k: int) -> PrecisionRecall:
    def distances(a: Tensor, b: Tensor) -> Tensor:
        return (a.double()[:, None] - b.double()[None]).square().sum(2)

    def radii(rows: Tensor) -> Tensor:
        return distances(rows, rows).fill_diagonal_(torch.inf).kthvalue(k).values

    between = distances(real, fake)
    inside = between <= radii(real)[:, None]
    return PrecisionRecall(
        precision=inside.any(0).double().mean().item(),
        recall=(between <= radii(fake)).any(1).double().mean().item(),
        density=inside.double().sum().item() / (k * len(fake)),
        coverage=inside.any(1).double().mean().item(),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_brute_force_for_any_chunk_size(k: int) -> None:
    real, fake = points(30, 0), points(25, 1, 1.5) + 1
    expected = brute_force(real, fake, k)
    for chunk in (1, 7, 1024):
        assert precision_recall(real, fake, k=k, chunk=chunk) == expected
    assert 0 < expected.precision < 1 and 0 < expected.recall < 1


def test_several_k_in_one_call_equal_brute_force() -> None:
    real, fake = points(40, 0), points(45, 1, 1.3)
    by_k = precision_recalls(real, fake, ks=(5, 1, 3), chunk=16)
    assert list(by_k) == [5, 1, 3]
    assert all(by_k[k] == brute_force(real, fake, k) for k in by_k)


@pytest.mark.parametrize("k", [3, 5])
def test_agrees_with_prdc_and_torch_fidelity(k: int) -> None:
    """Features are float64, because prdc computes distances of float32 features in float32."""
    real = points(300, 0, dim=16).double()
    fake = points(280, 1, 0.8, dim=16).double() + 0.2
    ours = precision_recall(real, fake, k=k, chunk=64)
    published = compute_prdc(real.numpy(), fake.numpy(), k)
    for name, value in published.items():
        assert getattr(ours, name) == pytest.approx(float(value), abs=1e-12), name
    precision, recall = calculate_precision_recall_part(fake, real, neighborhood=k)
    # torch-fidelity returns float32.
    assert (ours.precision, ours.recall) == (
        pytest.approx(precision, abs=1e-6),
        pytest.approx(recall, abs=1e-6),
    )
    assert 0.1 < ours.recall < 0.9 and ours.precision < 1


@given(
    real=st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=4, max_size=30),
    fake=st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=4, max_size=30),
    k=st.integers(1, 3),
    chunk=st.integers(1, 40),
    far=st.sampled_from([0.0, 4096.0]),
)
def test_repeated_and_equidistant_points_equal_brute_force(
    real: list[tuple[int, ...]], fake: list[tuple[int, ...]], k: int, chunk: int, far: float
) -> None:
    """Coordinates are integers, so distances are exact in any type, and many of them tie."""
    a, b = torch.tensor(real) + far, torch.tensor(fake) + far
    assert precision_recall(a, b, k=k, chunk=chunk) == brute_force(a, b, k)


def test_a_collapsed_generator_has_high_precision_and_low_recall() -> None:
    real = points(200, 0)
    collapsed = real[:1] + points(200, 1, 1e-3)
    result = precision_recall(real, collapsed, k=3)
    assert result.precision == 1 and result.recall <= 0.01 and result.coverage < 0.1
    modes = real[:5].repeat_interleave(40, 0) + points(200, 1, 1e-7)  # nearer than float32 resolves
    result = precision_recall(real, modes, k=3)
    assert result == brute_force(real, modes, 3)
    assert result.precision == 1 and result.recall <= 0.05


def test_one_repeated_image_has_precision_1_and_low_recall() -> None:
    real = points(150, 0, dim=32)
    result = precision_recall(real, real[:1].repeat(150, 1), k=3, chunk=64)
    assert result.precision == 1 and result.recall == pytest.approx(1 / 150)
    assert result == brute_force(real, real[:1].repeat(150, 1), 3)


def test_a_too_wide_generator_has_high_recall_and_low_precision() -> None:
    result = precision_recall(points(200, 0), points(200, 1, 10), k=3)
    assert result.precision < 0.2 and result.recall > 0.9


def test_identical_sets_are_perfect_far_from_the_origin() -> None:
    real = points(100, 0) + 1e4
    result = precision_recall(real, real.clone(), k=3)
    assert (result.precision, result.recall, result.coverage) == (1, 1, 1)


def test_points_of_a_grid_with_tied_distances() -> None:
    """Every row has many neighbors at the same distance; rounding must not break the ties."""
    axis = torch.arange(7.0)
    grid = torch.cartesian_prod(axis, axis, axis) * 0.1
    shifted = grid + torch.tensor([0.05, 0.0, 0.0])
    for chunk in (50, 343):
        assert precision_recall(grid, shifted, k=3, chunk=chunk) == brute_force(grid, shifted, 3)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_close_distances_are_computed_in_float64(scale: float) -> None:
    """Rows of norm 100 with neighbors at distance `scale`, which float32 products cannot resolve."""
    base = points(12, 0, 100.0, dim=64)
    real = (base.repeat(10, 1) + points(120, 1, scale, dim=64)).float()
    fake = (base.repeat(10, 1) + points(120, 2, scale, dim=64)).float()
    expected = brute_force(real, fake, 2)
    assert precision_recall(real, fake, k=2, chunk=32) == expected
    assert 0 < expected.precision < 1


def test_with_low_matmul_precision_everything_is_float64() -> None:
    before = torch.get_float32_matmul_precision()
    real, fake = points(40, 0), points(40, 1)
    try:
        torch.set_float32_matmul_precision("medium")
        assert pairwise.CenteredRows(real, real.double().mean(0)).centered.dtype == torch.float64
        assert precision_recall(real, fake, k=3) == brute_force(real, fake, 3)
    finally:
        torch.set_float32_matmul_precision(before)


def test_memory_grows_with_the_chunk_not_with_n_squared() -> None:
    """The largest tensor that is allocated for 2,000 rows is smaller than one bit per pair."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else (result,):
                if isinstance(value, Tensor) and value.untyped_storage().size():
                    largest = max(largest, value.untyped_storage().nbytes())
            return result

    real, fake = points(2000, 0, dim=8), points(2000, 1, dim=8)
    with Watch():
        precision_recall(real, fake, k=3, chunk=256)
    assert 0 < largest < 2000 * 2000 // 8, "less than one bit per pair"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    """No ball holds such a row: every share would be too low."""
    rows, broken = torch.eye(8), torch.eye(8)
    broken[3, 2] = value
    for real, fake, side in ((broken, rows, "real"), (rows, broken, "generated")):
        with pytest.raises(UserError, match=f"row 3 of the {side} features is not finite"):
            precision_recall(real, fake, k=3)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match="k = 3 need more than 3 images, got 3 and 9"):
        precision_recall(points(3, 0), points(9, 1), k=3)


def test_kth_neighbor_distances_equal_sorted_distances() -> None:
    rows = points(50, 3, dim=5)
    got = pairwise.kth_neighbor_distances(pairwise.CenteredRows(rows, rows.double().mean(0)), (1, 4), 16)
    expected = np.sort(((rows[:, None] - rows[None]).double().square().sum(2)).numpy(), axis=1)[:, [1, 4]]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)
