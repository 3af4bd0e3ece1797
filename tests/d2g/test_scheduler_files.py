"""d2g.diffusion.scheduler_files: settings read from a scheduler's file, and every refusal with its remedy."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import tiny_teachers
from d2g.core.errors import UserError
from d2g.diffusion.pretrained import SD_BETAS
from d2g.diffusion.schedule import FlowSchedule, Schedule
from d2g.diffusion.scheduler_files import (
    EDM,
    FLOW,
    REFUSED,
    VARIANCE_PRESERVING,
    load_schedule,
)


@pytest.fixture
def copy(teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(teacher, tmp_path / "copy"))


@pytest.fixture(scope="module")
def saved_ldm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_teachers.save_ldm(tmp_path_factory.mktemp("ldm") / "teacher"))


@pytest.fixture
def ldm(saved_ldm: Path, tmp_path: Path) -> Path:
    """A copy of a pipeline that leaves its scheduler as it is; StableDiffusionPipeline corrects some."""
    return Path(shutil.copytree(saved_ldm, tmp_path / "ldm"))


def set_scheduler(folder: Path, kind: str, **settings: Any) -> str:
    """Replace the scheduler of a folder by one with exactly these settings."""
    tiny_teachers.edit(folder, "model_index.json", scheduler=["diffusers", kind])
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": kind, **settings}))
    return str(folder)


def test_the_tables_match_the_classes_of_diffusers() -> None:
    for name in (*VARIANCE_PRESERVING, *FLOW, *EDM, *REFUSED):
        assert hasattr(diffusers, name), name
    assert not set(REFUSED) & {*VARIANCE_PRESERVING, *FLOW, *EDM}


@pytest.mark.parametrize("kind", VARIANCE_PRESERVING)
@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # in diffusers
def test_betas_equal_those_of_the_scheduler_class(copy: Path, kind: str) -> None:
    settings = dict(SD_BETAS, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    for changed in ({}, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}):
        result = load_schedule(set_scheduler(copy, kind, **{**settings, **changed}))
        reference = getattr(diffusers, kind).from_config({**settings, **changed})
        assert torch.equal(result.alphas_cumprod, reference.alphas_cumprod.double())
        assert result.prediction == "v_prediction"
        # one of them has a fixed spacing
        assert result.spacing == ("linspace" if kind == "DPMSolverSinglestepScheduler" else "trailing")


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_zero_terminal_snr_is_exactly_zero(copy: Path, kind: str) -> None:
    """Euler and other schedulers replace 0 by 2^-24, because they divide by it."""
    settings = dict(SD_BETAS, clip_sample=False, rescale_betas_zero_snr=True)
    result = load_schedule(set_scheduler(copy, kind, **settings))
    reference = getattr(diffusers, kind).from_config(settings)
    assert torch.equal(result.alphas_cumprod[:-1], reference.alphas_cumprod.double()[:-1])
    assert result.alpha_sigma(999) == (0.0, 1.0) and reference.alphas_cumprod[-1] <= 2**-24


@pytest.mark.parametrize(
    ("kind", "settings", "final_alpha_one"),
    [
        ("DDIMScheduler", {"clip_sample": False}, True),  # its own default
        ("PNDMScheduler", {}, False),  # its own default
        ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}, False),
        ("PNDMScheduler", {"set_alpha_to_one": True}, True),
        # keys of another scheduler that these never read
        ("EulerDiscreteScheduler", {"set_alpha_to_one": False, "clip_sample": True}, True),
        ("DPMSolverMultistepScheduler", {"set_alpha_to_one": False}, True),
    ],
)
def test_the_last_step_follows_the_scheduler(
    copy: Path, kind: str, settings: dict[str, Any], final_alpha_one: bool
) -> None:
    assert load_schedule(set_scheduler(copy, kind, **settings)).final_alpha_one is final_alpha_one


def test_defaults_are_those_of_the_class(copy: Path, ldm: Path) -> None:
    euler = load_schedule(set_scheduler(ldm, "EulerDiscreteScheduler"))
    assert (euler.spacing, euler.steps_offset, euler.prediction) == ("linspace", 0, "epsilon")
    assert load_schedule(set_scheduler(copy, "EulerDiscreteScheduler")).steps_offset == 1, "corrected"
    assert load_schedule(set_scheduler(copy, "PNDMScheduler")).spacing == "leading"


@pytest.mark.parametrize("kind", REFUSED)
def test_schedulers_that_cannot_make_pairs_are_refused(copy: Path, kind: str) -> None:
    with pytest.raises(UserError, match=f"scheduler {kind} cannot make pairs: {REFUSED[kind]}") as caught:
        load_schedule(set_scheduler(copy, kind, **SD_BETAS))
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)
    assert "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)" in str(
        caught.value
    )


def test_unknown_schedulers_are_refused_with_the_supported_ones(copy: Path) -> None:
    with pytest.raises(
        UserError, match="IPNDMScheduler does not go with StableDiffusionPipeline; expected DDIM"
    ):
        load_schedule(set_scheduler(copy, "IPNDMScheduler"))
    with pytest.raises(
        UserError, match="FlowMatchEulerDiscreteScheduler does not go with StableDiffusionPipe"
    ):
        load_schedule(set_scheduler(copy, "FlowMatchEulerDiscreteScheduler", shift=3.0))


SETTINGS: list[tuple[str, str, Any, str]] = [
    ("DDIMScheduler", "clip_sample", True, "it clips x_0"),
    ("DDIMScheduler", "thresholding", True, "it clips x_0"),
    ("HeunDiscreteScheduler", "clip_sample", True, "it clips x_0"),
    ("UniPCMultistepScheduler", "thresholding", True, "it clips x_0"),
    ("DPMSolverMultistepScheduler", "algorithm_type", "sde-dpmsolver++", "draws fresh noise"),
    ("DPMSolverMultistepScheduler", "algorithm_type", "sde-dpmsolver", "draws fresh noise"),
    ("DPMSolverMultistepScheduler", "final_sigmas_type", "sigma_min", "its final sigma is not 0"),
    ("EulerDiscreteScheduler", "final_sigmas_type", "sigma_min", "its final sigma is not 0"),
    ("EulerDiscreteScheduler", "use_karras_sigmas", True, "leaves the timesteps"),
    ("EulerDiscreteScheduler", "use_exponential_sigmas", True, "leaves the timesteps"),
    ("EulerDiscreteScheduler", "use_beta_sigmas", True, "leaves the timesteps"),
    ("EulerDiscreteScheduler", "interpolation_type", "log_linear", "log sigma"),
    ("EulerDiscreteScheduler", "timestep_type", "continuous", "log sigma"),
    ("EulerDiscreteScheduler", "sigma_max", 80.0, "range of sigmas"),
    ("EulerDiscreteScheduler", "sigma_min", 0.002, "range of sigmas"),
    ("DPMSolverMultistepScheduler", "use_lu_lambdas", True, "leaves the timesteps"),
    ("DPMSolverMultistepScheduler", "use_flow_sigmas", True, "FlowMatchEulerDiscreteScheduler"),
    ("DPMSolverMultistepScheduler", "lambda_min_clipped", -5.1, "first steps"),
    ("FlowMatchEulerDiscreteScheduler", "stochastic_sampling", True, "draws fresh noise"),
    ("FlowMatchEulerDiscreteScheduler", "use_karras_sigmas", True, "leaves the timesteps"),
    ("FlowMatchEulerDiscreteScheduler", "invert_sigmas", True, "data to noise"),
    ("FlowMatchEulerDiscreteScheduler", "shift_terminal", 0.1, "stretches"),
]


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sd3") / "teacher"
    tiny_teachers.save_sd3(out, with_t5=False)
    return out


@pytest.mark.parametrize(("kind", "key", "value", "why"), SETTINGS)
def test_unsupported_scheduler_settings_are_refused(
    ldm: Path, sd3: Path, tmp_path: Path, kind: str, key: str, value: Any, why: str
) -> None:
    folder = Path(shutil.copytree(sd3, tmp_path / "flow")) if kind in FLOW else ldm
    good = {} if kind in FLOW else {"clip_sample": False}
    assert isinstance(load_schedule(set_scheduler(folder, kind, **good)), FlowSchedule | Schedule)
    with pytest.raises(UserError, match=f"scheduler {kind} has {key}=") as caught:
        load_schedule(set_scheduler(folder, kind, **{**good, key: value}))
    text = str(caught.value)
    assert (
        why in text and "set it to" in text and "scheduler/scheduler_config.json" in text and "\n" not in text
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"prediction_type": "flow_prediction"},
            "prediction_type=flow_prediction; supported: epsilon, v_pred",
        ),
        ({"timestep_spacing": "karras"}, "timestep_spacing=karras; supported: leading, trailing, linspace"),
        ({"beta_schedule": "none"}, "has betas that DDIMScheduler does not take"),
    ],
)
def test_invalid_scheduler_settings_are_refused(copy: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_schedule(set_scheduler(copy, "DDIMScheduler", clip_sample=False, **settings))


def test_a_damaged_scheduler_file_is_reported(copy: Path) -> None:
    (copy / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(UserError, match=r"scheduler DDIMScheduler: scheduler_config.json cannot be read"):
        load_schedule(str(copy))


def test_a_flow_is_read_from_its_file(sd3: Path, tmp_path: Path) -> None:
    result = load_schedule(str(sd3))
    assert result == FlowSchedule(train_steps=1000, shift=3.0, spacing="linspace")
    folder = Path(shutil.copytree(sd3, tmp_path / "dynamic"))
    result = load_schedule(set_scheduler(folder, FLOW[0], use_dynamic_shifting=True, base_shift=0.4))
    assert isinstance(result, FlowSchedule) and result.dynamic is not None
    assert (result.dynamic.base_shift, result.dynamic.max_shift, result.dynamic.patch_size) == (0.4, 1.15, 2)
