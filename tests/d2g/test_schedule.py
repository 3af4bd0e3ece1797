"""d2g.diffusion.schedule: diffusers' timesteps and tables, and the algebra of predictions."""

from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from hypothesis import given
from hypothesis import strategies as st

from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion.pretrained import SD_BETAS
from d2g.diffusion.schedule import (
    DynamicShift,
    FlowSchedule,
    Point,
    Prediction,
    Schedule,
    Spacing,
    denoised_from,
    diffuse,
    predict_epsilon,
    predict_x0,
    timesteps,
)


def sd_schedule(final_alpha_one: bool = True) -> Schedule:
    return Schedule(
        alphas_cumprod=DDIMScheduler(**SD_BETAS).alphas_cumprod.double(),
        prediction="epsilon",
        spacing="leading",
        steps_offset=1,
        final_alpha_one=final_alpha_one,
    )


@pytest.mark.parametrize("spacing", get_args(Spacing))
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 18, 20, 25, 50, 64, 100, 250, 999])
def test_timesteps_equal_diffusers(spacing: Spacing, steps: int) -> None:
    scheduler = DDIMScheduler(**SD_BETAS, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    assert timesteps(1000, steps, spacing, 1) == scheduler.timesteps.tolist()


def test_sd_starts_at_981_and_trailing_at_999() -> None:
    assert timesteps(1000, 50, "leading", 1)[:2] == [981, 961]
    assert timesteps(1000, 50, "trailing", 1)[::49] == [999, 19]
    assert timesteps(1000, 50, "linspace", 1)[::49] == [999, 0]


@given(st.integers(1, 1000), st.sampled_from(["trailing", "linspace"]))
def test_timesteps_descend_within_the_table(steps: int, spacing: Spacing) -> None:
    grid = timesteps(1000, steps, spacing, 0)
    assert len(grid) == steps and grid[0] <= 999 and grid[-1] >= 0
    assert all(a > b for a, b in pairwise(grid))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_invalid_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(SettingError, match=f"steps is {steps}; expected 1 to 1000"):
        timesteps(1000, steps, "leading", 1)


def test_leading_with_an_offset_cannot_use_every_step() -> None:
    with pytest.raises(SettingError, match=r"steps is 1000.*timestep 1000.*999"):
        timesteps(1000, 1000, "leading", 1)
    assert timesteps(1000, 1000, "leading", 0) == list(range(999, -1, -1))


@pytest.mark.parametrize(
    "t, bar, alpha, sigma, ratio, inverse",  # table of method.md
    [
        (999, 0.0046601, 0.068265, 0.997667, 14.6146, 14.6488),
        (981, 0.0057755, 0.075997, 0.997108, 13.1204, 13.1585),
        (399, 0.426086, 0.652753, 0.757571, 1.1606, 1.5320),
        (0, 0.999150, 0.999575, 0.029155, 0.0292, 1.0004),
    ],
)
def test_alpha_table(t: int, bar: float, alpha: float, sigma: float, ratio: float, inverse: float) -> None:
    schedule = sd_schedule()
    a, s = schedule.alpha_sigma(t)
    assert float(schedule.alphas_cumprod[t]) == pytest.approx(bar, rel=1e-4)
    assert (a, s) == pytest.approx((alpha, sigma), rel=1e-4)
    assert (s / a, 1 / a) == pytest.approx((ratio, inverse), rel=2e-3)
    assert a * a + s * s == pytest.approx(1, abs=1e-12)


def test_alpha_before_the_first_timestep() -> None:
    assert sd_schedule(True).alpha_sigma(-19) == (1.0, 0.0)
    assert sd_schedule(False).alpha_sigma(-19) == sd_schedule().alpha_sigma(0)
    assert len(sd_schedule()) == 1000


def network_output(x0: torch.Tensor, eps: torch.Tensor, a: float, s: float, kind: Prediction) -> torch.Tensor:
    return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0}[kind]


@pytest.mark.parametrize("kind", get_args(Prediction))
@pytest.mark.parametrize("t", [999, 981, 399, 20, 0])
def test_conversions_recover_both_ends(kind: Prediction, t: int) -> None:
    alpha, sigma = sd_schedule().alpha_sigma(t)
    x0, eps = noise(0, [0, 1], (2, 4, 4, 4))
    output = network_output(x0, eps, alpha, sigma, kind)
    x = alpha * x0 + sigma * eps
    torch.testing.assert_close(predict_x0(output, x, alpha, sigma, kind), x0, atol=2e-5, rtol=0)
    torch.testing.assert_close(predict_epsilon(output, x, alpha, sigma, kind), eps, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", get_args(Prediction))
def test_conversions_equal_diffusers(kind: Prediction) -> None:
    scheduler = DDIMScheduler(
        **SD_BETAS, prediction_type=kind, clip_sample=False, set_alpha_to_one=True, steps_offset=1
    )
    scheduler.set_timesteps(50)
    output, x = noise(1, [0, 1], (2, 4, 4, 4))
    theirs = scheduler.step(output, 981, x).pred_original_sample
    ours = predict_x0(output, x, *sd_schedule().alpha_sigma(981), kind)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_predictions_are_combined_in_fp32() -> None:
    alpha, sigma = sd_schedule().alpha_sigma(999)
    output, x = noise(1, [0, 1], (64,), torch.bfloat16)
    result = predict_x0(output, x, alpha, sigma, "epsilon")
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, predict_x0(output.float(), x.float(), alpha, sigma, "epsilon"))


