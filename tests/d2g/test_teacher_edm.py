"""EDM teachers: diffusers' schedulers in a plain loop, and its SDXL pipeline, on the same noise."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion.scheduler_files import load_schedule
from d2g.diffusion.solvers import evaluations_per_sample
from d2g.diffusion.teacher import Teacher, check_solver, describe_teacher, load_teacher
from pairgen.config import PAIR_PRESETS, PairConfig
from pairgen.job import config_from_spec, open_job

LABELS = ["1", "9", "1"]
DPM = diffusers.EDMDPMSolverMultistepScheduler


@pytest.fixture(scope="module")
def edm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("edm") / "teacher"
    tiny_teachers.save_edm(out)
    return out


def loop(teacher: Teacher, scheduler: Any, z: Tensor, steps: int, labels: Tensor | None) -> Tensor:
    """diffusers' scheduler as its examples use it, from sigma_max z."""
    scheduler.set_timesteps(steps)
    x = scheduler.config.sigma_max * z
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = teacher.network(scheduler.scale_model_input(x, t), t, class_labels=labels).sample
        x = scheduler.step(output, t, x).prev_sample
    return x


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (diffusers.EDMEulerScheduler, {}),
        (diffusers.EDMEulerScheduler, {"sigma_schedule": "exponential"}),
        (diffusers.EDMEulerScheduler, {"prediction_type": "v_prediction", "sigma_data": 1.0, "rho": 5.0}),
        (DPM, {"solver_order": 1}),
    ],
    ids=["euler", "exponential", "v", "dpm"],
)
def test_pairs_equal_diffusers_sampler(kind: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    teacher = load_teacher(tiny_teachers.save_edm(tmp_path, scheduler=kind, **settings))
    z = noise(0, range(3), (3, 8, 8))
    result = teacher.sample(z, LABELS, 8, 1.0, "euler")
    scheduler = kind.from_pretrained(tmp_path / "scheduler")
    expected = loop(teacher, scheduler, z, 8, torch.tensor([1, 9, 1]))
    assert result.std() > 0.2
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    other = teacher.sample(z, ["2", "9", "1"], 8, 1.0, "euler")
    assert (other[0] - result[0]).abs().max() > 1e-2 and torch.equal(other[1:], result[1:])


def test_an_unconditional_edm_with_another_sigma_data(tmp_path: Path) -> None:
    teacher = load_teacher(tiny_teachers.save_edm(tmp_path, classes=None))
    z = noise(0, range(2), (3, 8, 8))
    scheduler = diffusers.EDMEulerScheduler.from_pretrained(tmp_path / "scheduler")
    expected = loop(teacher, scheduler, z, 6, None)
    torch.testing.assert_close(teacher.sample(z, ["", ""], 6, 1.0, "euler"), expected, rtol=0, atol=1e-5)


def test_sdxl_edm_with_guidance_equals_diffusers_pipeline(tmp_path: Path) -> None:
    """As Playground 2.5, except for its solver's order and its autoencoder. The pipeline starts
    from sqrt(sigma_max^2 + 1) times its latents."""
    folder = tiny_teachers.save_sdxl(tmp_path, scheduler=DPM, **tiny_teachers.EDM, solver_order=1)
    teacher, z = load_teacher(folder), noise(0, range(2), (4, 4, 4))
    prompts = tiny.CAPTIONS[:2]
    result = teacher.sample(z, prompts, 8, 3.0, "euler")
    pipe = tiny_teachers.diffusers_pipeline(tmp_path)
    expected = pipe(
        prompts,
        guidance_scale=3.0,
        latents=z * (80 / pipe.scheduler.init_noise_sigma),
        num_inference_steps=8,
        output_type="latent",
        height=16,
        width=16,
    ).images
    assert result.std() > 0.2 and teacher.pipeline == "StableDiffusionXLPipeline"
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_heun_solves_the_same_ode(edm: Path) -> None:
    teacher, z = load_teacher(str(edm)), noise(0, range(3), (3, 8, 8))
    fine = teacher.sample(z, LABELS, 160, 1.0, "heun")
    errors = [
        (teacher.sample(z, LABELS, steps, 1.0, solver) - fine).abs().max().item()
        for steps, solver in ((40, "euler"), (40, "heun"), (80, "heun"))
    ]
    assert errors[1] < errors[0] / 4 and errors[2] < errors[1] / 2.5, errors
    check_solver(teacher, "heun", 18)
    assert evaluations_per_sample(18, "heun", 1.0) == 35, "Table A1"


def test_description(edm: Path) -> None:
    result, teacher = describe_teacher(str(edm)), load_teacher(str(edm))
    facts = {"preconditioning": "edm", **tiny_teachers.EDM, "sigma_schedule": "karras", "rho": 7.0}
    assert result["facts"].items() >= facts.items() and result["prediction_type"] == "epsilon"
    assert result["solver_defaults"] == {"solver": "euler", "spacing": "linspace", "final_alpha_one": True}
    assert result["scheduler"] == "EDMEulerScheduler" and teacher.default_solver == "euler"
    assert load_schedule(str(edm)) == teacher.schedule


def test_a_pair_spec_records_the_schedule(edm: Path) -> None:
    config = PairConfig(teacher=str(edm), num_pairs=4, guidance=1.0, steps=5, solver="heun")
    job = open_job(config)
    assert (job.spec.solver, job.spec.spacing, job.spec.final_alpha_one) == ("heun", "linspace", True)
    assert job.spec.teacher_facts == describe_teacher(str(edm))["facts"]
    assert open_job(config_from_spec(job.spec)).spec == job.spec, "a store tells how to make more of it"
    z, latents, texts = job.rows([0, 3])
    assert 0.5 < z.std() < 2 and texts == ["0", "3"] and latents.isfinite().all()
    published = PAIR_PRESETS["cifar10"]
    assert (published.num_pairs, published.steps, published.solver) == (1_000_000, 18, "heun")
    assert published.guidance == 1


def test_settings_without_effect_are_refused(edm: Path) -> None:
    teacher = load_teacher(str(edm))
    with pytest.raises(SettingError, match=r"solver is 'ddim', but teacher .* as in EDM; take euler or heun"):
        check_solver(teacher, "ddim", 8)
    with pytest.raises(SettingError, match="steps is 0"):
        check_solver(teacher, "euler", 0)
    with pytest.raises(
        SettingError,
        match=r"spacing is 'trailing', .*sigma_schedule of its scheduler, karras, decides its steps; take",
    ):
        load_teacher(str(edm), spacing="trailing")
    assert load_teacher(str(edm), spacing="linspace").schedule == teacher.schedule


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"final_sigmas_type": "sigma_min"}, 'final_sigmas_type="sigma_min": its final sigma is not 0'),
        ({"sigma_schedule": "linear"}, "sigma_schedule=linear; supported: karras, exponential"),
        ({"prediction_type": "sample"}, "prediction_type=sample; supported: epsilon, v_prediction"),
        ({"sigma_min": 90.0}, "sigma_min=90, sigma_max=80, .*expected 0 < sigma_min < sigma_max"),
        ({"rho": 0.0}, "rho=0; expected"),
    ],
)
def test_invalid_edm_settings_are_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = tiny_teachers.save_edm(tmp_path)
    tiny_teachers.edit(tmp_path, "scheduler/scheduler_config.json", **settings)
    with pytest.raises(UserError, match=says) as caught:
        load_schedule(folder)
    assert "\n" not in str(caught.value)


def test_settings_of_the_multistep_solver(tmp_path: Path) -> None:
    folder = tiny_teachers.save_edm(tmp_path, scheduler=DPM)
    load_schedule(folder)
    tiny_teachers.edit(tmp_path, "scheduler/scheduler_config.json", algorithm_type="sde-dpmsolver++")
    with pytest.raises(UserError, match="draws fresh noise"):
        load_schedule(folder)


def test_networks_without_negative_time_inputs_are_refused(tmp_path: Path) -> None:
    folder = tiny_teachers.save_edm(tmp_path / "edm")
    tiny_teachers.edit(tmp_path / "edm", "unet/config.json", time_embedding_type="fourier")
    with pytest.raises(UserError, match="the UNet has time_embedding_type=fourier; expected positional"):
        load_schedule(folder)
    dit = Path(tiny_teachers.save_dit(tmp_path / "dit", classes=4))
    tiny_teachers.edit(dit, "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    with pytest.raises(UserError, match="EDMEulerScheduler does not go with DiTPipeline; expected DDIM"):
        load_schedule(str(dit))
