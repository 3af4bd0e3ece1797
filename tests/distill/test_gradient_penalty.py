"""distill.losses.gradient_penalty against finite differences in float64, on a tiny UNet with every zero
weight set moving.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tiny_teachers
from d2g.core.seeds import generator
from d2g.diffusion.conditioning import Conditioning
from distill.config.run import DiscriminatorConfig
from distill.losses.gradient_penalty import (
    DiscriminatorInput,
    approximate_r1,
    approximation,
    penalty,
    r1_penalty,
    sample_penalty_rows,
)
from distill.models.transformer_discriminator import (
    TransformerDiscriminator,
    discriminator_from_transformer,
)
from distill.models.unet_discriminator import discriminator_from_teacher


def build(family: str, teacher: Path, folder: Path) -> nn.Module:
    """The discriminator of a tiny teacher of this family."""
    if family == "sd":
        return discriminator_from_teacher(str(teacher), DiscriminatorConfig(), generator(0))
    name = tiny_teachers.save_transformer(family, folder)
    config = DiscriminatorConfig(discriminator="transformer", token_heads=2, token_scales=(1, 2))
    return discriminator_from_transformer(name, config, generator(0))


@pytest.fixture(scope="module", params=("sd", *tiny_teachers.TRANSFORMERS))
def judge(
    request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> nn.Module:
    """float64, and with nothing at zero, so that every path of the gradient counts."""
    discriminator = build(request.param, teacher, tmp_path_factory.mktemp("judge"))
    rng = torch.Generator().manual_seed(5)
    for parameter in discriminator.parameters():
        nn.init.normal_(parameter, std=0.3, generator=rng)
    return discriminator.double()


def family_of(judge: nn.Module) -> str:
    return judge.family.name if isinstance(judge, TransformerDiscriminator) else "sd"


def inputs(batch: int = 1, family: str = "sd", seed: int = 1) -> tuple[Tensor, Tensor, Conditioning]:
    rng, channels = torch.Generator().manual_seed(seed), 8 if family == "sd3" else 4
    x, noise = (torch.randn(batch, channels, 4, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    return x, noise, tiny_teachers.random_conditioning(family, batch, seed, torch.float64)


@torch.no_grad()
def score(judge: nn.Module, x: Tensor, noise: Tensor, text: Conditioning) -> float:
    return float(sum(head.mean() for head in judge(x, noise, text).values()))


def test_the_penalty_is_the_squared_norm_of_finite_differences(judge: nn.Module) -> None:
    x, noise, text = inputs(family=family_of(judge))
    step, total = 1e-5, 0.0
    for position in range(x.numel()):
        shift = torch.zeros_like(x)
        shift.view(-1)[position] = step
        slope = (score(judge, x + shift, noise, text) - score(judge, x - shift, noise, text)) / (2 * step)
        total += slope**2
    penalty = r1_penalty(judge, x, noise, text)
    assert penalty.dtype == torch.float64 and total > 1e-3
    assert penalty.item() == pytest.approx(total, rel=1e-6)


def test_the_penaltys_gradient_equals_finite_differences(judge: nn.Module) -> None:
    """Along random directions, for each kind of parameter: trunk, attention, noise, scales, heads."""
    x, noise, text = inputs(family=family_of(judge))
    judge.zero_grad()
    r1_penalty(judge, x, noise, text).backward()
    parameters = {n: p for n, p in judge.named_parameters() if p.requires_grad}
    kinds = {
        "noise": [n for n in parameters if n.startswith(("conv_z", "patch_z"))],
        "scales": [n for n in parameters if n.startswith("conv_scale")],
        "heads": [n for n in parameters if n.startswith("heads")],
        "attention": [n for n in parameters if ".attn" in n],
        "trunk": [n for n in parameters if n.startswith(("unet.", "transformer.")) and ".attn" not in n],
    }
    if isinstance(judge, TransformerDiscriminator):
        del kinds["scales"]
    rng, step = torch.Generator().manual_seed(2), 1e-6
    for kind, names in kinds.items():
        direction = {n: torch.randn(parameters[n].shape, generator=rng, dtype=torch.float64) for n in names}
        gradients = {
            n: parameters[n].grad if parameters[n].grad is not None else torch.zeros_like(parameters[n])
            for n in names
        }
        slope = sum((gradients[n] * direction[n]).sum().item() for n in names)  # type: ignore[operator]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for n in names:
                    parameters[n].add_(sign * step * direction[n])
            values.append(r1_penalty(judge, x, noise, text).item())
            with torch.no_grad():
                for n in names:
                    parameters[n].sub_(sign * step * direction[n])
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-6), kind
        assert abs(slope) > 1e-6, kind


def test_rows_are_averaged(judge: nn.Module) -> None:
    x, noise, text = inputs(3, family_of(judge))
    each = [r1_penalty(judge, x[i : i + 1], noise[i : i + 1], text[i : i + 1]).item() for i in range(3)]
    assert r1_penalty(judge, x, noise, text).item() == pytest.approx(sum(each) / 3, rel=1e-9)


@pytest.mark.parametrize("family", ["sd", "dit", "sd3"])  # PixArt's mask keeps flash attention away
def test_attention_has_a_second_derivative_where_flash_has_none(
    family: str, teacher: Path, tmp_path: Path
) -> None:
    discriminator = build(family, teacher, tmp_path)
    x, noise, text = (t.to(torch.float32) for t in inputs(family=family))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        moving = x.clone().requires_grad_(True)
        total = torch.stack([head.mean() for head in discriminator(moving, noise, text).values()]).sum()
        (gradient,) = torch.autograd.grad(total, moving, create_graph=True)
        with pytest.raises(RuntimeError, match="derivative"):
            gradient.square().sum().backward()
        discriminator.zero_grad()
        r1_penalty(discriminator, x, noise, text).backward()  # even where the caller asks for flash
    inside = [p.grad for n, p in discriminator.named_parameters() if ".attn" in n and p.grad is not None]
    assert inside and all(torch.isfinite(g).all() for g in inside) and any(g.abs().max() > 0 for g in inside)


@pytest.mark.parametrize("family", ["sd", *tiny_teachers.TRANSFORMERS])
def test_it_is_fp32_under_autocast_and_leaves_the_input_alone(
    family: str, teacher: Path, tmp_path: Path
) -> None:
    discriminator = build(family, teacher, tmp_path)
    x, noise, text = (t.to(torch.float32) for t in inputs(family=family))
    expected = r1_penalty(discriminator, x, noise, text)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = r1_penalty(discriminator, x, noise, text)
    assert penalty.dtype == torch.float32 and torch.equal(penalty, expected)
    assert not x.requires_grad and x.grad is None


def shown(rows: int, seed: int = 0, family: str = "sd") -> DiscriminatorInput:
    return DiscriminatorInput(*inputs(rows, family, seed))


def of(judge: nn.Module, s: DiscriminatorInput, **settings: Any) -> float:
    return r1_penalty(judge, s.latents, s.noise, s.cond, s.t, **settings).item()


def asked(judge: nn.Module, **settings: Any) -> tuple[float, dict[str, float]]:
    config = DiscriminatorConfig(r1_gamma=0.5, r1_interval=4, **settings)
    family = family_of(judge)
    value, parts = penalty(config, judge, shown(3, 0, family), shown(3, 9, family))
    return value.item(), {k: v.item() for k, v in parts.items()}


def test_a_linear_judge_in_closed_form() -> None:
    """D(x) = w . x at every position: the mean's gradient is w / positions, the sum's is w, at each."""

    def judge(x: Tensor, noise: Tensor, text: Conditioning, t: Tensor | None) -> dict[str, Tensor]:
        return {"a": 2 * x.sum(1, keepdim=True), "b": -x.sum(1, keepdim=True)}

    s = shown(2)
    slope, positions, channels = 2.0 - 1.0, 16, 4
    mean = r1_penalty(judge, s.latents, s.noise, s.cond)
    assert mean.item() == pytest.approx(channels * positions * (slope / positions) ** 2)
    total = r1_penalty(judge, s.latents, s.noise, s.cond, reduction="sum")
    assert total.item() == pytest.approx(channels * positions * slope**2)


def test_each_form_is_of_its_rows_and_weighted_for_its_interval(judge: nn.Module) -> None:
    family = family_of(judge)
    real, fake, lazy = shown(3, 0, family), shown(3, 9, family), 0.5 * 0.5 * 4
    rows = [of(judge, real.row(i)) for i in range(3)]
    value, parts = asked(judge, penalty="full")
    assert parts == {"loss/r1": pytest.approx(sum(rows) / 3)} and value == pytest.approx(lazy * sum(rows) / 3)
    value, parts = asked(judge, penalty="r1r2")
    second = of(judge, fake)
    assert parts == {"loss/r1": pytest.approx(sum(rows) / 3), "loss/r2": pytest.approx(second)}
    assert value == pytest.approx(lazy * (sum(rows) / 3 + second))
    value, parts = asked(judge, penalty="full", r1_reduction="sum")
    assert parts["loss/r1"] == pytest.approx(of(judge, real, reduction="sum"))
    assert parts["loss/r1"] != pytest.approx(sum(rows) / 3, rel=0.1)


@pytest.mark.parametrize(("rows", "count"), [(12, 1), (12, 3), (12, 12), (64, 16)])
def test_single_rows_are_one_of_each_part_and_all_alike_likely(rows: int, count: int) -> None:
    rng, part, drawn = torch.Generator().manual_seed(0), rows // count, torch.zeros(rows)
    for _ in range(400):
        rows_for_r1 = sample_penalty_rows(rows, count, rng)
        assert [row // part for row in rows_for_r1] == list(range(count))
        drawn[rows_for_r1] += 1
    assert (drawn / (400 / part) - 1).abs().max() < 5 * part**0.5 / 20 + 1e-6


def test_the_approximation_nears_the_squared_gradient() -> None:
    """E (D(x) - D(x + sigma n))^2 -> sigma^2 |grad D|^2 (APT): over many draws, for a linear judge."""

    def linear(x: Tensor, noise: Tensor, text: Conditioning, t: Tensor | None) -> dict[str, Tensor]:
        return {"a": 3 * x.mean((1, 2, 3), keepdim=True)}

    config = DiscriminatorConfig(penalty="approx", approx_sigma=0.1, approx_weight=7.0)
    s, rng = shown(1), torch.Generator().manual_seed(0)
    clean = linear(s.latents, s.noise, s.cond, None)
    eps = torch.randn(4_000, *s.latents.shape, generator=rng)
    values = [approximation(config, linear, s, clean, each) for each in eps]
    slopes = 64 * (3 / 64) ** 2
    mean = sum(parts["loss/r1_approx"].item() for _, parts in values) / len(values)
    assert mean == pytest.approx(0.1**2 * slopes, rel=0.1)
    assert all(v.item() == pytest.approx(7 * parts["loss/r1_approx"].item()) for v, parts in values)


def test_the_approximations_gradient_reaches_both_sides() -> None:
    clean = {"a": torch.tensor([[[[1.0]]]], requires_grad=True)}
    moved = {"a": torch.tensor([[[[3.0]]]], requires_grad=True)}
    approximate_r1(clean, moved).backward()
    assert clean["a"].grad is not None and clean["a"].grad.item() == -4.0
    assert moved["a"].grad is not None and moved["a"].grad.item() == 4.0
    two = {"a": torch.zeros(2, 1, 2, 2), "b": torch.zeros(2, 1, 1, 1)}
    one = {"a": torch.ones(2, 1, 2, 2), "b": 3 * torch.ones(2, 1, 1, 1)}
    assert approximate_r1(two, one).item() == 5.0 and approximate_r1(two, one, "sum").item() == 10.0


def test_it_is_asked_at_the_rows_time() -> None:
    def judge(x: Tensor, noise: Tensor, text: Conditioning, t: Tensor | None) -> dict[str, Tensor]:
        assert t is not None
        return {"a": (x * t.view(-1, 1, 1, 1)).sum((1, 2, 3), keepdim=True)}

    s = shown(3)
    selected = DiscriminatorInput(s.latents, s.noise, s.cond, torch.tensor([0, 2, 5]))
    assert [of(judge, selected.row(i)) for i in range(3)] == [0.0, 64 * 4.0, 64 * 25.0]  # type: ignore[arg-type]
