"""The one-step student: the teacher's UNet at one fixed timestep, turned into a data prediction."""

from typing import Any

import torch
from torch import Tensor, nn

from core import pretrained
from core.errors import SettingError
from core.schedule import Schedule, predict_x0


class Student(nn.Module):
    """G(z, c) = (z - sigma_T eps(z, c, T)) / alpha_T (supplement eq. 2; other predictions: method.md 2).

    A fixed wrapper without parameters of its own; the combination runs in fp32 whatever the network runs in.
    """

    def __init__(self, unet: Any, schedule: Schedule, timestep: int = -1) -> None:
        super().__init__()
        self.timestep = len(schedule) - 1 if timestep == -1 else timestep
        if not 0 <= self.timestep < len(schedule):
            raise SettingError(
                f"student_timestep is {timestep}; expected 0 to {len(schedule) - 1}, or -1 for the last"
            )
        self.unet: Any = unet
        self.prediction = schedule.prediction
        self.alpha, self.sigma = schedule.alpha_sigma(self.timestep)

    def forward(self, noise: Tensor, text: Tensor) -> Tensor:
        """noise [B, C, h, w] ~ N(0, 1) and text hidden states [B, L, D] -> scaled latents [B, C, h, w],
        fp32.
        """
        dtype = next(self.unet.parameters()).dtype
        output = self.unet(noise.to(dtype), self.timestep, text.to(dtype)).sample
        with torch.autocast(noise.device.type, enabled=False):
            return predict_x0(output, noise, self.alpha, self.sigma, self.prediction)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) that the UNet was trained at."""
        config = self.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(config.in_channels), int(height), int(width)


def student_from_teacher(teacher: str, timestep: int = -1) -> Student:
    """A student that starts as the teacher: its output is the teacher's own x0 prediction at T."""
    return Student(pretrained.load_unet(teacher), pretrained.load_schedule(teacher), timestep)
