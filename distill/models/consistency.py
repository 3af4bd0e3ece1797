"""Consistency distillation of an EDM teacher (Song et al. 2023, Algorithm 2; method.md "Consistency
distillation").

`ConsistencyStudent` is the student at any noise level, `ConsistencyTarget` the teacher's step to the next
lower level.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.edm import EDMSchedule, sigmas
from distill.models.student import DiffusionStudent


class ConsistencyStudent(DiffusionStudent):
    """A student that takes images of any noise level: f(x, sigma) = c_skip x + c_out F(c_in x, c_noise).

    Without `sigma` it is the one-step student. The coefficients of that student and of f differ at sigma_max
    by at most 2 sigma_min / sigma_max of their size, which is 5e-5 for EDM's levels.
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
        """Predict images x_0 [B, C, h, w], fp32.

        `noise` has unit variance; with `sigma` [B] it holds noisy images of these noise levels instead.
        consistent: use the coefficients of a consistency function, f(x, sigma_min) = x; otherwise those of
        EDM's denoiser.
        """
        if sigma is None:
            self.time_input = self.point.t
            return super().forward(noise, cond, guidance)

        # Coefficients of Song et al. 2023, appendix C; with sigma_min = 0 those of EDM's Table 1.
        x, level = noise.float(), sigma.float().view(-1, 1, 1, 1)
        sigma_data, sigma_min = self.schedule.sigma_data, self.schedule.sigma_min if consistent else 0.0
        total = (level.square() + sigma_data**2).sqrt()
        c_skip = sigma_data**2 / ((level - sigma_min).square() + sigma_data**2)
        c_out = sigma_data * (level - sigma_min) / total

        # The network's input is c_in x, and its time c_noise in fp32.
        self.time_input = sigma.float().log() / 4
        inputs = (x / total).to(next(self.network.parameters()).dtype)
        time = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        output = self.family.forward(
            self.network, self.network.config, inputs, time, cond, self.downscale, None
        )
        with torch.autocast(x.device.type, enabled=False):
            return c_skip * x + self.schedule.sign * c_out * output[:, : x.shape[1]].float()


def wrapper_of(stage: str) -> type[DiffusionStudent]:
    """Return the class of students that the stage trains."""
    return ConsistencyStudent if stage == "cd" else DiffusionStudent


@dataclass(frozen=True)
class ConsistencyTarget:
    """The teacher and the noise levels `sigmas` [N], ascending from sigma_min, between which it steps."""

    teacher: ConsistencyStudent
    sigmas: Tensor

    @classmethod
    def of(cls, teacher: DiffusionStudent, levels: int) -> "ConsistencyTarget":
        """Build the target with N = `levels` noise levels of EDM's grid (eq. 5)."""
        schedule = teacher.schedule
        assert isinstance(teacher, ConsistencyStudent) and isinstance(schedule, EDMSchedule)
        device = next(teacher.parameters()).device
        grid = sigmas(levels, schedule.sigma_min, schedule.sigma_max, schedule.rho, schedule.grid)
        return cls(teacher, torch.tensor(grid[-2::-1], dtype=torch.float32, device=device))

    @torch.no_grad()
    def previous(self, x: Tensor, level: Tensor, cond: Conditioning) -> Tensor:
        """Move noisy images x [B, C, h, w] one noise level down by a Heun step of the teacher.

        level: indices [B] of their noise levels, 1 to N - 1. Takes two evaluations (EDM, Algorithm 1).
        """
        high, low = self.sigmas[level], self.sigmas[level - 1]
        step = (low - high).view(-1, 1, 1, 1)
        derivative = self._derivative(x, high, cond)
        derivative_at_end = self._derivative(x + step * derivative, low, cond)
        return x + step * (derivative + derivative_at_end) / 2

    def _derivative(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """dx / dsigma = (x - D(x; sigma)) / sigma, EDM eq. 3."""
        denoised: Tensor = self.teacher(x, cond, sigma=sigma, consistent=False)
        return (x - denoised) / sigma.view(-1, 1, 1, 1)
