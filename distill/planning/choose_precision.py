"""Decides the arithmetic of a run whose settings leave it to the hardware."""

from dataclasses import replace
from typing import Literal

import torch

from d2g.core.precision import supports_bf16
from distill.config.run import DistillConfig


def with_precision(config: DistillConfig, device: torch.device) -> DistillConfig:
    """The config with `train.precision=auto` replaced by what it means on this device, bf16 or fp32."""
    if config.train.precision != "auto":
        return config
    precision: Literal["fp32", "bf16"] = "bf16" if supports_bf16(device) else "fp32"
    return replace(config, train=replace(config.train, precision=precision))
