"""eval.neighbours against a brute-force reference and on collapsed and spread sets."""

import pytest
import torch
from torch import Tensor

from core.errors import UserError
from core.seeds import generator
from eval.neighbours import Neighbours, precision_recall


def points(count: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(count, 4, generator=generator(seed)) * scale


def brute_force(real: Tensor, fake: Tensor, k: int) -> Neighbours:
    def radius(rows: Tensor, i: int) -> float:
        return sorted(float((rows[i] - rows[j]).norm()) for j in range(len(rows)) if j != i)[k - 1]

    def inside(point: Tensor, rows: Tensor, radii: list[float]) -> list[bool]:
        return [float((point - row).norm()) <= r for row, r in zip(rows, radii, strict=True)]

    real, fake = real.double(), fake.double()
    radii_real = [radius(real, i) for i in range(len(real))]
    radii_fake = [radius(fake, i) for i in range(len(fake))]
    hits = [inside(point, real, radii_real) for point in fake]
    return Neighbours(
        precision=sum(map(any, hits)) / len(fake),
        recall=sum(any(inside(point, fake, radii_fake)) for point in real) / len(real),
        density=sum(map(sum, hits)) / (k * len(fake)),
        coverage=sum(any(column) for column in zip(*hits, strict=True)) / len(real),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_brute_force_for_any_chunk(k: int) -> None:
    real, fake = points(30, 0), points(25, 1, 1.5) + 1
    expected = brute_force(real, fake, k)
    for chunk in (1, 7, 1024):
        assert precision_recall(real, fake, k=k, chunk=chunk) == expected
    assert 0 < expected.precision < 1 and 0 < expected.recall < 1


def test_collapse_keeps_precision_and_loses_recall() -> None:
    real = points(200, 0)
    collapsed = real[:1] + points(200, 1, 1e-3)
    result = precision_recall(real, collapsed, k=3)
    assert result.precision == 1 and result.recall <= 0.01 and result.coverage < 0.1


def test_spread_keeps_recall_and_loses_precision() -> None:
    result = precision_recall(points(200, 0), points(200, 1, 10), k=3)
    assert result.precision < 0.2 and result.recall > 0.9


def test_identical_sets_are_perfect_far_from_the_origin() -> None:
    real = points(100, 0) + 1e4
    result = precision_recall(real, real.clone(), k=3)
    assert (result.precision, result.recall, result.coverage) == (1, 1, 1)


def test_too_few_images() -> None:
    with pytest.raises(UserError, match="k = 3 need more than 3 images, got 3 and 9"):
        precision_recall(points(3, 0), points(9, 1), k=3)
