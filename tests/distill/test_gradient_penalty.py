"""distill.losses.gradient_penalty against finite differences in float64, without zero weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tiny_teachers
from d2g.core.seeds import generator
from d2g.diffusion.conditioning import Conditioning
from distill.config.discriminator import DiscriminatorConfig
from distill.losses.gradient_penalty import (
    DiscriminatorInput,
    approximate_penalty,
    approximate_r1,
    exact_penalty,
    r1_penalty,
    sample_penalty_rows,
)
from distill.models.discriminators import DISCRIMINATORS

KINDS = (
    *tiny_teachers.UNETS,
    *tiny_teachers.TRANSFORMERS,
    *(pytest.param(stage, marks=pytest.mark.slow) for stage in tiny_teachers.STAGES),
)


def build(kind: str, folder: Path) -> nn.Module:
    """The discriminator of a tiny teacher of this kind."""
    teacher = tiny_teachers.save_kind(kind, folder)
    network: Any = "transformer" if kind in tiny_teachers.TRANSFORMERS else "unet"
    network = "cascade" if kind in tiny_teachers.STAGES else network
    config = DiscriminatorConfig(discriminator=network, token_heads=2, token_scales=(1, 2))
    return DISCRIMINATORS[network].build(teacher, config, generator(0))


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def discriminator(kind: str, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A float64 discriminator without zero weights, so that every gradient path contributes."""
    discriminator = build(kind, tmp_path_factory.mktemp("discriminator"))
    rng = torch.Generator().manual_seed(5)
    for parameter in discriminator.parameters():
        nn.init.normal_(parameter, std=0.3, generator=rng)
    return discriminator.double()


pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """`to(torch.float32)` keeps float64: diffusers' RMSNorm has its variance in fp32."""
    to = torch.Tensor.to

    def keep_float64(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rounds = tensor.dtype == torch.float64 and args[:1] == (torch.float32,)
        return tensor if rounds else to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep_float64)


def inputs(batch: int = 1, kind: str = "sd", seed: int = 1) -> tuple[Tensor, Tensor, Conditioning]:
    return tiny_teachers.random_inputs(kind, batch, seed, torch.float64)


@torch.no_grad()
def score(discriminator: nn.Module, x: Tensor, noise: Tensor, text: Conditioning) -> float:
    return float(sum(head.mean() for head in discriminator(x, noise, text).values()))


@pytest.mark.usefixtures("float64_norms")
def test_the_penalty_is_the_squared_norm_of_finite_differences(kind: str, discriminator: nn.Module) -> None:
    x, noise, text = inputs(kind=kind)
    step, total = 1e-5, 0.0
    for position in range(x.numel()):
        shift = torch.zeros_like(x)
        shift.view(-1)[position] = step
        slope = (
            score(discriminator, x + shift, noise, text) - score(discriminator, x - shift, noise, text)
        ) / (2 * step)
        total += slope**2
    penalty = r1_penalty(discriminator, x, noise, text)
    assert penalty.dtype == torch.float64 and total > 1e-3
    assert penalty.item() == pytest.approx(total, rel=1e-6)


@pytest.mark.usefixtures("float64_norms")
def test_the_penaltys_gradient_equals_finite_differences(kind: str, discriminator: nn.Module) -> None:
    """Along random directions, for each group of parameters: trunk, attention, noise, scales, heads."""
    x, noise, text = inputs(kind=kind)
    discriminator.zero_grad()
    r1_penalty(discriminator, x, noise, text).backward()
    parameters = {n: p for n, p in discriminator.named_parameters() if p.requires_grad}
    kinds = {
        "noise": [n for n in parameters if n.startswith(("conv_z", "patch_z"))],
        "scales": [n for n in parameters if n.startswith("conv_scale")],
        "heads": [n for n in parameters if n.startswith("heads")],
        "attention": [n for n in parameters if ".att" in n],
        "classes": [n for n in parameters if n.startswith("projections")],
        "trunk": [n for n in parameters if n.startswith(("unet.", "transformer.")) and ".att" not in n],
    }
    absent = {"classes"} if kind not in ("unet2d", "edm") else set()
    absent |= {"scales"} if kind not in tiny_teachers.UNETS else set()
    assert {name for name, names in kinds.items() if not names} == absent
    rng, step = torch.Generator().manual_seed(2), 1e-6
    for group in sorted(kinds.keys() - absent):
        names = kinds[group]
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
            values.append(r1_penalty(discriminator, x, noise, text).item())
            with torch.no_grad():
                for n in names:
                    parameters[n].sub_(sign * step * direction[n])
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-6), group
        assert abs(slope) > 1e-6, group


