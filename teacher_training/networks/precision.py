"""Training of a teacher's network in bf16."""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2g.core.precision import supports_bf16
from d2g.core.transfer import device_of
from d2g.diffusion.fp32_attention import use_fp32_attention
from teacher_training.config import TeacherConfig
from teacher_training.loop import LossFn
from teacher_training.networks.kind import TrainableNetwork


def trains_in_bf16(config: TeacherConfig, device: torch.device) -> bool:
    """Whether `config.precision` means bf16 on this device."""
    return config.precision == "bf16" or (config.precision == "auto" and supports_bf16(device))


def loss_in_precision(
    network: TrainableNetwork, inputs: Tensor, prompts: Sequence[str], config: TeacherConfig
) -> LossFn:
    """The network's loss in the precision of the settings, on the network's device. bf16 is autocast."""
    modules = list(network.modules.values())
    device = device_of(modules[0])
    half = trains_in_bf16(config, device)
    if half and device.type == "cpu":
        for module in modules:
            use_fp32_attention(module)
    loss_of = network.loss(inputs, prompts)

    def in_precision(rows: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return loss_of(rows, generator)

    return in_precision
