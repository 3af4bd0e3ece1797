"""Training of a teacher's network in bf16 on a CPU."""

import torch
from torch import Tensor

from d2g.core.precision import supports_bf16
from teacher_training.config import TeacherConfig
from teacher_training.loop import LossFn


def trains_in_bf16(config: TeacherConfig) -> bool:
    """Whether `config.precision` means bf16 on this machine."""
    return config.precision == "bf16" or (config.precision == "auto" and supports_bf16(torch.device("cpu")))


def with_precision(loss_of: LossFn, config: TeacherConfig) -> LossFn:
    """The loss with its networks in the precision of the settings: bf16 is autocast."""
    half = trains_in_bf16(config)

    def in_precision(rows: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return loss_of(rows, generator)

    return in_precision
