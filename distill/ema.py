"""Exponential moving average of weights, in fp32: a bf16 average with beta 0.9999 never moves (method.md
10.6).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """fp32 average of a module's parameters and buffers; plain copies until `start_nimg` images."""

    def __init__(self, module: nn.Module, beta: float, start_nimg: int = 0) -> None:
        self.beta, self.start_nimg = beta, start_nimg
        self.tensors = {k: _widened(v) for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, nimg: int) -> None:
        """avg <- beta avg + (1 - beta) weights; before `start_nimg`, avg <- weights. Integer buffers are
        copied.
        """
        beta = self.beta if nimg >= self.start_nimg else 0.0
        for name, value in module.state_dict().items():
            average = self.tensors[name]
            if average.is_floating_point():
                average.lerp_(value.to(average), 1.0 - beta)
            else:
                average.copy_(value)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the averages; names must agree."""
        if set(tensors) != set(self.tensors):
            raise ValueError(f"EMA names differ: {sorted(set(tensors) ^ set(self.tensors))[:3]}")
        for name, value in tensors.items():
            self.tensors[name].copy_(value)

    def copy_to(self, module: nn.Module) -> None:
        """Put the averages into a module of the same structure."""
        module.load_state_dict(self.tensors, strict=True)


def _widened(value: Tensor) -> Tensor:
    return value.detach().clone().float() if value.is_floating_point() else value.detach().clone()
