"""distill.r1 against finite differences in float64, on a tiny UNet with every zero weight set moving."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.seeds import generator
from distill.config import DiscriminatorConfig
from distill.discriminator import Discriminator, discriminator_from_teacher
from distill.r1 import r1_penalty


@pytest.fixture(scope="module")
def judge(teacher: Path) -> Discriminator:
    """float64, and with nothing at zero, so that every path of the gradient counts."""
    made = discriminator_from_teacher(str(teacher), DiscriminatorConfig(), generator(0))
    rng = torch.Generator().manual_seed(5)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3, generator=rng)
    return made.double()


def inputs(batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(batch, 4, 4, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    return x, noise, torch.randn(batch, 12, 16, generator=rng, dtype=torch.float64)


@torch.no_grad()
def score(judge: Discriminator, x: Tensor, noise: Tensor, text: Tensor) -> float:
    return float(sum(head.mean() for head in judge(x, noise, text).values()))


def test_the_penalty_is_the_squared_norm_of_finite_differences(judge: Discriminator) -> None:
    x, noise, text = inputs()
    step, total = 1e-5, 0.0
    for position in range(x.numel()):
        shift = torch.zeros_like(x)
        shift.view(-1)[position] = step
        slope = (score(judge, x + shift, noise, text) - score(judge, x - shift, noise, text)) / (2 * step)
        total += slope**2
    penalty = r1_penalty(judge, x, noise, text)
    assert penalty.dtype == torch.float64 and total > 1e-3
    assert penalty.item() == pytest.approx(total, rel=1e-6)


def test_the_penaltys_gradient_equals_finite_differences(judge: Discriminator) -> None:
    """Along random directions, for each kind of parameter: trunk, attention, noise, scales, heads."""
    x, noise, text = inputs()
    judge.zero_grad()
    r1_penalty(judge, x, noise, text).backward()
    named = {n: p for n, p in judge.named_parameters() if p.requires_grad}
    kinds = {
        "noise": [n for n in named if n.startswith("conv_z")],
        "scales": [n for n in named if n.startswith("conv_scale")],
        "heads": [n for n in named if n.startswith("heads")],
        "attention": [n for n in named if ".attentions." in n],
        "trunk": [n for n in named if n.startswith("unet.") and ".attentions." not in n],
    }
    rng, step = torch.Generator().manual_seed(2), 1e-6
    for kind, names in kinds.items():
        direction = {n: torch.randn(named[n].shape, generator=rng, dtype=torch.float64) for n in names}
        gradients = {
            n: named[n].grad if named[n].grad is not None else torch.zeros_like(named[n]) for n in names
        }
        slope = sum((gradients[n] * direction[n]).sum().item() for n in names)  # type: ignore[operator]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for n in names:
                    named[n].add_(sign * step * direction[n])
            values.append(r1_penalty(judge, x, noise, text).item())
            with torch.no_grad():
                for n in names:
                    named[n].sub_(sign * step * direction[n])
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-6), kind
        assert abs(slope) > 1e-6, kind


def test_rows_are_averaged(judge: Discriminator) -> None:
    x, noise, text = inputs(3)
    each = [r1_penalty(judge, x[i : i + 1], noise[i : i + 1], text[i : i + 1]).item() for i in range(3)]
    assert r1_penalty(judge, x, noise, text).item() == pytest.approx(sum(each) / 3, rel=1e-9)


def test_attention_has_a_second_derivative_where_flash_has_none(teacher: Path) -> None:
    made = discriminator_from_teacher(str(teacher), DiscriminatorConfig(), generator(0))
    x, noise, text = (t.float() for t in inputs())
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        moving = x.clone().requires_grad_(True)
        total = torch.stack([head.mean() for head in made(moving, noise, text).values()]).sum()
        (gradient,) = torch.autograd.grad(total, moving, create_graph=True)
        with pytest.raises(RuntimeError, match="derivative"):
            gradient.square().sum().backward()
        made.zero_grad()
        r1_penalty(made, x, noise, text).backward()  # even where the caller asks for flash
    inside = [p.grad for n, p in made.named_parameters() if ".attentions." in n and p.grad is not None]
    assert inside and all(torch.isfinite(g).all() for g in inside) and any(g.abs().max() > 0 for g in inside)


def test_it_is_fp32_under_autocast_and_leaves_the_input_alone(teacher: Path) -> None:
    made = discriminator_from_teacher(str(teacher), DiscriminatorConfig(), generator(0))
    x, noise, text = (t.float() for t in inputs())
    expected = r1_penalty(made, x, noise, text)
    with torch.autocast("cpu", torch.bfloat16):
        found = r1_penalty(made, x, noise, text)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert not x.requires_grad and x.grad is None
