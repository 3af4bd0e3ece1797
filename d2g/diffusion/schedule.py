"""Noise schedules, x = alpha x_0 + sigma eps, and the conversions between a network's predictions.

Here are variance-preserving schedules over a table of timesteps (`Schedule`) and in continuous time
(`CosineSchedule`), and rectified flows, where alpha = 1 - s and sigma = s (`FlowSchedule`). EDM's schedule,
where alpha = 1, is in d2g/diffusion/edm.py.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2g.core.errors import SettingError, UserError

Prediction = Literal["epsilon", "v_prediction", "sample"]
FlowPrediction = Literal["flow_prediction"]
Spacing = Literal["leading", "trailing", "linspace"]

NO_SIGNAL = 1e-6
"""Below this alpha, x is noise only (zero terminal SNR), and nothing may be divided by alpha."""


COSINE_STEPS = 1000
"""Number of timesteps in which `CosineSchedule` counts its continuous time."""


class Point(NamedTuple):
    """One point between noise and data: x = alpha x_0 + sigma eps; `t` is the network's time input there."""

    t: float
    alpha: float
    sigma: float


class Denoised(NamedTuple):
    """A network's prediction at one point, fp32 [B, C, h, w] each: x = alpha x0 + sigma epsilon."""

    x0: Tensor
    epsilon: Tensor


