"""eval.metrics.kernel against double sums, torch-fidelity and torchmetrics."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_kid import kernel_mmd, mmd2
from torchmetrics.image.kid import poly_mmd

from d2g.core.errors import UserError
from d2g.core.seeds import generator
from eval.metrics.kernel import cmmd, kernel_distance, polynomial_mmd


def rows(count: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, dim, generator=generator(seed), dtype=torch.float64) + shift


def test_kid_is_unbiased_at_zero_and_grows_with_the_shift() -> None:
    a, b = rows(400, 6, 1), rows(400, 6, 2)
    near = kernel_distance(a, b, generator(0), subsets=20, size=200)
    far = kernel_distance(a, b + 1, generator(0), subsets=20, size=200)
    assert abs(near.mean) < 0.1 < far.mean
    assert kernel_distance(a, b, generator(0), subsets=20, size=200) == near


def test_the_error_of_kid_depends_on_rows_not_on_subsets() -> None:
    """40 overlapping subsets hold no more information about 400 rows than 4 disjoint ones."""
    draws = [
        kernel_distance(
            rows(400, 3, seed), rows(400, 3, 1000 + seed, 0.5), generator(0), subsets=40, size=100
        )
        for seed in range(40)
    ]
    deviation = float(np.std([draw.mean for draw in draws], ddof=1))
    estimated = float(np.mean([draw.standard_error for draw in draws]))
    assert 0.6 * deviation < estimated < 1.8 * deviation
    assert estimated * 2 == pytest.approx(float(np.mean([draw.deviation for draw in draws])))


def test_if_a_subset_is_all_rows_the_error_equals_the_deviation_over_draws() -> None:
    real = rows(90, 3, 0)
    draws = [kernel_distance(rows(90, 3, seed, 0.5), real, generator(0), subsets=2) for seed in range(1, 81)]
    assert {draw.size for draw in draws} == {90}
    deviation = float(np.std([draw.mean for draw in draws], ddof=1))
    assert float(np.mean([draw.standard_error for draw in draws])) == pytest.approx(deviation, rel=0.3)


@pytest.mark.parametrize("generated", [800, 150])
def test_the_error_counts_all_generated_rows_where_a_subset_is_the_whole_reference(generated: int) -> None:
    """Many images against a small reference: each subset holds a part of the images."""

    def rows(count: int, seed: int) -> torch.Tensor:
        return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))

    real = rows(100, 1_000_000)
    draws = [
        kernel_distance(
            rows(generated, seed) + 0.2, real, torch.Generator().manual_seed(seed), subsets=30, size=100
        )
        for seed in range(100)
    ]
    deviation = float(np.std([draw.mean for draw in draws], ddof=1))
    assert float(np.mean([draw.standard_error for draw in draws])) == pytest.approx(deviation, rel=0.2)


def test_polynomial_mmd_equals_the_double_sum_torch_fidelity_and_torchmetrics() -> None:
    a, b = rows(5, 3, 1), rows(5, 3, 2)

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(5) for j in range(5)]
    within = sum(kernel(a[i], a[j]) + kernel(b[i], b[j]) for i, j in pairs if i != j) / 20
    expected = within - 2 * sum(kernel(a[i], b[j]) for i, j in pairs) / 25
    got = kernel_distance(a, b, generator(0), subsets=1, size=9)
    assert got.mean == pytest.approx(expected, rel=1e-9) and (got.size, got.subsets) == (5, 1)
    a, b = rows(60, 20, 3), rows(60, 20, 4, 0.3)
    value = polynomial_mmd(a, b)
    defaults = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_coef0": 1}
    by_fidelity = kernel_mmd(a.numpy(), b.numpy(), **defaults, kid_kernel_poly_gamma=None)
    assert value == pytest.approx(float(by_fidelity), rel=1e-9)
    assert value == pytest.approx(poly_mmd(a, b).item(), rel=1e-9)


def test_cmmd_equals_torch_fidelitys_biased_estimate() -> None:
    a, b = rows(70, 12, 1), rows(50, 12, 2, 0.5)
    x, y = (np.asarray(m / m.norm(dim=1, keepdim=True)) for m in (a[:50], b))

    def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.exp(-np.square(p[:, None] - q[None]).sum(2) / 200)

    expected = 1000 * mmd2(kernel(x, x), kernel(x, y), kernel(y, y), mmd_est="biased")
    assert cmmd(a[:50], b).value == pytest.approx(expected, rel=1e-8)
    for chunk in (1, 7, 1000):
        assert cmmd(a, b, chunk=chunk).value == pytest.approx(cmmd(a, b).value, rel=1e-12)
    assert cmmd(a, 3 * a).value == pytest.approx(0, abs=1e-12) and cmmd(a, b).value > 0


def test_the_error_of_cmmd_equals_the_deviation_over_draws() -> None:
    real = rows(500, 6, 0)
    draws = [cmmd(rows(200, 6, seed, 0.5), real) for seed in range(1, 61)]
    deviation = float(np.std([draw.value for draw in draws], ddof=1))
    assert float(np.mean([draw.standard_error for draw in draws])) == pytest.approx(deviation, rel=0.25)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(UserError, match="two rows on either side, got 1 and 9"):
        kernel_distance(rows(1, 3, 0), rows(9, 3, 1), generator(0))
    with pytest.raises(UserError, match="got 0 and 9"):
        cmmd(rows(0, 3, 0), rows(9, 3, 1))
