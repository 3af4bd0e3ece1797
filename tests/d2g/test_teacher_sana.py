"""SANA teachers, a flow on DC-AE latents with Gemma 2 for text, against diffusers' SanaPipeline."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode, encode, latent_space
from d2g.diffusion.schedule import FlowSchedule
from d2g.diffusion.scheduler_files import load_schedule
from d2g.diffusion.teacher import check_solver, describe_teacher, load_teacher

SHAPE, PROMPTS = (8, 4, 4), [tiny.CAPTIONS[0], " A RED Cube ", "a red cube " * 200, ""]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sana") / "teacher"
    tiny_teachers.save_sana(out)
    return out


def pipeline_latents(folder: Path, z: Tensor, steps: int, guidance: float) -> Tensor:
    images: Tensor = tiny_teachers.diffusers_pipeline(folder)(
        PROMPTS,
        latents=z,
        num_inference_steps=steps,
        guidance_scale=guidance,
        use_resolution_binning=False,
        output_type="latent",
    ).images
    return images


def test_pairs_equal_diffusers_pipeline(folder: Path) -> None:
    """With the published class of scheduler; 3 steps and shift 1 put whole numbers among the times."""
    teacher = load_teacher(str(folder))
    for steps, guidance, size in ((6, 4.5, (4, 4)), (3, 1.0, (4, 4)), (1, 4.5, (3, 5))):
        z = noise(0, range(4), (8, *size))
        result = teacher.sample(z, PROMPTS, steps, guidance, "euler")
        assert result.abs().max() > 0.5
        torch.testing.assert_close(result, pipeline_latents(folder, z, steps, guidance), rtol=0, atol=1e-4)


def test_pairs_equal_the_pipeline_with_an_euler_scheduler(tmp_path: Path) -> None:
    folder, z = tmp_path / "euler", noise(0, range(4), SHAPE)
    tiny_teachers.save_sana(folder, scheduler=FlowMatchEulerDiscreteScheduler, shift=3.0)
    teacher = load_teacher(str(folder))
    result = teacher.sample(z, PROMPTS, 5, 4.5, "euler")
    torch.testing.assert_close(result, pipeline_latents(folder, z, 5, 4.5), rtol=0, atol=1e-4)
    assert teacher.schedule.spacing == "linspace"


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 3, 20, 37])
def test_sigmas_and_times_are_the_schedulers(folder: Path, tmp_path: Path, shift: float, steps: int) -> None:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    schedule = FlowSchedule(train_steps=1000, shift=shift, spacing="trailing", dpm_solver=True)
    points = schedule.points(steps, (4, 4))
    assert [point.t for point in points[:-1]] == scheduler.timesteps.tolist()
    torch.testing.assert_close(torch.tensor([point.sigma for point in points]), scheduler.sigmas)


def test_text_is_encoded_as_by_the_pipeline(folder: Path) -> None:
    """The instruction before captions, the cut after Gemma, and the unconditional row without it."""
    pipe = tiny_teachers.diffusers_pipeline(folder)
    default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    expected = pipe.encode_prompt(PROMPTS, complex_human_instruction=default)
    cond = load_teacher(str(folder)).encode(PROMPTS)
    for name, rows, null in (("hidden", *expected[::2]), ("mask", *expected[1::2])):
        assert cond.tensors[name].shape[:2] == (4, 300)
        torch.testing.assert_close(cond.tensors[name], rows, rtol=0, atol=1e-6)
        torch.testing.assert_close(cond.null[name].expand_as(null), null, rtol=0, atol=1e-6)
    # The instruction is seen, and the empty prompt after it is not the unconditional row.
    bare, _, _, _ = pipe.encode_prompt(PROMPTS[:1], complex_human_instruction=None)
    assert (bare - cond.tensors["hidden"][:1]).abs().max() > 1e-2
    assert (cond.null["hidden"] - cond.tensors["hidden"][3:]).abs().max() > 1e-2


def test_latents_are_those_of_the_autoencoder(folder: Path) -> None:
    vae = pretrained.load_vae(str(folder))
    space = latent_space(vae)
    assert (space.channels, space.downscale, space.scale) == (8, 32, 0.41407)
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = encode(vae, pixels)
        torch.testing.assert_close(latents, vae.encode(pixels).latent * 0.41407)
        torch.testing.assert_close(decode(vae, latents), vae.decode(latents / 0.41407).sample)
    assert latents.shape == (2, 8, 2, 3)
    alone = pretrained.load_autoencoder(str(folder / "vae"))
    assert type(alone).__name__ == "AutoencoderDC"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"use_flow_sigmas": False},
            "use_flow_sigmas=false; expected true, because a SanaPipeline is a flow",
        ),
        ({"prediction_type": "epsilon"}, 'prediction_type="epsilon"; expected "flow_prediction"'),
        ({"algorithm_type": "sde-dpmsolver++"}, 'algorithm_type="sde-dpmsolver\\+\\+": it draws fresh noise'),
    ],
)
def test_other_schedules_are_refused(
    values: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    import shutil

    odd = Path(shutil.copytree(folder, tmp_path / "odd"))
    tiny_teachers.edit(odd, "scheduler/scheduler_config.json", **values)
    with pytest.raises(UserError, match=message) as caught:
        load_schedule(str(odd))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"guidance_embeds": True}, "guidance_embeds=true, as SANA-Sprint, .* already; a SanaPipeline"),
        ({"in_channels": 16}, "takes 16 channels, but latents have 8"),
        ({"caption_channels": 20}, "text is 16 numbers wide, but transformer takes 20"),
    ],
)
def test_other_networks_are_refused(network: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny_teachers.save_sana(tmp_path / "odd", network)
    with pytest.raises(UserError, match=message):
        load_teacher(str(tmp_path / "odd"))


def test_description(folder: Path) -> None:
    result, teacher = describe_teacher(str(folder)), load_teacher(str(folder))
    assert result["latent_shape"] == [8, 4, 4] and result["conditioning"]["guidance"]
    assert result["facts"]["shift"] == 3.0 and "DPMSolver" in result["facts"]["sigmas"]
    assert result["scheduler"] == "DPMSolverMultistepScheduler"
    assert (teacher.default_solver, teacher.schedule.spacing) == ("euler", "trailing")
    check_solver(teacher, "heun", 20, 4.5)
    with pytest.raises(SettingError, match=r"solver is 'ddim', but teacher .* is a flow"):
        check_solver(teacher, "ddim", 20)