def test_rows_are_averaged(kind: str, discriminator: nn.Module) -> None:
    x, noise, text = inputs(3, kind)
    each = [
        r1_penalty(discriminator, x[i : i + 1], noise[i : i + 1], text[i : i + 1]).item() for i in range(3)
    ]
    assert r1_penalty(discriminator, x, noise, text).item() == pytest.approx(sum(each) / 3, rel=1e-9)


@pytest.mark.parametrize("name", ["sd", "unet2d", "dit", "sd3", "flux"])  # PixArt's mask excludes flash
def test_penalty_avoids_flash_attention_which_has_no_second_derivative(name: str, tmp_path: Path) -> None:
    discriminator = build(name, tmp_path)
    x, noise, text = (t.to(torch.float32) for t in inputs(kind=name))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        latents = x.clone().requires_grad_(True)
        total = torch.stack([head.mean() for head in discriminator(latents, noise, text).values()]).sum()
        (gradient,) = torch.autograd.grad(total, latents, create_graph=True)
        with pytest.raises(RuntimeError, match="derivative"):
            gradient.square().sum().backward()
        discriminator.zero_grad()
        r1_penalty(discriminator, x, noise, text).backward()  # also if the caller selects flash attention
    attention_grads = [
        p.grad for n, p in discriminator.named_parameters() if ".att" in n and p.grad is not None
    ]
    assert (
        attention_grads
        and all(torch.isfinite(g).all() for g in attention_grads)
        and any(g.abs().max() > 0 for g in attention_grads)
    )


@pytest.mark.parametrize("name", KINDS)
def test_penalty_is_fp32_under_autocast_and_keeps_its_input(name: str, tmp_path: Path) -> None:
    discriminator = build(name, tmp_path)
    x, noise, text = (t.to(torch.float32) for t in inputs(kind=name))
    expected = r1_penalty(discriminator, x, noise, text)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = r1_penalty(discriminator, x, noise, text)
    assert penalty.dtype == torch.float32 and torch.equal(penalty, expected)
    assert not x.requires_grad and x.grad is None


def discriminator_input(rows: int, seed: int = 0, kind: str = "sd") -> DiscriminatorInput:
    return DiscriminatorInput(*inputs(rows, kind, seed))


def r1(discriminator: nn.Module, s: DiscriminatorInput, **settings: Any) -> float:
    return r1_penalty(discriminator, s.latents, s.noise, s.cond, s.t, **settings).item()


def penalty_terms(kind: str, discriminator: nn.Module, **settings: Any) -> tuple[float, dict[str, float]]:
    config = DiscriminatorConfig(r1_gamma=0.5, r1_interval=4, **settings)
    value, parts = exact_penalty(
        config, discriminator, discriminator_input(3, 0, kind), discriminator_input(3, 9, kind)
    )
    return value.item(), {k: v.item() for k, v in parts.items()}


def test_closed_form_of_a_linear_discriminator() -> None:
    """D(x) = w . x at every position: the gradient is w / positions for the mean and w for the sum."""

    def discriminator(x: Tensor, noise: Tensor, text: Conditioning, t: Tensor | None) -> dict[str, Tensor]:
        return {"a": 2 * x.sum(1, keepdim=True), "b": -x.sum(1, keepdim=True)}

    s = discriminator_input(2)
    slope, positions, channels = 2.0 - 1.0, 16, 4
    mean = r1_penalty(discriminator, s.latents, s.noise, s.cond)
    assert mean.item() == pytest.approx(channels * positions * (slope / positions) ** 2)
    total = r1_penalty(discriminator, s.latents, s.noise, s.cond, reduction="sum")
    assert total.item() == pytest.approx(channels * positions * slope**2)


