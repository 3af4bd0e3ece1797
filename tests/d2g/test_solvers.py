"""d2g.diffusion.solvers: closed forms, and orders of convergence for known solutions and real networks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

import tiny_teachers
from d2g.core.seeds import noise as seeded
from d2g.diffusion.edm import EDMSchedule
from d2g.diffusion.schedule import Denoised, FlowSchedule, Point, Schedule, timesteps
from d2g.diffusion.scheduler_files import AnySchedule
from d2g.diffusion.solvers import (
    Solver,
    ddim_step,
    euler_step,
    evaluations_per_sample,
    flow_heun_step,
    guided,
    heun_step,
    heun_step_at_noise,
    sample_ode,
)
from d2g.diffusion.teacher import load_teacher

STEPS = 1000


def schedule_of(alphas_cumprod: Tensor, final_alpha_one: bool = True) -> Schedule:
    return Schedule(
        alphas_cumprod=alphas_cumprod,
        prediction="epsilon",
        spacing="trailing",
        steps_offset=0,
        final_alpha_one=final_alpha_one,
    )


def linear_schedule(highest: float = 3.0, final_alpha_one: bool = True) -> Schedule:
    """sigma / alpha rises linearly to `highest`, so a trailing grid is uniform in the ODE's variable."""
    ratio = highest * torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
    return schedule_of(1 / (1 + ratio.square()), final_alpha_one)


def zero_snr_schedule() -> Schedule:
    """alpha = cos and sigma = sin of an angle that rises linearly to pi / 2, where the SNR is zero."""
    angle = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS * math.pi / 2
    return schedule_of(angle.cos().square())


FLOW = FlowSchedule(train_steps=STEPS, shift=1.0, spacing="trailing")


EDM = EDMSchedule(
    sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0, grid="karras", prediction="epsilon"
)


class Gaussian:
    """The exact denoiser for data N(mean, std^2), and the ODE's exact solution."""

    def __init__(self, mean: float = 0.7, std: float = 0.5) -> None:
        self.mean, self.std, self.calls = mean, std, 0

    def __call__(self, x: Tensor, point: Point) -> Denoised:
        self.calls += 1
        scaled = (x - point.alpha * self.mean) / self._variance(point)
        return Denoised(self.mean + point.alpha * self.std**2 * scaled, point.sigma * scaled)

    def _variance(self, point: Point) -> float:
        return point.alpha**2 * self.std**2 + point.sigma**2

    def solution(self, x: Tensor, start: Point, end: Point) -> Tensor:
        """Solve the ODE from `start` to `end`: (x - alpha mean) / std_t is constant."""
        standard = (x - start.alpha * self.mean) / self._variance(start) ** 0.5
        return end.alpha * self.mean + self._variance(end) ** 0.5 * standard


def noise() -> Tensor:
    return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


NOW, AFTER = Point(900, 0.6, 0.8), Point(500, 0.8, 0.6)


def test_a_ddim_step_keeps_x0_and_epsilon() -> None:
    x0, epsilon = noise().double(), noise().flip(0).double()
    torch.testing.assert_close(ddim_step(Denoised(x0, epsilon), AFTER), 0.8 * x0 + 0.6 * epsilon)


def test_a_heun_step_is_heuns_method() -> None:
    """Heun's method on d(x / alpha) / d(sigma / alpha) = eps."""
    exact, x = Gaussian(), noise().double()
    y, h = x / NOW.alpha, AFTER.sigma / AFTER.alpha - NOW.sigma / NOW.alpha
    k1 = exact(x, NOW).epsilon
    k2 = exact((y + h * k1) * AFTER.alpha, AFTER).epsilon
    expected = AFTER.alpha * (y + h * (k1 + k2) / 2)
    torch.testing.assert_close(heun_step(exact, x, NOW, AFTER), expected)
    y, h = (
        x / NOW.sigma,
        AFTER.alpha / AFTER.sigma - NOW.alpha / NOW.sigma,
    )  # and on d(x / s) / d(a / s) = x_0
    k1 = exact(x, NOW).x0
    k2 = exact((y + h * k1) * AFTER.sigma, AFTER).x0
    expected = AFTER.sigma * (y + h * (k1 + k2) / 2)
    torch.testing.assert_close(heun_step_at_noise(exact, x, NOW, AFTER), expected)


def test_flow_steps_are_eulers_and_heuns_method() -> None:
    exact, x = Gaussian(), noise().double()
    now, after = Point(800.0, 0.2, 0.8), Point(500.0, 0.5, 0.5)
    x0, epsilon = exact(x, now)
    k1, h = epsilon - x0, after.sigma - now.sigma
    torch.testing.assert_close(euler_step(x, k1, now, after), x + h * k1)
    torch.testing.assert_close(euler_step(x, k1, now, after), ddim_step(Denoised(x0, epsilon), after))
    x0, epsilon = exact(x + h * k1, after)
    k2 = epsilon - x0
    torch.testing.assert_close(flow_heun_step(exact, x, now, after), x + h * (k1 + k2) / 2)


def convergence_orders(counts: Sequence[int], errors: Sequence[float]) -> list[float]:
    """Observed orders of convergence: log(error ratio) / log(step ratio) of neighboring step counts."""
    pairs = zip(pairwise(counts), pairwise(errors), strict=True)
    return [math.log(a / b) / math.log(n / m) for (m, n), (a, b) in pairs]


