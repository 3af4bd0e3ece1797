"""Noise schedules and the algebra of predictions, as plain functions: x_t = alpha_t x_0 + sigma_t eps."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core.errors import SettingError, UserError

Prediction = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A variance-preserving discrete schedule. `alphas_cumprod`: float64 [T], alpha_t^2 of method.md 1.2."""

    alphas_cumprod: Tensor
    prediction: Prediction
    spacing: Spacing
    steps_offset: int
    final_alpha_one: bool

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def alpha_sigma(self, timestep: int) -> tuple[float, float]:
        """(alpha_t, sigma_t) at an integer timestep; -1 stands for clean data under `final_alpha_one`,
        else for alpha-bar_0, as diffusers' DDIM does (`set_alpha_to_one`)."""
        if timestep < 0:
            bar = 1.0 if self.final_alpha_one else float(self.alphas_cumprod[0])
        else:
            bar = float(self.alphas_cumprod[timestep])
        return bar**0.5, (1.0 - bar) ** 0.5


def timesteps(num_train: int, steps: int, spacing: Spacing, offset: int) -> list[int]:
    """Descending integer timesteps of a `steps`-step sampler, as diffusers' DDIMScheduler spaces them.

    leading: 0, r, 2r … + offset (starts at 981 for SD 1.5 and 50 steps); trailing ends at T - 1; linspace
    spans all.
    """
    if not 1 <= steps <= num_train:
        raise SettingError(f"steps is {steps}; expected 1 to {num_train}, the teacher's training steps")
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
    """x_0 from a network output at (alpha, sigma), in fp32. method.md 2: for epsilon 1/alpha = 14.6
    multiplies rounding errors at T, so the inputs are widened before the combination.
    """
    output, x = output.float(), x.float()
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        return alpha * x - sigma * output
    if alpha < 1e-6:
        raise UserError("an epsilon teacher has no x_0 at zero terminal SNR; use a v-prediction teacher")
    return (x - sigma * output) / alpha


def predict_epsilon(output: Tensor, x: Tensor, alpha: float, sigma: float, prediction: Prediction) -> Tensor:
    """epsilon from a network output at (alpha, sigma), in fp32."""
    output, x = output.float(), x.float()
    if prediction == "epsilon":
        return output
    if prediction == "v_prediction":
        return alpha * output + sigma * x
    return (x - alpha * output) / sigma


def diffuse(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, timestep: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t eps for a batch of timesteps [B]."""
    bar = alphas_cumprod.to(x0.device)[timestep].view(-1, *[1] * (x0.ndim - 1))
    return (bar.sqrt() * x0 + (1 - bar).sqrt() * noise).to(x0.dtype)
