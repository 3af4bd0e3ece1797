"""Deterministic solvers of the probability-flow ODE as plain functions over a callable denoiser."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from core.schedule import Schedule, Spacing, timesteps

Denoise = Callable[[Tensor, int], Tensor]
"""`denoise(x_t, t)`: noisy scaled latents [B, C, h, w] and an integer timestep -> predicted epsilon, fp32."""

Solver = Literal["ddim", "heun"]


def ddim_step(x: Tensor, epsilon: Tensor, now: tuple[float, float], after: tuple[float, float]) -> Tensor:
    """DDIM with eta = 0 (Song et al. 2021, eq. 12): x_s = alpha_s x0_hat + sigma_s eps. `now`, `after`:
    (alpha, sigma).
    """
    x0 = (x - now[1] * epsilon) / now[0]
    return after[0] * x0 + after[1] * epsilon


def heun_step(
    denoise: Denoise, x: Tensor, t: int, t_next: int, now: tuple[float, float], after: tuple[float, float]
) -> Tensor:
    """Heun's second-order step (EDM Algorithm 1 without churn) for a VP teacher.

    In x/alpha over sigma/alpha the ODE is d(x/alpha)/d(sigma/alpha) = eps, and DDIM is its Euler step. A last
    step (`t_next` < 0) has no network at its end and stays Euler, as in EDM.
    """
    first = denoise(x, t)
    euler = ddim_step(x, first, now, after)
    if t_next < 0:
        return euler
    return ddim_step(x, (first + denoise(euler, t_next)) / 2, now, after)


def sample_ode(
    denoise: Denoise, noise: Tensor, schedule: Schedule, steps: int, solver: Solver, spacing: Spacing
) -> Tensor:
    """Integrate from noise [B, C, h, w] at the first timestep to scaled latents of the same shape, in fp32.

    `noise` enters as it is, although alpha at the first timestep is not 0 (method.md 2).
    """
    x, grid = noise.float(), timesteps(len(schedule), steps, spacing, schedule.steps_offset)
    for t, t_next in zip(grid, [*grid[1:], -1], strict=True):
        now, after = schedule.alpha_sigma(t), schedule.alpha_sigma(t_next)
        if solver == "ddim":
            x = ddim_step(x, denoise(x, t), now, after)
        else:
            x = heun_step(denoise, x, t, t_next, now, after)
    return x


def evaluations(steps: int, solver: Solver, guidance: float) -> int:
    """Network evaluations of one sample: Heun takes 2 steps - 1, guidance doubles."""
    return (steps if solver == "ddim" else 2 * steps - 1) * (1 if guidance == 1 else 2)


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): eps = eps_null + w (eps_text - eps_null)."""
    return unconditional + guidance * (conditional - unconditional)
