"""distill.models.ema: the closed form, its start, and fp32 under modules that are not."""

import pytest
import torch
from torch import nn

from distill.config.run import TrainConfig
from distill.models.ema import EMA


class Module(nn.Module):
    """One weight, and a buffer that counts."""

    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value, dtype=dtype))
        self.count = nn.Buffer(torch.tensor(0))

    def become(self, value: float) -> "Module":
        with torch.no_grad():
            self.weight.fill_(value)
            self.count += 1
        return self


def test_closed_form() -> None:
    """After n updates towards 1 from 0: 1 - beta^n."""
    module = Module(0.0)
    ema = EMA(module, 0.9)
    module.become(1.0)
    for n in range(1, 11):
        ema.update(module, n)
        torch.testing.assert_close(ema.tensors["weight"], torch.full((2,), 1 - 0.9**n))
    assert ema.tensors["count"].item() == 1


def test_half_life_does_not_depend_on_the_batch_size() -> None:
    for batch_size in (1, 8, 40):
        config = TrainConfig(batch_size=batch_size, ema_halflife_images=80)
        assert config.ema_decay ** (80 / batch_size) == pytest.approx(0.5)
    assert TrainConfig(ema_beta=0.3).ema_decay == 0.3


def test_a_plain_copy_until_the_start() -> None:
    module = Module(0.0)
    ema = EMA(module, 0.9, start_nimg=100)
    ema.update(module.become(5.0), 99)
    assert torch.equal(ema.tensors["weight"], torch.full((2,), 5.0))
    ema.update(module.become(6.0), 100)
    torch.testing.assert_close(ema.tensors["weight"], torch.full((2,), 5.1))


def test_a_bf16_module_still_moves_an_fp32_average() -> None:
    module = Module(1.0, torch.bfloat16)
    ema = EMA(module, 0.9999)
    module.become(2.0)
    for n in range(10):
        ema.update(module, n)
    assert ema.tensors["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.tensors["weight"], torch.full((2,), 2 - 0.9999**10))
    assert (torch.tensor(1.0, dtype=torch.bfloat16) + 1e-4 == 1).all()  # where a bf16 average would stay


def test_it_is_no_view_of_the_module() -> None:
    module = Module(1.0)
    ema = EMA(module, 0.5)
    module.become(3.0)
    assert torch.equal(ema.tensors["weight"], torch.ones(2))


def test_load_and_copy() -> None:
    ema, other = EMA(Module(1.0), 0.5), EMA(Module(4.0), 0.5)
    ema.load(other.tensors)
    module = Module(0.0)
    ema.copy_to(module)
    assert torch.equal(module.weight.detach(), torch.full((2,), 4.0))
    with pytest.raises(ValueError, match="bias"):
        ema.load({**other.tensors, "bias": torch.zeros(1)})