ORDERS: dict[str, tuple[AnySchedule, Solver, float]] = {
    "ddim": (linear_schedule(), "ddim", 1.0),
    "heun": (linear_schedule(), "heun", 2.0),
    "ddim from zero terminal SNR": (zero_snr_schedule(), "ddim", 1.0),
    "heun from zero terminal SNR": (zero_snr_schedule(), "heun", 2.0),
    "euler on a flow": (FLOW, "euler", 1.0),
    "heun on a flow": (FLOW, "heun", 2.0),
    "heun on a shifted flow": (replace(FLOW, shift=3.0), "heun", 2.0),
    "euler on EDM's levels": (EDM, "euler", 1.0),
    "heun on EDM's levels": (EDM, "heun", 2.0),
    "heun on even levels of log sigma": (replace(EDM, grid="exponential"), "heun", 2.0),
}


@pytest.mark.parametrize("case", ORDERS)
def test_order_of_convergence(case: str) -> None:
    """Errors against the closed form and against 1000 steps of Heun decrease with the solver's order."""
    schedule, solver, order = ORDERS[case]
    exact = Gaussian()
    counts = (40, 80, 200) if isinstance(schedule, EDMSchedule) else (20, 40, 100)  # sigma spans five decades
    points = schedule.points(1, (2, 2))
    truth = exact.solution(schedule.start(noise()), points[0], points[-1])
    fine = sample_ode(exact, noise(), schedule, STEPS, "heun")
    result = [sample_ode(exact, noise(), schedule, n, solver) for n in counts]
    for reference in (truth, fine):
        errors = [(x - reference).abs().max().item() for x in result]
        assert all(abs(slope - order) < 0.15 for slope in convergence_orders(counts, errors)), errors
        assert errors[-1] < 0.05


NETWORKS: dict[str, tuple[Callable[[Path], str], Solver]] = {
    "SDXL's UNet": (tiny_teachers.save_sdxl, "ddim"),
    "SD3's transformer": (tiny_teachers.save_sd3, "euler"),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_order_of_convergence_of_real_networks(case: str, tmp_path: Path) -> None:
    """Errors against many steps of Heun fall as 1/n and as 1/n^2.

    The networks are deaf to time: a random one answers to the sine of an integer timestep, which swings
    faster than any grid of integers resolves. Trained ones do not.
    """
    save, first_order = NETWORKS[case]
    teacher = load_teacher(save(tmp_path), spacing="trailing")
    network = teacher.network
    embedding = getattr(network, "time_embedding", None) or network.time_text_embed.timestep_embedder
    with torch.no_grad():
        embedding.linear_1.weight.zero_()
    cond = teacher.encode(["a red cube"])
    z, counts = seeded(0, [0], teacher.latent_shape), (20, 40)

    def run(steps: int, solver: Solver) -> Tensor:
        return teacher.sample(z, [], steps, 1.0, solver, cond=cond)

    fine = run(200, "heun")
    orders: list[tuple[Solver, float]] = [(first_order, 1.0), ("heun", 2.0)]
    for solver, order in orders:
        errors = [(run(n, solver) - fine).abs().max().item() for n in counts]
        assert abs(convergence_orders(counts, errors)[0] - order) < 0.25, (solver, errors)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_single_datum_is_recovered_exactly(solver: Solver, spacing: str) -> None:
    """For data of one point x0 the ODE's path is a straight line, so any solver and grid ends at x0."""
    for final_alpha_one in (True, False):
        schedule = replace(linear_schedule(final_alpha_one=final_alpha_one), spacing=spacing)
        x0 = noise().flip(0)

        def denoise(x: Tensor, point: Point, x0: Tensor = x0) -> Denoised:
            return Denoised(x0, (x - point.alpha * x0) / point.sigma)

        result = sample_ode(denoise, noise(), schedule, 5, solver)
        first = timesteps(STEPS, 5, spacing, 0)[0]  # type: ignore[arg-type]
        end = schedule.points(5, (2, 2))[-1]
        epsilon = denoise(noise(), Point(first, *schedule.alpha_sigma(first))).epsilon
        torch.testing.assert_close(result, end.alpha * x0 + end.sigma * epsilon, rtol=1e-4, atol=1e-4)
        assert (end.sigma == 0) == final_alpha_one


CASES: list[tuple[AnySchedule, Solver]] = [
    (linear_schedule(), "ddim"),
    (linear_schedule(), "heun"),
    (FLOW, "euler"),
    (FLOW, "heun"),
    (EDM, "euler"),
    (EDM, "heun"),
]


@pytest.mark.parametrize(("schedule", "solver"), CASES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_evaluation_counts_match_the_solver(schedule: AnySchedule, solver: Solver, steps: int) -> None:
    counted = Gaussian()
    sample_ode(counted, noise(), schedule, steps, solver)
    assert (
        counted.calls
        == evaluations_per_sample(steps, solver, 1.0)
        == evaluations_per_sample(steps, solver, 3.0) // 2
    )


def test_guidance_is_linear_in_the_scale() -> None:
    text, empty = noise(), noise().flip(0)
    assert torch.equal(guided(text, empty, 0.0), empty)
    torch.testing.assert_close(guided(text, empty, 1.0), text)
    torch.testing.assert_close(guided(text, empty, 3.0), 3 * text - 2 * empty)


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
def test_rescaled_guidance_equals_diffusers(rescale: float) -> None:
    text, empty = noise(), noise().flip(0)
    result = guided(text, empty, 5.0, rescale)
    torch.testing.assert_close(result, rescale_noise_cfg(guided(text, empty, 5.0), text, rescale))
    if rescale == 1:
        torch.testing.assert_close(result.std((1, 2, 3)), text.std((1, 2, 3)))


@pytest.mark.parametrize(("schedule", "solver"), CASES)
def test_arithmetic_is_fp32_for_any_noise_dtype(schedule: AnySchedule, solver: Solver) -> None:
    half = sample_ode(Gaussian(), noise().half(), schedule, 4, solver)
    assert half.dtype == torch.float32
    assert torch.equal(half, sample_ode(Gaussian(), noise().half().float(), schedule, 4, solver))
