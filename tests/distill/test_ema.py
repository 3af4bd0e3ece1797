"""distill.models.ema: closed form, start of averaging, fp32 averages of lower-precision modules."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from distill.config.discriminator import DiscriminatorConfig
from distill.config.run import DistillConfig, TrainConfig
from distill.models.ema import EMA


class Module(nn.Module):
    """One weight and an integer buffer."""

    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value, dtype=dtype))
        self.count = nn.Buffer(torch.tensor(0))

    def set_weight(self, value: float) -> "Module":
        with torch.no_grad():
            self.weight.fill_(value)
            self.count += 1
        return self


def test_closed_form() -> None:
    """After n updates from 0 with a constant weight of 1, the average is 1 - beta^n."""
    module = Module(0.0)
    ema = EMA(module, 0.9)
    module.set_weight(1.0)
    for n in range(1, 11):
        ema.update(module, n)
        torch.testing.assert_close(ema.tensors["weight"], torch.full((2,), 1 - 0.9**n))
    assert ema.tensors["count"].item() == 1


@pytest.mark.parametrize("d_steps", [1, 5])
def test_half_life_depends_on_neither_batch_size_nor_d_steps(d_steps: int) -> None:
    gan = DiscriminatorConfig(d_steps_per_g_step=d_steps, mix_fraction=0.0)
    for batch_size in (1, 8, 40):
        train = TrainConfig(batch_size=batch_size, ema_halflife_images=80)
        config = DistillConfig(stage="gan", gan=gan, train=train)
        assert config.ema_decay ** (80 / batch_size / d_steps) == pytest.approx(0.5)
        assert replace(config, stage="ode").ema_decay ** (80 / batch_size) == pytest.approx(0.5)
        assert replace(config, train=replace(train, ema_halflife_images=0)).ema_decay == train.ema_beta


@pytest.mark.parametrize(("beta", "copies"), [(0.0, True), (1e-30, True), (0.1, False)])
def test_a_decay_near_zero_copies(beta: float, copies: bool) -> None:
    module = Module(0.0)
    ema = EMA(module, beta)
    ema.update(module.set_weight(5.0), 1)
    assert ema.copies == copies == (ema.drift(module) == 0)


def test_ema_is_a_copy_until_its_start() -> None:
    module = Module(0.0)
    ema = EMA(module, 0.9, start_nimg=100)
    ema.update(module.set_weight(5.0), 99)
    assert torch.equal(ema.tensors["weight"], torch.full((2,), 5.0))
    ema.update(module.set_weight(6.0), 100)
    torch.testing.assert_close(ema.tensors["weight"], torch.full((2,), 5.1))


def test_average_of_a_bf16_module_is_fp32() -> None:
    module = Module(1.0, torch.bfloat16)
    ema = EMA(module, 0.9999)
    module.set_weight(2.0)
    for n in range(10):
        ema.update(module, n)
    assert ema.tensors["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.tensors["weight"], torch.full((2,), 2 - 0.9999**10))
    assert (torch.tensor(1.0, dtype=torch.bfloat16) + 1e-4 == 1).all()  # a bf16 average would not change


def test_ema_does_not_share_memory_with_the_module() -> None:
    module = Module(1.0)
    ema = EMA(module, 0.5)
    module.set_weight(3.0)
    assert torch.equal(ema.tensors["weight"], torch.ones(2))


def test_load_and_copy_to() -> None:
    ema, other = EMA(Module(1.0), 0.5), EMA(Module(4.0), 0.5)
    ema.load(other.tensors)
    module = Module(0.0)
    ema.copy_to(module)
    assert torch.equal(module.weight.detach(), torch.full((2,), 4.0))
    with pytest.raises(ValueError, match="bias"):
        ema.load({**other.tensors, "bias": torch.zeros(1)})
