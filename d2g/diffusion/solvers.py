"""Solvers of the probability-flow ODE, as functions of a callable denoiser; deterministic without `Churn`."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Literal

from torch import Tensor

from d2g.diffusion.edm import EDMSchedule
from d2g.diffusion.schedule import Denoised, FlowSchedule, Point
from d2g.diffusion.scheduler_files import AnySchedule

Denoise = Callable[[Tensor, Point], Denoised]
"""`denoise(x, point)`: noisy latents [B, C, h, w] at a point -> predicted x_0 and epsilon, fp32."""

Solver = Literal["ddim", "heun", "euler"]

UNBOUNDED = 1e3
"""A schedule whose last sigma / alpha exceeds this has zero terminal SNR, up to rounding."""


@dataclass(frozen=True)
class Churn:
    """New noise in each step, which makes the solver stochastic (EDM Algorithm 2).

    amount: S_churn. fresh_noise: step number -> noise [B, C, h, w] of unit variance.
    """

    amount: float
    fresh_noise: Callable[[int], Tensor]

    def add(
        self, x: Tensor, schedule: EDMSchedule, now: Point, step: int, steps: int
    ) -> tuple[Tensor, Point]:
        """Raise the noise level of x by the factor 1 + min(S_churn / N, sqrt(2) - 1)."""
        raised = schedule.point(now.sigma * (1 + min(self.amount / steps, sqrt(2) - 1)))
        extra = sqrt(raised.sigma**2 - now.sigma**2)
        return x + extra * self.fresh_noise(step).to(x), raised


def ddim_step(prediction: Denoised, after: Point) -> Tensor:
    """DDIM with eta = 0 (Song et al. 2021, eq. 12): x_s = alpha_s x0_hat + sigma_s eps."""
    return after.alpha * prediction.x0 + after.sigma * prediction.epsilon


def euler_step(x: Tensor, velocity: Tensor, now: Point, after: Point) -> Tensor:
    """Euler's step on a flow's dx/ds = v with s = sigma (Liu et al. 2023, eq. 1)."""
    return x + (after.sigma - now.sigma) * velocity


def heun_step(denoise: Denoise, x: Tensor, now: Point, after: Point) -> Tensor:
    """Heun's second-order step in sigma space (EDM Algorithm 1 without churn).

    The ODE is d(x / alpha) / d(sigma / alpha) = eps, and DDIM is its Euler step. With alpha = 1 this is the
    paper's algorithm line by line.
    """
    at_start = denoise(x, now)
    at_end = denoise(ddim_step(at_start, after), after)
    epsilon = (at_start.epsilon + at_end.epsilon) / 2
    step = after.sigma / after.alpha - now.sigma / now.alpha
    return after.alpha * (x / now.alpha + step * epsilon)


def heun_step_at_noise(denoise: Denoise, x: Tensor, now: Point, after: Point) -> Tensor:
    """Heun's step on the same ODE written as d(x / sigma) / d(alpha / sigma) = x_0, for zero terminal SNR.

    With zero terminal SNR, sigma / alpha is infinite at the start and halves in one step, whatever the number
    of steps. In sigma space, Heun's method would therefore be of first order only.
    """
    at_start = denoise(x, now)
    at_end = denoise(ddim_step(at_start, after), after)
    x0 = (at_start.x0 + at_end.x0) / 2
    step = after.alpha / after.sigma - now.alpha / now.sigma
    return after.sigma * (x / now.sigma + step * x0)


def flow_heun_step(denoise: Denoise, x: Tensor, now: Point, after: Point) -> Tensor:
    """Heun's second-order step in a flow's own time."""
    at_start = velocity(denoise(x, now))
    at_end = velocity(denoise(euler_step(x, at_start, now, after), after))
    return euler_step(x, (at_start + at_end) / 2, now, after)


def velocity(prediction: Denoised) -> Tensor:
    """A flow's v = eps - x_0."""
    return prediction.epsilon - prediction.x0


def first_order(schedule: AnySchedule) -> Solver:
    """The first-order solver of a schedule by its usual name: DDIM is Euler's method in sigma / alpha."""
    return "euler" if isinstance(schedule, FlowSchedule | EDMSchedule) else "ddim"


def sample_ode(
    denoise: Denoise,
    noise: Tensor,
    schedule: AnySchedule,
    steps: int,
    solver: Solver,
    churn: Churn | None = None,
) -> Tensor:
    """Integrate from noise [B, C, h, w] of unit variance to scaled latents of the same shape, in fp32.

    Heun's last step is of first order, as in EDM: at its end, sigma = 0, there is no network to evaluate.
    churn: for an EDM schedule only.
    """
    assert solver in ("heun", first_order(schedule)), f"{solver} on a {type(schedule).__name__}"
    x, (height, width) = schedule.start(noise), noise.shape[-2:]
    points = schedule.points(steps, (height, width))
    last = len(points) - 2
    # Heun evaluates the network at both ends of a step, so the last step to sigma = 0 cannot use it.
    for i, (now, after) in enumerate(pairwise(points)):
        if churn is not None:
            assert isinstance(schedule, EDMSchedule)
            x, now = churn.add(x, schedule, now, i, steps)
        if solver == "heun" and i < last:
            x = _heun(schedule, now)(denoise, x, now, after)
        elif isinstance(schedule, FlowSchedule):
            x = euler_step(x, velocity(denoise(x, now)), now, after)
        else:
            x = ddim_step(denoise(x, now), after)
    return x


def _heun(schedule: AnySchedule, now: Point) -> Callable[[Denoise, Tensor, Point, Point], Tensor]:
    """The form of Heun's step for a schedule at the point `now`."""
    if isinstance(schedule, FlowSchedule):
        return flow_heun_step
    if isinstance(schedule, EDMSchedule):
        return heun_step
    alpha, sigma = schedule.alpha_sigma(len(schedule) - 1)
    unbounded = sigma > UNBOUNDED * alpha
    return heun_step_at_noise if unbounded and now.sigma > now.alpha else heun_step


def evaluations_per_sample(steps: int, solver: Solver, guidance: float) -> int:
    """Network evaluations of one sample: 2 steps - 1 with Heun, else `steps`; twice as many with guidance."""
    return (2 * steps - 1 if solver == "heun" else steps) * (1 if guidance == 1 else 2)


def guided(conditional: Tensor, unconditional: Tensor, guidance: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance w on raw network outputs: null + w (cond - null) (Ho & Salimans 2022).

    `rescale` (0 to 1) moves each row's standard deviation towards that of the conditional output (Lin et al.
    2024, section 3.4, eq. 15 and 16), against the overexposure of high guidance.
    """
    output = unconditional + guidance * (conditional - unconditional)
    if rescale == 0:
        return output
    # Match the standard deviation of the conditional output, and mix both results by `rescale`.
    axes = tuple(range(1, output.ndim))
    matched = output * (conditional.std(axes, keepdim=True) / output.std(axes, keepdim=True))
    return rescale * matched + (1 - rescale) * output
