"""distill.generator: a student starts as the teacher's own x_0 prediction, for every kind of teacher."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from core import pretrained
from core.errors import SettingError
from core.seeds import noise
from distill.generator import Student, student_from_teacher
from pairgen.teacher import load_teacher


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_at_the_start_it_is_the_teachers_prediction(tmp_path: Path, prediction: str) -> None:
    """One DDIM step from T to clean data is x_0 hat: the student against the teacher's own sampler."""
    tiny.save_teacher(tmp_path, prediction_type=prediction, timestep_spacing="trailing")
    drawn, prompts = noise(0, range(3), (4, 4, 4)), tiny.CAPTIONS[:3]
    teacher, student = load_teacher(str(tmp_path)), student_from_teacher(str(tmp_path))
    found = student(drawn, teacher.encode(prompts).rows["hidden"])
    expected = teacher.sample(drawn, prompts, 1, 1.0, "ddim")
    assert student.timestep == 999
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_papers_formula(teacher: Path) -> None:
    """Supplement eq. 2 with SD's alpha and sigma at 999 (method.md 1.2), on the raw network output."""
    student = student_from_teacher(str(teacher))
    drawn, text = (
        noise(0, range(2), (4, 4, 4)),
        torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0)),
    )
    epsilon = student.unet(drawn, 999, text).sample
    torch.testing.assert_close(
        student(drawn, text), (drawn - 0.997667 * epsilon) / 0.068265, rtol=1e-3, atol=1e-3
    )


def test_it_has_the_unets_parameters_and_no_others(teacher: Path) -> None:
    student = student_from_teacher(str(teacher))
    names = {f"unet.{name}" for name in pretrained.load_unet(str(teacher)).state_dict()}
    assert set(student.state_dict()) == names and student.latent_shape == (4, 4, 4)


def test_the_combination_is_fp32_under_autocast(teacher: Path) -> None:
    """Rounding the network to bf16 costs 15 roundings (1 / alpha); rounding the sum too would cost more."""
    student = student_from_teacher(str(teacher))
    drawn, text = (
        noise(0, range(2), (4, 4, 4)),
        torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0)),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found, raw = student(drawn, text), student.unet(drawn, 999, text).sample
    assert raw.dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(
        found, (drawn - student.sigma * raw.float()) / student.alpha, rtol=1e-5, atol=1e-5
    )


def test_timesteps(teacher: Path) -> None:
    schedule = pretrained.load_schedule(str(teacher))
    student = student_from_teacher(str(teacher), 981)
    assert student.timestep == 981 and (student.alpha, student.sigma) == schedule.alpha_sigma(981)
    for wrong in (1000, -2):
        with pytest.raises(SettingError, match=f"student_timestep is {wrong}; expected 0 to 999"):
            student_from_teacher(str(teacher), wrong)


def test_zero_terminal_snr_is_finite_for_v_and_refused_for_epsilon(teacher: Path) -> None:
    """At alpha = 0 the v formula is -v; the epsilon formula divides by zero (method.md 2)."""
    schedule = pretrained.load_schedule(str(teacher))
    bars = schedule.alphas_cumprod.clone()
    bars[-1] = 0.0
    zero = replace(schedule, alphas_cumprod=bars, prediction="v_prediction")
    unet = pretrained.load_unet(str(teacher))
    drawn, text = noise(0, range(1), (4, 4, 4)), torch.zeros(1, 12, 16)
    torch.testing.assert_close(Student(unet, zero)(drawn, text), -unet(drawn, 999, text).sample)
    with pytest.raises(Exception, match="zero terminal SNR"):
        Student(unet, replace(zero, prediction="epsilon"))(drawn, text)
