"""The one-step student: the teacher's UNet at one fixed timestep, turned into a data prediction."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from core import pretrained
from core.errors import SettingError
from core.lora import add_lora
from core.schedule import Schedule, predict_x0
from core.seeds import generator
from core.text import Told, added_conditions, as_text
from distill.options import StudentConfig

GUIDANCE_WIDTH = 256
"""Sines and cosines that tell the guidance scale, as in latent consistency models."""


class Student(nn.Module):
    """G(z, c) = (z - sigma_T eps(z, c, T)) / alpha_T (supplement eq. 2; other predictions: method.md 2).

    A fixed wrapper without parameters of its own; the combination runs in fp32 whatever the network runs in.
    `downscale`: pixels of a picture's side by its latents', which SDXL's U-Net is told.
    """

    def __init__(self, unet: Any, schedule: Schedule, timestep: int = -1, downscale: int = 8) -> None:
        super().__init__()
        self.timestep = len(schedule) - 1 if timestep == -1 else timestep
        if not 0 <= self.timestep < len(schedule):
            raise SettingError(
                f"student_timestep is {timestep}; expected 0 to {len(schedule) - 1}, or -1 for the last"
            )
        self.unet: Any = unet
        self.prediction, self.downscale = schedule.prediction, downscale
        self.alpha, self.sigma = schedule.alpha_sigma(self.timestep)

    def forward(self, noise: Tensor, text: Told, guidance: Tensor | None = None) -> Tensor:
        """noise [B, C, h, w] ~ N(0, 1), text of B rows -> scaled latents [B, C, h, w], fp32.

        guidance [B]: the scale of classifier-free guidance to imitate, for a student that is told it.
        """
        dtype = next(self.unet.parameters()).dtype
        text, x = as_text(text), noise.to(dtype)
        told: Tensor | None = None
        if (width := self.unet.config.time_cond_proj_dim) is not None:
            assert guidance is not None and guidance.shape == noise.shape[:1], (
                "one guidance scale for each row"
            )
            told = guidance_embedding(guidance.to(noise.device), width).to(dtype)
        output = self.unet(
            x,
            self.timestep,
            text.hidden.to(dtype),
            timestep_cond=told,
            added_cond_kwargs=added_conditions(self.unet, text, x, self.downscale),
        ).sample
        with torch.autocast(noise.device.type, enabled=False):
            return predict_x0(output, noise, self.alpha, self.sigma, self.prediction)

    @property
    def guided(self) -> bool:
        """Whether it is told the guidance scale."""
        return self.unet.config.time_cond_proj_dim is not None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) that the UNet was trained at."""
        config = self.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(config.in_channels), int(height), int(width)


def student_from_teacher(
    teacher: str, timestep: int = -1, config: StudentConfig | None = None, seed: int = 0
) -> Student:
    """A student that starts as the teacher: its output is the teacher's own x0 prediction at T.

    config: what it has beside the teacher's network (`equip`); `seed` draws the adapters.
    """
    unet = pretrained.load_unet(teacher)
    student = Student(unet, pretrained.load_schedule(teacher), timestep, pretrained.latent_downscale(teacher))
    return equip(student, config, seed) if config is not None else student


def equip(student: Student, config: StudentConfig, seed: int = 0) -> Student:
    """Dropout, adapters and guidance input into a student, which still gives what it gave (dropout aside)."""
    if config.dropout:
        for module in student.unet.modules():
            if type(module).__name__.startswith("ResnetBlock"):
                module.dropout.p = config.dropout
                module.dropout.train()  # the rest of a U-Net is the same in training and use
    if config.lora_rank:
        add_lora(student.unet, config.lora_rank, config.alpha, generator(seed, 0x10BA))
    if config.guidance_conditioning and not student.guided:
        told_guidance(student.unet)
    return student


def told_guidance(unet: Any) -> None:
    """Give a U-Net the input of `timestep_cond` that diffusers' pipelines feed with the guidance scale.

    Its weight is zero: the network starts as it was.
    """
    first = unet.time_embedding.linear_1
    projection = nn.utils.skip_init(nn.Linear, GUIDANCE_WIDTH, first.in_features, bias=False)
    nn.init.zeros_(projection.weight)
    unet.time_embedding.cond_proj = projection.to(first.weight)
    unet.register_to_config(time_cond_proj_dim=GUIDANCE_WIDTH)


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """[B] -> [B, width] fp32: sines, then cosines, of 1000 (w - 1) at `width` / 2 frequencies from 1 down to
    1e-4, as diffusers' pipelines tell a latent consistency model its scale (Luo et al. 2023).
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=guidance.device) * (-math.log(10_000) / (half - 1)))
    angles = 1000 * (guidance.float() - 1)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def train_only(student: Student, config: StudentConfig) -> None:
    """Gradients for what is trained: everything, or with LoRA the adapters and the guidance input."""
    student.requires_grad_(not config.lora_rank)
    if config.lora_rank:
        for name, parameter in student.named_parameters():
            parameter.requires_grad = ".lora_" in name or name.endswith("cond_proj.weight")
