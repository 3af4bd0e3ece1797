"""distill.losses.adversarial: closed forms of the GAN losses; pairing of rows in mix-and-match."""

import math

import pytest
import torch
from torch import Tensor

from d2g.core.errors import SettingError
from d2g.diffusion.conditioning import Conditioning
from distill.config.discriminator import GanLoss, require_even_microbatch
from distill.losses.adversarial import discriminator_loss, generator_loss, mix_and_match, sample_mismatches


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def heads(*values: float) -> dict[str, Tensor]:
    return {str(i): torch.full((2, 1, 2 + i, 2 + i), v) for i, v in enumerate(values)}


def test_discriminator_loss_is_binary_cross_entropy() -> None:
    expected = (softplus(-1.5) + softplus(0.5) + softplus(2.0) + softplus(-3.0)) / 2
    assert discriminator_loss(heads(1.5, -2.0), heads(0.5, -3.0)).item() == pytest.approx(expected, rel=1e-6)
    assert discriminator_loss(heads(0.0), heads(0.0)).item() == pytest.approx(2 * math.log(2), rel=1e-6)


def test_generator_loss_is_non_saturating() -> None:
    """The gradient of -log D(G) by the logit is -(1 - D), close to -1 where D is certain of a fake."""
    assert generator_loss(heads(1.5, -2.0)).item() == pytest.approx(
        (softplus(-1.5) + softplus(2.0)) / 2, rel=1e-6
    )
    logit = torch.full((1, 1, 1, 1), -20.0, requires_grad=True)
    generator_loss({"0": logit}).backward()
    assert logit.grad is not None and logit.grad.item() == pytest.approx(-1.0, abs=1e-6)


def test_heads_have_equal_weight_at_any_resolution() -> None:
    small, large = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 64, 64), -1.0)
    expected = (softplus(-2.0) + softplus(1.0)) / 2
    assert generator_loss({"a": small, "b": large}).item() == pytest.approx(expected, rel=1e-6)


def test_losses_are_fp32_on_half_precision_logits() -> None:
    half = {"0": torch.full((1, 1, 1, 1), 7.0, dtype=torch.bfloat16)}
    assert generator_loss(half).dtype == discriminator_loss(half, half).dtype == torch.float32
    assert generator_loss(half).item() == pytest.approx(softplus(-7.0), rel=1e-5)


PROMPTS = [f"prompt {i // 3}" for i in range(30)]
"""Each prompt three times: both rows have the same prompt in 10 of the 15 pairs."""


def uniform_samples(size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))


def test_a_row_is_never_paired_with_its_own_prompt() -> None:
    for seed in range(50):
        mode, partner = sample_mismatches(PROMPTS, 0.9, uniform_samples(30, seed))
        assert 7 <= mode.count_nonzero() <= 10
        for row in torch.nonzero(mode).flatten().tolist():
            assert PROMPTS[int(partner[row])] != PROMPTS[row]


def test_modes_share_the_fraction() -> None:
    prompts = [str(i) for i in range(6_000)]
    for shares in ((1.0, 1.0, 1.0), (2.0, 1.0, 0.0), (0.0, 0.0, 5.0)):
        mode, _ = sample_mismatches(prompts, 0.25, uniform_samples(6_000), shares)
        counts = torch.bincount(mode, minlength=4).tolist()
        assert len(counts) == 4 and abs(counts[0] / 6_000 - 0.75) < 0.02
        for count, share in zip(counts[1:], shares, strict=True):
            assert abs(count / 6_000 - 0.25 * share / sum(shares)) < 0.015 and (share or count == 0)


def test_rows_stay_unchanged_without_fraction_or_different_partner() -> None:
    assert sample_mismatches(PROMPTS, 0.0, uniform_samples(30))[0].tolist() == [0] * 30
    assert sample_mismatches(["same"] * 8, 0.99, uniform_samples(8))[0].tolist() == [0] * 8
    assert sample_mismatches(["single"], 0.0, uniform_samples(1))[0].tolist() == [0]
    all_swapped = sample_mismatches(["a", "b", "c", "c"], 0.99, torch.zeros(4))
    assert all_swapped[0].tolist() == [1, 1, 0, 0] and all_swapped[1].tolist() == [1, 0, 3, 2]


def test_splitting_a_batch_does_not_change_its_mixing() -> None:
    """The partner is the neighboring row for any number of processes, also with repeated prompts."""
    prompts, samples = [str(i % 3 * (i % 5)) for i in range(24)], uniform_samples(24)
    mode, partner = sample_mismatches(prompts, 0.5, samples)
    assert 0 < mode.count_nonzero() < 24
    for size in (2, 4, 8, 6):
        for first in range(0, 24, size):
            part = sample_mismatches(prompts[first : first + size], 0.5, samples[first : first + size])
            assert torch.equal(part[0], mode[first : first + size])
            assert torch.equal(part[1] + first, partner[first : first + size])


