"""pairgen.sample: closed forms, and orders of convergence on a denoiser whose ODE has a known solution."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from core.schedule import Schedule, timesteps
from pairgen.sample import Denoise, Solver, ddim_step, evaluations, guided, heun_step, sample_ode

STEPS = 1024


def even_schedule(highest: float = 3.0, final_alpha_one: bool = True) -> Schedule:
    """sigma / alpha rises evenly to `highest`: a trailing grid is even in what the ODE runs over."""
    ratio = highest * torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
    return Schedule(
        alphas_cumprod=1 / (1 + ratio.square()),
        prediction="epsilon",
        spacing="trailing",
        steps_offset=0,
        final_alpha_one=final_alpha_one,
    )


class Gaussian:
    """The exact epsilon for data N(mean, std^2) under a VP schedule, and the ODE's exact solution."""

    def __init__(self, schedule: Schedule, mean: float = 0.7, std: float = 0.5) -> None:
        self.schedule, self.mean, self.std, self.calls = schedule, mean, std, 0

    def __call__(self, x: Tensor, t: int) -> Tensor:
        self.calls += 1
        alpha, sigma = self.schedule.alpha_sigma(t)
        return sigma * (x - alpha * self.mean) / self._variance(t)

    def _variance(self, t: int) -> float:
        alpha, sigma = self.schedule.alpha_sigma(t)
        return alpha**2 * self.std**2 + sigma**2

    def solution(self, x: Tensor, start: int) -> Tensor:
        """Where the ODE takes x from timestep `start` to the end: (x - alpha mean) / std_t stays constant."""
        standard = (x - self.schedule.alpha_sigma(start)[0] * self.mean) / self._variance(start) ** 0.5
        return self.schedule.alpha_sigma(-1)[0] * self.mean + self._variance(-1) ** 0.5 * standard


def noise() -> Tensor:
    return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def test_a_ddim_step_keeps_x0_and_epsilon() -> None:
    x0, epsilon = noise().double(), noise().flip(0).double()
    now, after = (0.6, 0.8), (0.8, 0.6)
    found = ddim_step(now[0] * x0 + now[1] * epsilon, epsilon, now, after)
    torch.testing.assert_close(found, after[0] * x0 + after[1] * epsilon)


def test_a_heun_step_is_the_textbooks() -> None:
    """Heun's method on d(x / alpha) / d(sigma / alpha) = eps, written out; the last step stays Euler."""
    schedule = even_schedule()
    exact, x, t, t_next = Gaussian(schedule), noise().double(), 900, 500
    now, after = schedule.alpha_sigma(t), schedule.alpha_sigma(t_next)
    y, h = x / now[0], after[1] / after[0] - now[1] / now[0]
    k1 = exact(x, t)
    k2 = exact((y + h * k1) * after[0], t_next)
    torch.testing.assert_close(heun_step(exact, x, t, t_next, now, after), after[0] * (y + h * (k1 + k2) / 2))
    clean = schedule.alpha_sigma(-1)
    torch.testing.assert_close(heun_step(exact, x, t, -1, now, clean), ddim_step(x, k1, now, clean))


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1.0), ("heun", 2.0)])
def test_order_of_convergence(solver: Solver, order: float) -> None:
    schedule, counts = even_schedule(), (16, 32, 64)
    exact = Gaussian(schedule)
    truth = exact.solution(noise(), STEPS - 1)
    found = (sample_ode(exact, noise(), schedule, n, solver, "trailing") for n in counts)
    errors = [(x - truth).abs().max().item() for x in found]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(abs(slope - order) < 0.15 for slope in slopes), (errors, slopes)
    assert errors[-1] < 0.05


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_one_picture_is_found_exactly(solver: Solver, spacing: str) -> None:
    """With one datum x0 the ODE is a straight line: any solver, any grid, must end on it."""
    for final_alpha_one in (True, False):
        schedule = even_schedule(final_alpha_one=final_alpha_one)
        x0 = noise().flip(0)

        def denoise(x: Tensor, t: int, schedule: Schedule = schedule, x0: Tensor = x0) -> Tensor:
            alpha, sigma = schedule.alpha_sigma(t)
            return (x - alpha * x0) / sigma

        found = sample_ode(denoise, noise(), schedule, 5, solver, spacing)  # type: ignore[arg-type]
        first = timesteps(STEPS, 5, spacing, 0)[0]  # type: ignore[arg-type]
        alpha, sigma = schedule.alpha_sigma(-1)
        expected = alpha * x0 + sigma * denoise(noise(), first)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (sigma == 0) == final_alpha_one


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_evaluations_are_what_the_solver_spends(solver: Solver, steps: int) -> None:
    schedule = even_schedule()
    counted: Denoise = Gaussian(schedule)
    sample_ode(counted, noise(), schedule, steps, solver, "trailing")
    assert counted.calls == evaluations(steps, solver, 1.0) == evaluations(steps, solver, 3.0) // 2  # type: ignore[attr-defined]


def test_guidance_is_linear_in_the_scale() -> None:
    text, empty = noise(), noise().flip(0)
    assert torch.equal(guided(text, empty, 0.0), empty)
    torch.testing.assert_close(guided(text, empty, 1.0), text)
    torch.testing.assert_close(guided(text, empty, 3.0), 3 * text - 2 * empty)


def test_arithmetic_is_fp32_whatever_the_noise_is() -> None:
    schedule = even_schedule()
    half = sample_ode(Gaussian(schedule), noise().half(), schedule, 4, "ddim", "trailing")
    assert half.dtype == torch.float32
    assert torch.equal(
        half, sample_ode(Gaussian(schedule), noise().half().float(), schedule, 4, "ddim", "trailing")
    )