def test_penalty_rows_and_weights(kind: str, discriminator: nn.Module) -> None:
    real, fake, lazy = discriminator_input(3, 0, kind), discriminator_input(3, 9, kind), 0.5 * 0.5 * 4
    rows = [r1(discriminator, real.row(i)) for i in range(3)]
    value, parts = penalty_terms(kind, discriminator, penalty="full")
    assert parts == {"loss/r1": pytest.approx(sum(rows) / 3)} and value == pytest.approx(lazy * sum(rows) / 3)
    value, parts = penalty_terms(kind, discriminator, penalty="r1r2")
    second = r1(discriminator, fake)
    assert parts == {"loss/r1": pytest.approx(sum(rows) / 3), "loss/r2": pytest.approx(second)}
    assert value == pytest.approx(lazy * (sum(rows) / 3 + second))
    value, parts = penalty_terms(kind, discriminator, penalty="full", r1_reduction="sum")
    assert parts["loss/r1"] == pytest.approx(r1(discriminator, real, reduction="sum"))
    assert parts["loss/r1"] != pytest.approx(sum(rows) / 3, rel=0.1)


@pytest.mark.parametrize(("rows", "count"), [(12, 1), (12, 3), (12, 12), (64, 16)])
def test_penalty_rows_are_uniform_in_each_part_of_the_batch(rows: int, count: int) -> None:
    rng, part, counts = torch.Generator().manual_seed(0), rows // count, torch.zeros(rows)
    for _ in range(400):
        rows_for_r1 = sample_penalty_rows(rows, count, rng)
        assert [row // part for row in rows_for_r1] == list(range(count))
        counts[rows_for_r1] += 1
    assert (counts / (400 / part) - 1).abs().max() < 5 * part**0.5 / 20 + 1e-6


def test_approximate_r1_converges_to_the_squared_gradient() -> None:
    """E (D(x) - D(x + sigma n))^2 = sigma^2 |grad D|^2 (APT) for a linear D, averaged over many samples."""

    def linear(x: Tensor, noise: Tensor, text: Conditioning, t: Tensor | None) -> dict[str, Tensor]:
        return {"a": 3 * x.mean((1, 2, 3), keepdim=True)}

    config = DiscriminatorConfig(penalty="approx", approx_sigma=0.1, approx_weight=7.0)
    s, rng = discriminator_input(1), torch.Generator().manual_seed(0)
    clean = linear(s.latents, s.noise, s.cond, None)
    eps = torch.randn(4_000, *s.latents.shape, generator=rng)
    values = [approximate_penalty(config, linear, s, clean, each) for each in eps]
    slopes = 64 * (3 / 64) ** 2
    mean = sum(parts["loss/r1_approx"].item() for _, parts in values) / len(values)
    assert mean == pytest.approx(0.1**2 * slopes, rel=0.1)
    assert all(v.item() == pytest.approx(7 * parts["loss/r1_approx"].item()) for v, parts in values)


def test_approximate_r1_has_gradients_for_both_logits() -> None:
    clean = {"a": torch.tensor([[[[1.0]]]], requires_grad=True)}
    perturbed = {"a": torch.tensor([[[[3.0]]]], requires_grad=True)}
    approximate_r1(clean, perturbed).backward()
    assert clean["a"].grad is not None and clean["a"].grad.item() == -4.0
    assert perturbed["a"].grad is not None and perturbed["a"].grad.item() == 4.0
    two = {"a": torch.zeros(2, 1, 2, 2), "b": torch.zeros(2, 1, 1, 1)}
    one = {"a": torch.ones(2, 1, 2, 2), "b": 3 * torch.ones(2, 1, 1, 1)}
    assert approximate_r1(two, one).item() == 5.0 and approximate_r1(two, one, "sum").item() == 10.0


def test_penalty_uses_the_timestep_of_each_row() -> None:
    def discriminator(x: Tensor, noise: Tensor, text: Conditioning, t: Tensor | None) -> dict[str, Tensor]:
        assert t is not None
        return {"a": (x * t.view(-1, 1, 1, 1)).sum((1, 2, 3), keepdim=True)}

    s = discriminator_input(3)
    selected = DiscriminatorInput(s.latents, s.noise, s.cond, torch.tensor([0, 2, 5]))
    assert [r1(discriminator, selected.row(i)) for i in range(3)] == [0.0, 64 * 4.0, 64 * 25.0]  # type: ignore[arg-type]
