"""Exponential moving average of weights, in fp32: a bf16 average with beta 0.9999 never moves (method.md "EMA
in bf16").
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from d2g.core.distributed import process_group
from d2g.core.distributed.engine import local_shard, shard_like


class EMA:
    """fp32 average of a module's parameters and buffers; plain copies until `start_nimg` images.

    Of a module in shards (FSDP2) each rank averages its own.
    """

    def __init__(self, module: nn.Module, beta: float, start_nimg: int = 0) -> None:
        self.beta, self.start_nimg = beta, start_nimg
        self.tensors = {k: _widened(v) for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, nimg: int) -> None:
        """avg <- beta avg + (1 - beta) weights; before `start_nimg`, avg <- weights. Integer buffers are
        copied.
        """
        beta = self.beta if nimg >= self.start_nimg else 0.0
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for name, value in module.state_dict().items():
            average = local_shard(self.tensors[name])
            if average.is_floating_point():
                averages.append(average)
                values.append(local_shard(value).detach().to(average))
            else:
                average.copy_(local_shard(value))
        torch._foreach_lerp_(averages, values, 1.0 - beta)  # one launch for a thousand tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the averages by whole tensors; names must agree."""
        if set(tensors) != set(self.tensors):
            raise ValueError(f"EMA names differ: {sorted(set(tensors) ^ set(self.tensors))[:3]}")
        for name, value in tensors.items():
            average = self.tensors[name]
            local_shard(average).copy_(local_shard(shard_like(value, average)))

    @torch.no_grad()
    def drift(self, module: nn.Module) -> float:
        """|avg - weights| / |weights|, all of them as one vector. On every rank."""
        apart = size = torch.zeros((), dtype=torch.float64)
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                average, weights = local_shard(self.tensors[name]), local_shard(value).float()
                apart = apart.to(weights.device) + (average - weights).square().sum()
                size = size.to(weights.device) + weights.square().sum()
        sums = process_group.mean({"apart": float(apart), "size": float(size)})  # of shards, or of equals
        return math.sqrt(sums["apart"] / sums["size"])

    def copy_to(self, module: nn.Module) -> None:
        """Put the averages into a module of the same structure, sharded alike."""
        module.load_state_dict(self.tensors, strict=True)


def _widened(value: Tensor) -> Tensor:
    return value.detach().clone().float() if value.is_floating_point() else value.detach().clone()
