"""Consistency distillation of an EDM teacher (Song et al. 2023, Algorithm 2; method.md "Consistency
distillation"): the student at any noise level, and the target that one step of the teacher gives it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.edm import EDMSchedule, sigmas
from distill.models.student import DiffusionStudent


class ConsistencyStudent(DiffusionStudent):
    """A student that takes images of any noise level: f(x, sigma) = c_skip x + c_out F(c_in x, c_noise).

    Without `sigma` it is the one-step student, whose coefficients differ at sigma_max from those of f by at
    most 2 sigma_min / sigma_max of their size, 5e-5 for EDM's levels.
    """

    def __init__(self, network: Any, *args: Any, **options: Any) -> None:
        super().__init__(network, *args, **options)
        assert isinstance(self.schedule, EDMSchedule), "check_teacher must run first"
        self.schedule: EDMSchedule

    def forward(
        self,
        noise: Tensor,
        cond: Conditioning,
        guidance: Tensor | None = None,
        sigma: Tensor | None = None,
        consistent: bool = True,
    ) -> Tensor:
        """Images x_0 [B, C, h, w], fp32, from noise of unit variance, or with `sigma` [B] from images with
        noise of these levels.

        consistent: with the coefficients of a consistency function, f(x, sigma_min) = x; otherwise with
        EDM's, which make the denoiser.
        """
        if sigma is None:
            self.time_input = self.point.t
            return super().forward(noise, cond, guidance)
        x, level = noise.float(), sigma.float().view(-1, 1, 1, 1)
        data, least = self.schedule.sigma_data, self.schedule.sigma_min if consistent else 0.0
        total = (level.square() + data**2).sqrt()
        # Coefficients of Song et al. 2023, appendix C; with sigma_min = 0 those of EDM's Table 1.
        c_skip = data**2 / ((level - least).square() + data**2)
        c_out = data * (level - least) / total
        # The network sees c_in x, and c_noise in fp32.
        self.time_input = sigma.float().log() / 4
        inputs = (x / total).to(next(self.network.parameters()).dtype)
        time = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        output = self.family.forward(
            self.network, self.network.config, inputs, time, cond, self.downscale, None
        )
        with torch.autocast(x.device.type, enabled=False):
            return c_skip * x + self.schedule.sign * c_out * output[:, : x.shape[1]].float()


def wrapper_of(stage: str) -> type[DiffusionStudent]:
    """The class of the students that a stage trains."""
    return ConsistencyStudent if stage == "cd" else DiffusionStudent


@dataclass(frozen=True)
class ConsistencyTarget:
    """The teacher, and the noise levels [N] between which it takes its steps, from sigma_min up."""

    teacher: ConsistencyStudent
    sigmas: Tensor

    @classmethod
    def of(cls, teacher: DiffusionStudent, levels: int) -> "ConsistencyTarget":
        """N = `levels` noise levels of EDM's grid (eq. 5)."""
        schedule = teacher.schedule
        assert isinstance(teacher, ConsistencyStudent) and isinstance(schedule, EDMSchedule)
        device = next(teacher.parameters()).device
        grid = sigmas(levels, schedule.sigma_min, schedule.sigma_max, schedule.rho, schedule.grid)
        return cls(teacher, torch.tensor(grid[-2::-1], dtype=torch.float32, device=device))

    @torch.no_grad()
    def previous(self, x: Tensor, level: Tensor, cond: Conditioning) -> Tensor:
        """x [B, C, h, w] at the levels of these numbers [B], 1 to N - 1, moved to the level below by a Heun
        step of the teacher (EDM, Algorithm 1): two evaluations."""
        high, low = self.sigmas[level], self.sigmas[level - 1]
        step = (low - high).view(-1, 1, 1, 1)
        first = self._slope(x, high, cond)
        second = self._slope(x + step * first, low, cond)
        return x + step * (first + second) / 2

    def _slope(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """dx / dsigma = (x - D(x; sigma)) / sigma, EDM eq. 3."""
        denoised: Tensor = self.teacher(x, cond, sigma=sigma, consistent=False)
        return (x - denoised) / sigma.view(-1, 1, 1, 1)