class _UnscaledInput:
    """Schedules whose networks take x itself, and whose samplers start from noise of unit variance."""

    prediction: Prediction | FlowPrediction

    def start(self, noise: Tensor) -> Tensor:
        """x at the first point: the noise, although a VP schedule's alpha need not be 0 there (method.md
        "Student generator").
        """
        return noise.float()

    def network_input(self, x: Tensor, point: Point) -> Tensor:
        """The network's input at `point`, from x [B, C, h, w]."""
        return x

    def network_at(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input and its time input [B] at timesteps [B]: both unchanged."""
        return x, timestep

    def denoised(self, output: Tensor, x: Tensor, point: Point) -> Denoised:
        """x_0 and epsilon from a network's output, fp32; see `denoised_from`."""
        return denoised_from(output, x, point, self.prediction)


@dataclass(frozen=True, kw_only=True)
class Schedule(_UnscaledInput):
    """A variance-preserving discrete schedule. `alphas_cumprod`: float64 [T], alpha_t^2 (method.md
    "Solver equations").
    """

    alphas_cumprod: Tensor
    prediction: Prediction
    spacing: Spacing
    steps_offset: int
    final_alpha_one: bool

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def alpha_sigma(self, timestep: int) -> tuple[float, float]:
        """(alpha_t, sigma_t) at an integer timestep. -1 is the end: clean data if `final_alpha_one`, else the
        first entry of the table, as in diffusers' DDIM (`set_alpha_to_one`)."""
        if timestep < 0:
            bar = 1.0 if self.final_alpha_one else float(self.alphas_cumprod[0])
        else:
            bar = float(self.alphas_cumprod[timestep])
        return bar**0.5, (1.0 - bar) ** 0.5

    def points(self, steps: int, size: tuple[int, int]) -> list[Point]:
        """The `steps` points at which a sampler evaluates the network, and the point where it ends.

        `size` (latent height and width) matters for flows only. Raises SettingError as `timesteps` does.
        """
        grid = timesteps(len(self), steps, self.spacing, self.steps_offset)
        return [Point(t, *self.alpha_sigma(t)) for t in [*grid, -1]]

    def one_step(self, timestep: int) -> Point:
        """The point of a one-step student; -1: the last timestep. Raises SettingError if out of range."""
        t = len(self) - 1 if timestep == -1 else timestep
        if not 0 <= t < len(self):
            raise SettingError(
                f"student_timestep is {timestep}; expected 0 to {len(self) - 1}, or -1 for the last"
            )
        return Point(t, *self.alpha_sigma(t))

    def x0(self, output: Tensor, x: Tensor, point: Point) -> Tensor:
        """x_0 from a network's output, fp32."""
        return predict_x0(output, x, point.alpha, point.sigma, self.prediction)

    def diffuse(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t for x_0 and noise [B, ...] at timesteps [B]; see `diffuse`."""
        return diffuse(x0, noise, self.alphas_cumprod, timestep)


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(_UnscaledInput):
    """The cosine schedule in continuous time r from 1 to 0 of Wuerstchen and Stable Cascade, for epsilon.

    alpha_bar(r) = cos^2(pi / 2 (u + s) / (1 + s)) / cos^2(pi / 2 s / (1 + s)), clamped to [1e-4, 0.9999],
    where `scaler` moves r to u as diffusers' DDPMWuerstchenScheduler does. `offset`: s. Times are counted in
    `COSINE_STEPS` steps, as timesteps of other schedules; networks take r.
    """

    scaler: float
    offset: float
    final_alpha_one: bool

    prediction: Prediction = "epsilon"
    spacing: Literal["linspace"] = "linspace"

    def __len__(self) -> int:
        return COSINE_STEPS

    def alpha_bar(self, timestep: Tensor) -> Tensor:
        """alpha^2, float64, at timesteps of any shape, 0 to COSINE_STEPS."""
        r = timestep.to(torch.float64) / COSINE_STEPS
        if self.scaler > 1:
            r = 1 - (1 - r) ** self.scaler
        elif self.scaler < 1:
            r = r**self.scaler
        quarter = math.pi / 2 / (1 + self.offset)
        bar = torch.cos((r + self.offset) * quarter) ** 2 / math.cos(self.offset * quarter) ** 2
        return bar.clamp(1e-4, 0.9999)

    def alpha_sigma(self, timestep: float) -> tuple[float, float]:
        """(alpha, sigma) at a timestep. -1 is the end: clean data if `final_alpha_one`, else r = 0."""
        bar = float(self.alpha_bar(torch.tensor(max(timestep, 0.0), dtype=torch.float64)))
        bar = 1.0 if timestep < 0 and self.final_alpha_one else bar
        return bar**0.5, (1.0 - bar) ** 0.5

    def points(self, steps: int, size: tuple[int, int]) -> list[Point]:
        """The `steps` points at which a sampler evaluates the network, evenly from r = 1, and the end.

        `size` (latent height and width) matters for flows only. Raises SettingError for a number out of
        range.
        """
        if not 1 <= steps <= COSINE_STEPS:
            raise SettingError(f"steps is {steps}; expected 1 to {COSINE_STEPS}")
        grid = [COSINE_STEPS * (1 - i / steps) for i in range(steps)]
        return [Point(t, *self.alpha_sigma(t)) for t in [*grid, -1]]

    def one_step(self, timestep: int) -> Point:
        """The point of a one-step student; -1: the last, r = 1. Raises SettingError if out of range."""
        t = COSINE_STEPS if timestep == -1 else timestep
        if not 0 < t <= COSINE_STEPS:
            raise SettingError(
                f"student_timestep is {timestep}; expected 1 to {COSINE_STEPS}, or -1 for the last"
            )
        return Point(t, *self.alpha_sigma(t))

    def x0(self, output: Tensor, x: Tensor, point: Point) -> Tensor:
        """x_0 from a network's output, fp32."""
        return predict_x0(output, x, point.alpha, point.sigma, self.prediction)

    def diffuse(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """alpha x_0 + sigma eps for x_0 and noise [B, ...] at timesteps [B], in the dtype of x_0."""
        bar = self.alpha_bar(timestep.to(x0.device)).view(-1, *[1] * (x0.ndim - 1))
        return (bar.sqrt() * x0 + (1 - bar).sqrt() * noise).to(x0.dtype)


@dataclass(frozen=True, kw_only=True)
class DynamicShift:
    """A flow's shift that depends on the size of the image: mu is linear in the number of patches."""

    base_shift: float
    max_shift: float
    base_length: int
    max_length: int
    kind: Literal["exponential", "linear"]
    patch_size: int

    def factor(self, size: tuple[int, int]) -> float:
        """The shift at this latent height and width."""
        slope = (self.max_shift - self.base_shift) / (self.max_length - self.base_length)
        patches = (size[0] // self.patch_size) * (size[1] // self.patch_size)
        mu = self.base_shift + slope * (patches - self.base_length)
        return math.exp(mu) if self.kind == "exponential" else mu


@dataclass(frozen=True, kw_only=True)
class FlowSchedule(_UnscaledInput):
    """Rectified flow (Esser et al. 2024): x_s = (1 - s) x_0 + s eps, v = eps - x_0, s from 1 down to 0.

    The network's time input is s * `train_steps`. `shift` (eq. 23) moves the steps towards noise; `dynamic`
    replaces it by a shift that depends on the size of the latents. `dpm_solver`: "trailing" is the grid of
    DPMSolverMultistepScheduler with use_flow_sigmas, which starts at s = 1 - 1/T before the shift and cuts
    the network's time inputs to whole numbers.
    """

    train_steps: int
    shift: float
    spacing: Literal["trailing", "linspace"]
    dynamic: DynamicShift | None = None
    dpm_solver: bool = False

    prediction: FlowPrediction = "flow_prediction"
    final_alpha_one: bool = True  # a flow ends at data

    def __len__(self) -> int:
        return self.train_steps

    def points(self, steps: int, size: tuple[int, int]) -> list[Point]:
        """The `steps` points at which a sampler evaluates the network, and the end, s = 0. `size`: of the
        latents.

        linspace is what diffusers' scheduler does with a number of steps: evenly from 1 to the last entry of
        its table (which a static shift has already moved), then shifted. trailing is 1, 1 - 1/n, ..., shifted
        once, as in pipelines that pass their own sigmas. Raises SettingError for a number out of range.
        """
        if not 1 <= steps <= self.train_steps:
            raise SettingError(
                f"steps is {steps}; expected 1 to {self.train_steps}, the teacher's training steps"
            )
        if self.dpm_solver and self.spacing == "trailing":
            return self._dpm_solver_points(steps)
        # Choose the grid of s from 1 down; the shift moves it afterwards.
        factor = self.shift if self.dynamic is None else self.dynamic.factor(size)
        if self.spacing == "trailing":
            grid = [1 - i / steps for i in range(steps)]
        else:
            last = 1 / self.train_steps
            last = last if self.dynamic else shifted(last, factor)
            grid = [1 - i * (1 - last) / max(steps - 1, 1) for i in range(steps)]
        sigmas = [*(shifted(s, factor) for s in grid), 0.0]
        return [Point(s * self.train_steps, 1 - s, s) for s in sigmas]

    def _dpm_solver_points(self, steps: int) -> list[Point]:
        """The points, in the scheduler's arithmetic: other rounding could cut a time to another integer."""
        grid = np.flip(1.0 - np.linspace(1, 1 / self.train_steps, steps + 1))[:-1]
        sigmas = [float(s) for s in self.shift * grid / (1 + (self.shift - 1) * grid)]
        points = [Point(float(int(s * self.train_steps)), 1 - s, s) for s in sigmas]
        return [*points, Point(0.0, 1.0, 0.0)]

    def one_step(self, timestep: int) -> Point:
        """The point of a one-step student; -1: pure noise, s = 1. Raises SettingError if out of range."""
        t = self.train_steps if timestep == -1 else timestep
        if not 0 < t <= self.train_steps:
            raise SettingError(
                f"student_timestep is {timestep}; expected 1 to {self.train_steps}, or -1 for the last"
            )
        return Point(t, 1 - t / self.train_steps, t / self.train_steps)

    def x0(self, output: Tensor, x: Tensor, point: Point) -> Tensor:
        """x_0 = x - s v from a network's output, fp32 (method.md "One-step formulas")."""
        return x.float() - point.sigma * output.float()

    def diffuse(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_s = (1 - s) x_0 + s eps for x_0 and noise [B, ...] at timesteps s T [B], in the dtype of x_0."""
        s = (timestep.to(x0.device, torch.float64) / self.train_steps).view(-1, *[1] * (x0.ndim - 1))
        return ((1 - s) * x0 + s * noise).to(x0.dtype)


def shifted(s: float, factor: float) -> float:
    """The shift of Esser et al. 2024, eq. 23: keeps 0 and 1, and moves values between them towards 1."""
    return factor * s / (1 + (factor - 1) * s)


def timesteps(num_train: int, steps: int, spacing: Spacing, offset: int) -> list[int]:
    """Descending integer timesteps of a `steps`-step sampler, as diffusers' DDIMScheduler spaces them.

    leading: 0, r, 2r, ... plus `offset` (50 steps of SD 1.5 start at 981); trailing starts at T - 1; linspace
    includes both 0 and T - 1. Raises SettingError for a number of steps out of range.
    """
    if not 1 <= steps <= num_train:
        raise SettingError(f"steps is {steps}; expected 1 to {num_train}, the teacher's training steps")
    # The three rules of DDIMScheduler, descending from noise to data.
    ratio = num_train / steps
    if spacing == "leading":
        grid = [i * (num_train // steps) + offset for i in reversed(range(steps))]
        if grid[0] >= num_train:
            raise SettingError(
                f"steps is {steps}: leading spacing with steps_offset {offset} would start at "
                f"timestep {grid[0]}, the last is {num_train - 1}; take fewer steps or another spacing"
            )
        return grid
    if spacing == "trailing":
        return [round(num_train - i * ratio) - 1 for i in range(steps)]
    return torch.linspace(0, num_train - 1, steps, dtype=torch.float64).round().long().flip(0).tolist()


def predict_x0(output: Tensor, x: Tensor, alpha: float, sigma: float, prediction: Prediction) -> Tensor:
    """x_0 from a network output at (alpha, sigma), in fp32 (method.md "One-step formulas").

    For epsilon, 1/alpha = 14.6 multiplies rounding errors at T, so the inputs are cast to fp32 first.
    """
    output, x = output.float(), x.float()
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        return alpha * x - sigma * output
    if alpha < NO_SIGNAL:
        raise UserError("an epsilon teacher has no x_0 at zero terminal SNR; use a v-prediction teacher")
    return (x - sigma * output) / alpha


def predict_epsilon(output: Tensor, x: Tensor, alpha: float, sigma: float, prediction: Prediction) -> Tensor:
    """epsilon from a network's output at (alpha, sigma), in fp32."""
    output, x = output.float(), x.float()
    if prediction == "epsilon":
        return output
    if prediction == "v_prediction":
        return alpha * output + sigma * x
    return (x - alpha * output) / sigma


def denoised_from(
    output: Tensor, x: Tensor, point: Point, prediction: Prediction | FlowPrediction
) -> Denoised:
    """x_0 and epsilon from a network's output at `point`, in fp32.

    Only an epsilon teacher's x_0 is divided by alpha, which raises UserError at zero terminal SNR.
    """
    if prediction == "flow_prediction":  # x = (1 - s) x_0 + s eps and v = eps - x_0, solved for both
        output, x = output.float(), x.float()
        return Denoised(x - point.sigma * output, x + point.alpha * output)
    return Denoised(
        predict_x0(output, x, point.alpha, point.sigma, prediction),
        predict_epsilon(output, x, point.alpha, point.sigma, prediction),
    )


def diffuse(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, timestep: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t eps for x_0 and noise [B, ...] at timesteps [B], in the dtype of x_0."""
    bar = alphas_cumprod.to(x0.device)[timestep].view(-1, *[1] * (x0.ndim - 1))
    return (bar.sqrt() * x0 + (1 - bar).sqrt() * noise).to(x0.dtype)
