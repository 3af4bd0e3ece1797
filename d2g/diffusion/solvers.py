"""Deterministic solvers of the probability-flow ODE as plain functions over a callable denoiser."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from torch import Tensor

from d2g.diffusion.edm import EDMSchedule
from d2g.diffusion.schedule import Denoised, FlowSchedule, Point
from d2g.diffusion.scheduler_files import AnySchedule

Denoise = Callable[[Tensor, Point], Denoised]
"""`denoise(x, point)`: noisy scaled latents [B, C, h, w] at a point -> predicted x_0 and epsilon, fp32."""

Solver = Literal["ddim", "heun", "euler"]

UNBOUNDED = 1e3
"""A schedule whose sigma / alpha ends beyond this has zero terminal SNR, give or take rounding."""


def ddim_step(found: Denoised, after: Point) -> Tensor:
    """DDIM with eta = 0 (Song et al. 2021, eq. 12): x_s = alpha_s x0_hat + sigma_s eps."""
    return after.alpha * found.x0 + after.sigma * found.epsilon


def euler_step(x: Tensor, velocity: Tensor, now: Point, after: Point) -> Tensor:
    """Euler on a flow's dx/ds = v (Liu et al. 2023, eq. 1), s being sigma."""
    return x + (after.sigma - now.sigma) * velocity


def heun_step(denoise: Denoise, x: Tensor, now: Point, after: Point) -> Tensor:
    """Heun's second-order step in sigma space (EDM Algorithm 1 without churn).

    In x / alpha over sigma / alpha the ODE is d(x / alpha) / d(sigma / alpha) = eps; DDIM is its Euler step.
    With alpha = 1 it is the paper's own, line by line.
    """
    first = denoise(x, now)
    second = denoise(ddim_step(first, after), after)
    epsilon = (first.epsilon + second.epsilon) / 2
    run = after.sigma / after.alpha - now.sigma / now.alpha
    return after.alpha * (x / now.alpha + run * epsilon)


def heun_step_at_noise(denoise: Denoise, x: Tensor, now: Point, after: Point) -> Tensor:
    """The same ODE read as d(x / sigma) / d(alpha / sigma) = x_0: what Heun needs near zero terminal SNR.

    There sigma / alpha is infinite at first and then halves in one step, however many steps there are, so
    that sigma space would be of first order only.
    """
    first = denoise(x, now)
    second = denoise(ddim_step(first, after), after)
    x0 = (first.x0 + second.x0) / 2
    run = after.alpha / after.sigma - now.alpha / now.sigma
    return after.sigma * (x / now.sigma + run * x0)


def flow_heun_step(denoise: Denoise, x: Tensor, now: Point, after: Point) -> Tensor:
    """Heun's second-order step in a flow's own time."""
    first = velocity(denoise(x, now))
    second = velocity(denoise(euler_step(x, first, now, after), after))
    return euler_step(x, (first + second) / 2, now, after)


def velocity(found: Denoised) -> Tensor:
    """A flow's v = eps - x_0."""
    return found.epsilon - found.x0


def first_order(schedule: AnySchedule) -> Solver:
    """The first-order solver of a kind of ODE, as it is called there: DDIM is Euler in sigma / alpha."""
    return "euler" if isinstance(schedule, FlowSchedule | EDMSchedule) else "ddim"


def sample_ode(denoise: Denoise, noise: Tensor, schedule: AnySchedule, steps: int, solver: Solver) -> Tensor:
    """Integrate from noise [B, C, h, w] of unit variance to scaled latents of the same shape, in fp32.

    The last step of Heun has no network at its end and is of first order, as in EDM.
    """
    assert solver in ("heun", first_order(schedule)), f"{solver} on a {type(schedule).__name__}"
    x, (height, width) = schedule.start(noise), noise.shape[-2:]
    points = schedule.points(steps, (height, width))
    last = len(points) - 2
    for i, (now, after) in enumerate(pairwise(points)):
        if solver == "heun" and i < last:
            x = _heun(schedule, now)(denoise, x, now, after)
        elif isinstance(schedule, FlowSchedule):
            x = euler_step(x, velocity(denoise(x, now)), now, after)
        else:
            x = ddim_step(denoise(x, now), after)
    return x


def _heun(schedule: AnySchedule, now: Point) -> Callable[[Denoise, Tensor, Point, Point], Tensor]:
    if isinstance(schedule, FlowSchedule):
        return flow_heun_step
    if isinstance(schedule, EDMSchedule):
        return heun_step
    alpha, sigma = schedule.alpha_sigma(len(schedule) - 1)
    unbounded = sigma > UNBOUNDED * alpha
    return heun_step_at_noise if unbounded and now.sigma > now.alpha else heun_step


def evaluations(steps: int, solver: Solver, guidance: float) -> int:
    """Network evaluations of one sample: Heun takes 2 steps - 1, guidance doubles."""
    return (2 * steps - 1 if solver == "heun" else steps) * (1 if guidance == 1 else 2)


def guided(conditional: Tensor, unconditional: Tensor, guidance: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) on network outputs: out = null + w (text - null).

    `rescale` (0 to 1) draws each row's standard deviation back towards that of the conditional output (Lin et
    al. 2024, section 3.4, eq. 15 and 16), against the overexposure of high guidance.
    """
    output = unconditional + guidance * (conditional - unconditional)
    if rescale == 0:
        return output
    axes = tuple(range(1, output.ndim))
    matched = output * (conditional.std(axes, keepdim=True) / output.std(axes, keepdim=True))
    return rescale * matched + (1 - rescale) * output
