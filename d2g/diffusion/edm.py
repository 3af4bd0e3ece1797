"""Schedule and preconditioning of EDM (Karras et al. 2022): x = x_0 + sigma eps, sigma from sigma_max to
0."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from d2g.core.errors import SettingError
from d2g.diffusion.schedule import Denoised, Point

EDMPrediction = Literal["epsilon", "v_prediction"]
"""diffusers' names for the sign of c_out: epsilon is the paper's +, v_prediction is -."""

SigmaGrid = Literal["karras", "exponential"]

LEVELS = 1000
"""Number of noise levels that `EDMSchedule` gives numbers to, in place of timesteps."""


class Preconditioning(NamedTuple):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), eq. 7."""

    c_skip: float
    c_out: float
    c_in: float
    c_noise: float


def preconditioning(sigma: float, sigma_data: float) -> Preconditioning:
    """Table 1, last column, at sigma > 0: input and output have unit variance if the data deviate by
    `sigma_data`."""
    total = math.hypot(sigma, sigma_data)
    return Preconditioning(
        c_skip=(sigma_data / total) ** 2,
        c_out=sigma * sigma_data / total,
        c_in=1 / total,
        c_noise=math.log(sigma) / 4,
    )


def sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float, grid: SigmaGrid) -> list[float]:
    """`steps` noise levels from `sigma_max` down to `sigma_min`, then 0.

    karras: evenly spaced in sigma^(1 / rho), eq. 5; exponential: in log sigma, the limit for large rho.
    """
    ramp = [i / max(steps - 1, 1) for i in range(steps)]
    if grid == "karras":
        high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
        levels = [(high + r * (low - high)) ** rho for r in ramp]
    else:
        levels = [sigma_max * (sigma_min / sigma_max) ** r for r in ramp]
    return [*levels, 0.0]


@dataclass(frozen=True, kw_only=True)
class EDMSchedule:
    """Noise levels and preconditioning of an EDM network, whose time input is c_noise = ln(sigma) / 4.

    Noise is stored with unit variance; the sampler starts from sigma_max times it (Algorithm 1).
    """

    sigma_min: float
    sigma_max: float
    sigma_data: float
    rho: float
    grid: SigmaGrid
    prediction: EDMPrediction

    spacing: Literal["linspace"] = "linspace"  # evenly from end to end, in the quantity of `grid`
    final_alpha_one: bool = True  # the sampler ends at clean data

    def __len__(self) -> int:
        return LEVELS

    def sigma(self, level: Tensor) -> Tensor:
        """sigma, float64 [B], of noise levels 0 to LEVELS - 1 [B]: the grid of LEVELS steps, from sigma_min
        up to sigma_max."""
        ramp = level.to(torch.float64) / (LEVELS - 1)
        if self.grid == "exponential":
            return self.sigma_min * torch.exp(ramp * math.log(self.sigma_max / self.sigma_min))
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.pow(low + ramp * (high - low), self.rho)

    def diffuse(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_0 + sigma eps for x_0 and noise [B, ...] at noise levels [B], in the dtype of x_0."""
        return (x0 + _per_row(self.sigma(timestep.to(x0.device)), x0) * noise).to(x0.dtype)

    def network_at(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input c_in x and its time input c_noise [B], fp32, at noise levels [B]."""
        sigma = self.sigma(timestep.to(x.device))
        c_in = 1 / (sigma.square() + self.sigma_data**2).sqrt()
        return (_per_row(c_in, x) * x).to(x.dtype), (sigma.log() / 4).float()

    def points(self, steps: int, size: tuple[int, int]) -> list[Point]:
        """The `steps` points at which a sampler evaluates the network, and the end, sigma = 0.

        `size`, of the latents, matters for flows only. Raises SettingError for less than one step.
        """
        if steps < 1:
            raise SettingError(f"steps is {steps}; expected 1 or more")
        levels = sigmas(steps, self.sigma_min, self.sigma_max, self.rho, self.grid)
        return [self.point(sigma) for sigma in levels]

    def one_step(self, timestep: int) -> Point:
        """The point of a one-step student, sigma_max. Raises SettingError for any timestep but -1."""
        if timestep != -1:
            raise SettingError(
                f"student_timestep is {timestep}, but the teacher is preconditioned as in EDM, and its "
                f"students start at sigma_max, {self.sigma_max:g}; set student_timestep=-1"
            )
        return self.point(self.sigma_max)

    def point(self, sigma: float) -> Point:
        """The point of the noise level `sigma`, 0 or more."""
        time = preconditioning(sigma, self.sigma_data).c_noise if sigma else -math.inf
        return Point(time, 1.0, sigma)

    def start(self, noise: Tensor) -> Tensor:
        """x at sigma_max, fp32, from noise of unit variance."""
        return self.sigma_max * noise.float()

    def network_input(self, x: Tensor, point: Point) -> Tensor:
        """The network's input, c_in x, fp32."""
        return preconditioning(point.sigma, self.sigma_data).c_in * x.float()

    def x0(self, output: Tensor, x: Tensor, point: Point) -> Tensor:
        """x_0 = D(x; sigma) from the network's output, fp32."""
        c = preconditioning(point.sigma, self.sigma_data)
        return c.c_skip * x.float() + self.sign * c.c_out * output.float()

    def denoised(self, output: Tensor, x: Tensor, point: Point) -> Denoised:
        """x_0 = D and eps = (x - D) / sigma, fp32.

        eps has a formula of its own, because at a small sigma the difference x - D loses its digits.
        """
        c = preconditioning(point.sigma, self.sigma_data)
        epsilon = point.sigma * c.c_in**2 * x.float() - self.sign * self.sigma_data * c.c_in * output.float()
        return Denoised(self.x0(output, x, point), epsilon)

    @property
    def sign(self) -> float:
        """The sign of c_out, by the prediction."""
        return -1.0 if self.prediction == "v_prediction" else 1.0


def _per_row(values: Tensor, x: Tensor) -> Tensor:
    """A number for each row [B], in a shape that multiplies x [B, ...]."""
    return values.view(-1, *[1] * (x.ndim - 1))