def test_epsilon_at_zero_terminal_snr_is_refused_and_v_is_finite() -> None:
    x = torch.ones(1)
    with pytest.raises(UserError, match="v-prediction"):
        predict_x0(x, x, 0.0, 1.0, "epsilon")
    assert predict_x0(x, x, 0.0, 1.0, "v_prediction") == -1


def test_diffuse_equals_diffusers() -> None:
    scheduler = DDIMScheduler(**SD_BETAS)
    x0, eps = noise(2, [0, 1], (3, 4, 2, 2))
    t = torch.tensor([0, 500, 999])
    theirs = scheduler.add_noise(x0, eps, t)
    torch.testing.assert_close(diffuse(x0, eps, sd_schedule().alphas_cumprod, t), theirs)


def test_points_are_the_timesteps_and_the_end_point() -> None:
    points = sd_schedule(False).points(50, (64, 64))
    assert [point.t for point in points] == [*timesteps(1000, 50, "leading", 1), -1]
    assert points[-1].alpha == pytest.approx(0.99915**0.5, rel=1e-5)
    assert sd_schedule(True).points(50, (64, 64))[-1] == (-1, 1.0, 0.0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 3, 28, 50, 999])
def test_flow_points_equal_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    points = FlowSchedule(train_steps=1000, shift=shift, spacing="linspace").points(steps, (64, 64))
    assert torch.allclose(torch.tensor([p.sigma for p in points]), scheduler.sigmas, rtol=0, atol=1e-6)
    assert torch.allclose(torch.tensor([p.t for p in points[:-1]]), scheduler.timesteps, rtol=0, atol=1e-3)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    points = FlowSchedule(train_steps=1000, shift=shift, spacing="trailing").points(steps, (64, 64))
    assert torch.allclose(torch.tensor([p.sigma for p in points]), scheduler.sigmas, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (128, 96)])
def test_dynamic_flow_points_equal_diffusers(kind: Any, size: tuple[int, int]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    mu = calculate_shift(size[0] // 2 * (size[1] // 2), 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(28, mu=mu)
    dynamic = DynamicShift(
        base_shift=0.5, max_shift=1.15, base_length=256, max_length=4096, kind=kind, patch_size=2
    )
    flow = FlowSchedule(train_steps=1000, shift=1.0, spacing="linspace", dynamic=dynamic)
    result = torch.tensor([p.sigma for p in flow.points(28, size)])
    assert torch.allclose(result, scheduler.sigmas, rtol=0, atol=1e-6)


def test_a_flow_starts_at_noise_and_ends_at_data() -> None:
    for spacing in ("linspace", "trailing"):
        points = FlowSchedule(train_steps=1000, shift=3.0, spacing=spacing).points(10, (4, 4))
        assert points[0] == (1000.0, 0.0, 1.0) and points[-1] == (0.0, 1.0, 0.0)
        assert all(a.sigma > b.sigma for a, b in pairwise(points))
        assert all(p.alpha + p.sigma == pytest.approx(1) for p in points)
    for steps in (0, 1001):
        with pytest.raises(SettingError, match=f"steps is {steps}; expected 1 to 1000"):
            FlowSchedule(train_steps=1000, shift=3.0, spacing="linspace").points(steps, (4, 4))


@given(st.floats(0, 1), st.sampled_from([*get_args(Prediction), "flow_prediction"]))
def test_x0_and_epsilon_are_recovered_from_every_prediction_type(sigma: float, kind: Any) -> None:
    """From the exact network output, at every point where they are defined; no division by alpha = 0."""
    alpha = 1 - sigma if kind == "flow_prediction" else (1 - sigma**2) ** 0.5
    if (kind == "epsilon" and alpha < 0.01) or (kind == "sample" and sigma < 0.01):
        return
    x0, eps = noise(0, [0, 1], (2, 4, 4, 4))
    output = {
        "epsilon": eps,
        "v_prediction": alpha * eps - sigma * x0,
        "sample": x0,
        "flow_prediction": eps - x0,
    }[kind]
    result = denoised_from(output, alpha * x0 + sigma * eps, Point(0, alpha, sigma), kind)
    torch.testing.assert_close(result.x0, x0, rtol=0, atol=2e-4)
    torch.testing.assert_close(result.epsilon, eps, rtol=0, atol=2e-4)
