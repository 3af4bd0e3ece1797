"""d2g.diffusion.edm: identities of the paper's preconditioning; noise levels against diffusers."""

import math
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from d2g.core.errors import SettingError
from d2g.core.seeds import generator
from d2g.diffusion.edm import EDMSchedule, preconditioning, sigmas
from d2g.diffusion.schedule import Point

SCHEDULE = EDMSchedule(
    sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0, grid="karras", prediction="epsilon"
)
SIGMA = st.floats(1e-3, 1e3)


def random_noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 4, 4), generator=generator(seed, 0xED))


@given(sigma=SIGMA, data=st.floats(0.1, 10))
def test_unit_variance_in_and_out(sigma: float, data: float) -> None:
    """Appendix B.6 of the paper: inputs and targets of the network have variance 1, and c_skip minimizes
    c_out, which multiplies the network's errors."""
    c = preconditioning(sigma, data)
    assert c.c_in**2 * (data**2 + sigma**2) == pytest.approx(1)
    target = ((1 - c.c_skip) * data) ** 2 + (c.c_skip * sigma) ** 2  # variance of x_0 - c_skip (x_0 + n)
    assert c.c_out**2 == pytest.approx(target)
    for other in (c.c_skip * 1.01, c.c_skip * 0.99):
        assert ((1 - other) * data) ** 2 + (other * sigma) ** 2 >= target * (1 - 1e-12)
    assert c.c_noise == pytest.approx(0.25 * math.log(sigma))


def test_published_values_at_sigma_80() -> None:
    c = preconditioning(80.0, 0.5)
    assert (c.c_skip, c.c_out, c.c_in) == pytest.approx((3.906e-5, 0.49999, 0.0125), rel=1e-3)


def test_without_noise_the_prediction_is_the_input() -> None:
    c = preconditioning(1e-9, 0.5)
    assert (c.c_skip, c.c_in) == pytest.approx((1, 2)) and c.c_out < 1e-8
    x, output = random_noise(1), random_noise(2)
    torch.testing.assert_close(SCHEDULE.x0(output, x, Point(0.0, 1.0, 1e-9)), x)


@pytest.mark.parametrize("kind", [diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("steps", [2, 18, 50])
@pytest.mark.parametrize(
    "settings", [{}, {"sigma_schedule": "exponential"}, {"rho": 3.0, "sigma_max": 20.0, "sigma_data": 1.0}]
)
def test_noise_levels_and_times_equal_diffusers(kind: Any, steps: int, settings: dict[str, Any]) -> None:
    reference = kind(**settings)
    reference.set_timesteps(steps)
    names = {"rho": "rho", "sigma_max": "sigma_max", "sigma_data": "sigma_data", "sigma_schedule": "grid"}
    ours = replace(SCHEDULE, **{names[name]: value for name, value in settings.items()})
    points = ours.points(steps, (4, 4))
    torch.testing.assert_close(torch.tensor([p.sigma for p in points]), reference.sigmas, rtol=2e-5, atol=0)
    times = torch.tensor([p.t for p in points[:-1]])
    torch.testing.assert_close(times, reference.timesteps, rtol=1e-4, atol=1e-5)
    assert all(p.alpha == 1 for p in points) and points[-1].sigma == 0 and len(points) == steps + 1


def test_one_step_starts_from_sigma_max() -> None:
    """In diffusers the exponential grid of one step starts at sigma_min."""
    for grid in ("karras", "exponential"):
        assert sigmas(1, 0.002, 80.0, 7.0, grid) == pytest.approx([80.0, 0.0])
    with pytest.raises(SettingError, match="steps is 0; expected 1 or more"):
        SCHEDULE.points(0, (4, 4))
    assert SCHEDULE.one_step(-1) == SCHEDULE.points(5, (4, 4))[0]
    assert SCHEDULE.one_step(-1).t == pytest.approx(math.log(80) / 4)
    with pytest.raises(SettingError, match=r"student_timestep is 999, .* start at sigma_max, 80; set .*=-1"):
        SCHEDULE.one_step(999)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_output_conversion_equals_diffusers(prediction: Any, sigma: float) -> None:
    reference = diffusers.EDMEulerScheduler(prediction_type=prediction)
    ours, point = replace(SCHEDULE, prediction=prediction), Point(0.0, 1.0, sigma)
    x, output = sigma * random_noise(1) + 0.5 * random_noise(3), random_noise(2)
    result = ours.denoised(output, x, point)
    torch.testing.assert_close(result.x0, reference.precondition_outputs(x, output, sigma))
    torch.testing.assert_close(ours.network_input(x, point), reference.precondition_inputs(x, sigma))
    assert torch.equal(ours.x0(output, x, point), result.x0)
    # x = x_0 + sigma eps to rounding of x, at every level
    torch.testing.assert_close(result.x0 + sigma * result.epsilon, x, rtol=1e-6, atol=1e-6)
    exact = (x.double() - result.x0.double()) / sigma
    torch.testing.assert_close(result.epsilon.double(), exact, rtol=1e-3, atol=1e-3)


def test_noise_is_converted_to_fp32_before_scaling() -> None:
    """The sampler starts in fp32 for any stored dtype, because sigma_max = 80 magnifies fp16 rounding."""
    z = random_noise(1).half()
    x = SCHEDULE.start(z)
    assert x.dtype == torch.float32 and torch.equal(x, 80 * z.float())
    inputs = SCHEDULE.network_input(x, SCHEDULE.one_step(-1))
    torch.testing.assert_close(inputs, z.float() * 0.99998, rtol=1e-6, atol=0)
