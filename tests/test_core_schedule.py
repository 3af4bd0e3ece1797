"""core.schedule: diffusers' timesteps and tables, and the algebra of predictions."""

from itertools import pairwise
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from core.errors import SettingError, UserError
from core.pretrained import SD_BETAS
from core.schedule import Prediction, Schedule, Spacing, diffuse, predict_epsilon, predict_x0, timesteps
from core.seeds import noise


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
def test_impossible_step_counts(steps: int) -> None:
    with pytest.raises(SettingError, match=f"steps is {steps}; expected 1 to 1000"):
        timesteps(1000, steps, "leading", 1)


def test_leading_with_an_offset_cannot_use_every_step() -> None:
    with pytest.raises(SettingError, match=r"steps is 1000.*timestep 1000.*999"):
        timesteps(1000, 1000, "leading", 1)
    assert timesteps(1000, 1000, "leading", 0) == list(range(999, -1, -1))


@pytest.mark.parametrize(
    "t, bar, alpha, sigma, ratio, inverse",  # method notes, table of section 1.2
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


def test_before_the_first_step_is_clean_data_or_alpha_0() -> None:
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


def test_combination_is_single_precision_whatever_comes_in() -> None:
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
