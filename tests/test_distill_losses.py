"""distill.losses: closed forms of both losses, and who is paired with whom in mix-and-match."""

import math

import pytest
import torch
from torch import Tensor

from distill.losses import discriminator_loss, generator_loss, mismatch, mix_and_match


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def heads(*values: float) -> dict[str, Tensor]:
    return {str(i): torch.full((2, 1, 2 + i, 2 + i), v) for i, v in enumerate(values)}


def test_the_discriminators_loss_is_binary_cross_entropy() -> None:
    expected = (softplus(-1.5) + softplus(0.5) + softplus(2.0) + softplus(-3.0)) / 2
    assert discriminator_loss(heads(1.5, -2.0), heads(0.5, -3.0)).item() == pytest.approx(expected, rel=1e-6)
    assert discriminator_loss(heads(0.0), heads(0.0)).item() == pytest.approx(2 * math.log(2), rel=1e-6)


def test_the_generators_loss_is_non_saturating() -> None:
    """-log D(G), whose gradient by the logit is -(1 - D): near -1 where D is sure of a fake."""
    assert generator_loss(heads(1.5, -2.0)).item() == pytest.approx(
        (softplus(-1.5) + softplus(2.0)) / 2, rel=1e-6
    )
    logit = torch.full((1, 1, 1, 1), -20.0, requires_grad=True)
    generator_loss({"0": logit}).backward()
    assert logit.grad is not None and logit.grad.item() == pytest.approx(-1.0, abs=1e-6)


def test_heads_count_alike_whatever_their_size() -> None:
    small, large = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 64, 64), -1.0)
    expected = (softplus(-2.0) + softplus(1.0)) / 2
    assert generator_loss({"a": small, "b": large}).item() == pytest.approx(expected, rel=1e-6)


def test_losses_are_fp32_on_half_precision_logits() -> None:
    half = {"0": torch.full((1, 1, 1, 1), 7.0, dtype=torch.bfloat16)}
    assert generator_loss(half).dtype == discriminator_loss(half, half).dtype == torch.float32
    assert generator_loss(half).item() == pytest.approx(softplus(-7.0), rel=1e-5)


PROMPTS = [f"prompt {i // 3}" for i in range(30)]  # each three times


def test_a_row_is_never_paired_with_its_own_prompt() -> None:
    for seed in range(50):
        mode, partner = mismatch(PROMPTS, 0.9, torch.Generator().manual_seed(seed))
        for row in torch.nonzero(mode).flatten().tolist():
            assert PROMPTS[int(partner[row])] != PROMPTS[row]


def test_modes_share_the_fraction() -> None:
    prompts = [str(i) for i in range(6_000)]
    mode, partner = mismatch(prompts, 0.25, torch.Generator().manual_seed(0))
    counts = torch.bincount(mode, minlength=4).tolist()
    assert len(counts) == 4 and abs(counts[0] / 6_000 - 0.75) < 0.02
    assert all(abs(c / 6_000 - 0.25 / 3) < 0.015 for c in counts[1:])
    assert partner.unique().numel() > 3_000  # partners are drawn all over the batch


def test_no_fraction_and_no_partner_stay_plain() -> None:
    rng = torch.Generator().manual_seed(0)
    assert mismatch(PROMPTS, 0.0, rng)[0].tolist() == [0] * 30
    mode, partner = mismatch(["same"] * 8, 0.99, rng)
    assert mode.tolist() == [0] * 8 and partner.tolist() == list(range(8))
    assert mismatch(["alone"], 0.99, rng)[0].tolist() == [0]


def test_the_generator_decides() -> None:
    draws = [mismatch(PROMPTS, 0.5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[2][0])


def test_each_swap_has_exactly_one_wrong_member() -> None:
    fake, real, noise = (torch.randn(4, 4, 2, 2) for _ in range(3))
    text = torch.randn(4, 5, 6)
    mode, partner = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 0])
    x, z, c = mix_and_match(fake, real, noise, text, mode, partner)
    assert torch.equal(x, torch.stack([fake[0], real[2], real[2], real[3]]))
    assert torch.equal(c, torch.stack([text[0], text[1], text[3], text[3]]))
    assert torch.equal(z, torch.stack([noise[0], noise[1], noise[2], noise[0]]))


def test_plain_rows_are_the_fakes_untouched() -> None:
    fake, real, noise, text = (torch.randn(3, 4, 2, 2) for _ in range(4))
    x, z, c = mix_and_match(fake, real, noise, text, torch.zeros(3, dtype=torch.long), torch.arange(3))
    assert torch.equal(x, fake) and torch.equal(z, noise) and torch.equal(c, text)
