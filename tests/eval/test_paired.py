"""eval.metrics.paired and diversity: closed forms, and PSNR of torchmetrics."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio

from d2g.core.errors import UserError
from d2g.core.seeds import generator
from eval.metrics.diversity import prompt_diversity
from eval.metrics.paired import cosine_distance, encoded, psnr


def random_images(count: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator(seed))


def test_psnr_equals_torchmetrics() -> None:
    a, b = random_images(3, 0), random_images(3, 1)
    for got, x, y in zip(psnr(a, b), a, b, strict=True):
        expected = peak_signal_noise_ratio(x.double(), y.double(), data_range=255.0)
        assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    equal = psnr(a, a)
    one_level = a.clone()
    one_level[:, 0, 0, 0] = torch.where(a[:, 0, 0, 0] > 0, a[:, 0, 0, 0] - 1, 1)
    torch.testing.assert_close(equal, psnr(a, one_level))
    assert equal.isfinite().all() and (equal > psnr(a, b)).all()


def test_cosine_distance_equals_torch() -> None:
    a, b = (torch.randn(5, 7, generator=generator(seed), dtype=torch.float64) for seed in (0, 1))
    torch.testing.assert_close(cosine_distance(a, b), 1 - cosine_similarity(a, b), rtol=1e-12, atol=1e-12)
    assert cosine_distance(a, 3 * a).abs().max() < 1e-12
    halved = encoded(lambda x: x[:, :3], cosine_distance)
    assert torch.equal(halved(a, b), cosine_distance(a[:, :3], b[:, :3]))


def test_diversity_compares_images_of_the_same_prompt() -> None:
    red, blue = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 2.0])
    same = prompt_diversity(torch.stack([red, 5 * red]), ["p", "p"])
    assert (same.mean, same.prompts, same.images) == (pytest.approx(0, abs=1e-12), 1, 2)
    rows, prompts = torch.stack([red, red, red, blue, blue, blue]), ["p", "alone", "p", "p", "q", "q"]
    mixed = prompt_diversity(rows, prompts)
    assert mixed.mean == pytest.approx((2 / 3 + 0) / 2) and (mixed.prompts, mixed.images) == (2, 5)
    assert mixed.standard_error == pytest.approx(1 / 3)
    order = [3, 5, 0, 4, 1, 2]
    assert prompt_diversity(rows[order], [prompts[i] for i in order]) == mixed
    with pytest.raises(UserError, match="at least two images of some prompt"):
        prompt_diversity(rows[:4], list("abcd"))


def test_diversity_is_the_mean_pairwise_cosine_distance() -> None:
    rows = torch.randn(6, 9, generator=generator(3), dtype=torch.float64)
    pairs = [1 - cosine_similarity(rows[i], rows[j], dim=0) for i in range(6) for j in range(i)]
    assert prompt_diversity(rows, ["p"] * 6).mean == pytest.approx(
        torch.stack(pairs).mean().item(), rel=1e-12
    )