def test_each_swap_replaces_exactly_one_member() -> None:
    fake, real, noise = (torch.randn(4, 4, 2, 2) for _ in range(3))
    hidden = torch.randn(4, 5, 6)
    text = Conditioning.from_text(hidden)
    mode, partner = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 0])
    x, z, c = mix_and_match(fake, real, noise, text, mode, partner)
    assert torch.equal(x, torch.stack([fake[0], real[2], real[2], real[3]]))
    assert torch.equal(c.tensors["hidden"], hidden[[0, 1, 3, 3]])
    assert torch.equal(z, torch.stack([noise[0], noise[1], noise[2], noise[0]]))


def test_unswapped_rows_are_the_fakes() -> None:
    fake, real, noise = (torch.randn(3, 4, 2, 2) for _ in range(3))
    text = Conditioning.from_text(torch.randn(3, 4, 2))
    x, z, c = mix_and_match(fake, real, noise, text, torch.zeros(3, dtype=torch.long), torch.arange(3))
    assert torch.equal(x, fake) and torch.equal(z, noise)
    assert torch.equal(c.tensors["hidden"], text.tensors["hidden"])


def test_hinge_loss_closed_form() -> None:
    """D: relu(1 - real) + relu(1 + fake), which is 0.5 + 1.5 and 0 + 0 for the two heads. G: -D(G)."""
    real, fake = heads(0.5, 2.0), heads(0.5, -3.0)
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(2.0 / 2, rel=1e-6)
    assert generator_loss(fake, "hinge").item() == pytest.approx((-0.5 + 3.0) / 2, rel=1e-6)
    assert generator_loss(fake, "hinge", real=real).item() == pytest.approx(1.25, rel=1e-6)


def test_relativistic_loss_compares_real_and_fake_of_the_same_row() -> None:
    real = {"0": torch.tensor([1.0, -2.0]).view(2, 1, 1, 1)}
    fake = {"0": torch.tensor([3.0, 0.5]).view(2, 1, 1, 1)}
    expected = (softplus(2.0) + softplus(2.5)) / 2
    assert discriminator_loss(real, fake, "rpgan").item() == pytest.approx(expected, rel=1e-6)
    expected = (softplus(-2.0) + softplus(-2.5)) / 2
    assert generator_loss(fake, "rpgan", real=real).item() == pytest.approx(expected, rel=1e-6)
    swapped = {"0": real["0"].flip(0)}
    assert discriminator_loss(swapped, fake, "rpgan").item() != pytest.approx(expected, rel=1e-3)
    with pytest.raises(AssertionError, match="needs D's logits"):
        generator_loss(fake, "rpgan")


@pytest.mark.parametrize("kind", ["ns", "hinge", "rpgan"])
def test_head_reduction_is_mean_or_sum(kind: GanLoss) -> None:
    real, fake = heads(0.3, -0.2, 0.9), heads(0.1, 0.4, -0.7)
    mean, total = (discriminator_loss(real, fake, kind, r).item() for r in ("mean", "sum"))  # type: ignore[arg-type]
    assert total == pytest.approx(3 * mean, rel=1e-6)
    mean, total = (generator_loss(fake, kind, r, real).item() for r in ("mean", "sum"))  # type: ignore[arg-type]
    assert total == pytest.approx(3 * mean, rel=1e-6)


def test_mixing_needs_an_even_number_of_rows() -> None:
    with pytest.raises(SettingError, match="has 1 row per process; rows are mixed in pairs"):
        require_even_microbatch(1, 0.25)
    with pytest.raises(SettingError, match=r"has 3 rows per process; .* expected an even number"):
        require_even_microbatch(3, 0.25)
    require_even_microbatch(2, 0.25)
    require_even_microbatch(1, 0.0)


def test_a_text_swap_covers_all_conditioning_tensors() -> None:
    fake, real, noise = (torch.randn(2, 4, 2, 2) for _ in range(3))
    text = Conditioning.from_text(torch.randn(2, 5, 6), torch.randn(2, 3), torch.randn(2, 6))
    mode, partner = torch.tensor([2, 0]), torch.tensor([1, 0])
    _, z, c = mix_and_match(fake, real, noise, text, mode, partner)
    assert torch.equal(z, noise) and len(c.tensors) == 3
    for name, tensor in text.tensors.items():
        assert torch.equal(c.tensors[name], tensor[[1, 1]])
