"""distill.training.optim: which optimizer, and the learning rate as a function of images."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2g.core.config import override
from d2g_cli.distill import _warn_of_ended_rates
from distill.config.optim import OptimConfig
from distill.config.presets import DISTILL_PRESETS
from distill.training.optim import (
    images_at_rate_zero,
    learning_rate,
    optimizer,
    step_and_restore,
    step_unless,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([nn.Linear(3, 3)])
        self.rest = nn.Linear(3, 3)
        self.large = nn.Linear(64, 64)  # enough weights for moments in 8 bits
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", "AdamW"),
        ("adamw_fused", "AdamW"),
        ("adamw_8bit", "LowMemoryAdamW"),
        ("adam", "Adam"),
        ("radam", "RAdam"),
    ],
)
def test_optimizer_names(name: Any, kind: str) -> None:
    config = OptimConfig(name=name, lr=0.01, betas=(0.5, 0.9))
    adam = optimizer(Net(), config)
    assert type(adam).__name__ == kind
    assert [len(g["params"]) for g in adam.param_groups] == [2, 4]
    assert [g["weight_decay"] for g in adam.param_groups] == [1e-5, 1e-2]
    for group in adam.param_groups:
        assert (group["lr"], group["betas"]) == (0.01, (0.5, 0.9))
        assert group.get("fused") is (True if name == "adamw_fused" else None)


@pytest.mark.parametrize("name", ["adamw", "adamw_fused", "adamw_8bit", "radam"])
def test_weight_decay_is_decoupled(name: Any) -> None:
    """With zero gradients a step multiplies by 1 - lr * decay; coupled decay moves weights by about lr."""
    net = Net()
    before = net.rest.weight.detach().clone()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer(net, OptimConfig(name=name, lr=0.1, weight_decay=0.5)).step()
    torch.testing.assert_close(net.rest.weight.detach(), before * (1 - 0.1 * 0.5))


def test_weight_decay_of_adam_is_part_of_the_gradient() -> None:
    """With zero gradients Adam's first step moves every weight by lr towards zero."""
    net = Net()
    before = net.rest.weight.detach().clone()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer(net, OptimConfig(name="adam", lr=0.1, weight_decay=0.5)).step()
    torch.testing.assert_close(net.rest.weight.detach(), before - 0.1 * before.sign(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("good_steps", [0, 2])
@pytest.mark.parametrize("step", [step_unless, step_and_restore])
@pytest.mark.parametrize("name", ["adamw", "adamw_fused", "adamw_8bit", "adam", "radam"])
def test_a_stopped_step_keeps_every_bit_of_weights_and_states(
    name: Any, step: Callable[[torch.optim.Optimizer, Tensor], None], good_steps: int
) -> None:
    net, reference = Net(), Net()
    reference.load_state_dict(net.state_dict())
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.5)
    adam, expected = optimizer(net, config), optimizer(reference, config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(good_steps):
        for p, q in zip(net.parameters(), reference.parameters(), strict=True):
            p.grad = q.grad = torch.randn(p.shape, generator=generator)
        step(adam, torch.tensor(0.0))
        expected.step()
    for p in net.parameters():
        p.grad = torch.full_like(p, math.nan)
    for _ in range(2):
        step(adam, torch.tensor(1.0))
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in adam.state[p].items() if p in adam.state else ():
            assert torch.equal(value, expected.state[q].get(key, torch.zeros_like(value)))


def rates(config: OptimConfig, *images: int) -> list[float]:
    return [learning_rate(n, config, 4, 50) for n in images]


def test_learning_rates_are_functions_of_images() -> None:
    assert rates(OptimConfig(lr=2.0), 0, 10**9) == [2.0, 2.0]
    assert rates(OptimConfig(lr=2.0, warmup_images=16), 0, 4, 12, 100) == [0.5, 1.0, 2.0, 2.0]
    cosine = OptimConfig(lr=2.0, decay_images=100)
    assert rates(cosine, 0, 50, 100, 200) == pytest.approx([2.0, 1.0, 0.0, 0.0])
    assert learning_rate(25, cosine, 4, 50) == pytest.approx(1 + math.cos(math.pi / 4))
    assert rates(OptimConfig(lr=2.0, decay_images=-1), 0, 25, 50) == pytest.approx([2.0, 1.0, 0.0])
    linear = OptimConfig(lr=2.0, decay_images=100, decay="linear", final_lr=1.0)
    assert rates(linear, 0, 25, 100, 900) == pytest.approx([2.0, 1.75, 1.0, 1.0])
    step = OptimConfig(lr=1e-4, decay_images=100, decay="step", final_lr=1e-5)
    assert rates(step, 0, 99, 100) == pytest.approx([1e-4, 1e-4, 1e-5])
    both = OptimConfig(lr=2.0, warmup_images=8, decay_images=100, final_lr=0.5)
    assert rates(both, 0, 50, 100) == pytest.approx([1.0, 1.25, 0.5])


def test_a_rate_that_is_zero_before_the_end_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    config = OptimConfig(lr=2.0, decay_images=100)
    assert rates(config, 100, 119) == [0.0, 0.0] and images_at_rate_zero(config, 120) == 20
    falling = {"decay_images": 100, "final_lr": 1.0}
    for settings in ({}, {"decay_images": 120}, {"decay_images": -1}, falling):
        assert images_at_rate_zero(OptimConfig(lr=2.0, **settings), 120) == 0

    gan = DISTILL_PRESETS["miniature"]["gan"]
    _warn_of_ended_rates(gan)
    _warn_of_ended_rates(override(gan, ["gan.optim.decay_images=12000", "optim.decay_images=13000"]))
    assert caplog.messages == []
    _warn_of_ended_rates(override(gan, ["gan.optim.decay_images=9000"]))
    (message,) = caplog.messages
    assert message.startswith(
        "gan.optim.decay_images is 9000 and train.images 12000, so the learning rate is 0"
    )
    assert "for the last 3000 images; set gan.optim.decay_images=-1" in message
