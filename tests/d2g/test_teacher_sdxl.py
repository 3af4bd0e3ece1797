"""SDXL teachers against diffusers' StableDiffusionXLPipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.errors import UserError
from d2g.core.seeds import noise
from d2g.diffusion.teacher import describe_teacher, load_teacher

SHAPE, PROMPTS = (4, 4, 4), [*tiny.CAPTIONS[:2], ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdxl") / "teacher"
    tiny_teachers.save_sdxl(out)
    return out


def pipeline_latents(folder: Path, latents: Tensor, steps: int, **settings: Any) -> Tensor:
    pipe = tiny_teachers.diffusers_pipeline(folder)
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    # The pipeline multiplies its latents by init_noise_sigma of the scheduler.
    started = latents / pipe.scheduler.init_noise_sigma
    if isinstance(pipe.scheduler, EulerDiscreteScheduler):
        pipe.scheduler.set_timesteps(steps)
        started = latents
    images: Tensor = pipe(
        PROMPTS, latents=started, num_inference_steps=steps, output_type="latent", **settings
    ).images
    return images


def test_pairs_equal_diffusers_pipeline(folder: Path) -> None:
    teacher, z = load_teacher(str(folder), final_alpha="teacher"), noise(0, range(3), SHAPE)
    for guidance, rescale in ((3.0, 0.0), (1.0, 0.0), (5.0, 0.7)):
        result = teacher.sample(z, PROMPTS, 8, guidance, "ddim", rescale)
        expected = pipeline_latents(folder, z, 8, guidance_scale=guidance, guidance_rescale=rescale)
        assert result.abs().max() > 0.5
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_the_unconditional_embedding_follows_model_index(folder: Path, tmp_path: Path) -> None:
    encoded = Path(tiny_teachers.save_sdxl(tmp_path / "encoded", zeros=False))
    z, result = noise(0, range(3), SHAPE), {}
    for name in (folder, encoded):
        teacher = load_teacher(str(name), final_alpha="teacher")
        result[name] = teacher.sample(z, PROMPTS, 4, 3.0, "ddim")
        torch.testing.assert_close(
            result[name], pipeline_latents(name, z, 4, guidance_scale=3.0), rtol=0, atol=1e-4
        )
        null = teacher.encode(["", "a red cube"]).null
        assert all(t.any().item() == (name is encoded) for t in null.values())
        # The prompt "" among the captions is encoded like any other text.
        assert all(t.any() for t in teacher.encode([""]).tensors.values())
        assert teacher.facts["no_prompt"] == ("zeros" if name is folder else "the empty prompt")
    assert (result[folder] - result[encoded]).abs().max() > 1e-3


def test_time_ids_equal_those_of_diffusers(folder: Path) -> None:
    """A size that is not square and not the network's default: the time ids follow the latents."""
    teacher, z = load_teacher(str(folder), final_alpha="teacher"), noise(0, range(3), (4, 6, 4))
    conditions: list[dict[str, Tensor]] = []
    teacher.network.register_forward_pre_hook(
        lambda module, args, kwargs: conditions.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    result = teacher.sample(z, PROMPTS, 4, 3.0, "ddim")
    expected = pipeline_latents(folder, z, 4, guidance_scale=3.0, height=24, width=16)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    assert conditions[0]["time_ids"].tolist() == [[24, 16, 0, 0, 24, 16]] * 6
    small = teacher.sample(z[:, :, :4], PROMPTS, 4, 3.0, "ddim")
    assert conditions[-1]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 6 and small.shape == (3, 4, 4, 4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
def test_the_published_euler_scheduler_ends_at_clean_data(tmp_path: Path) -> None:
    """SDXL's file has an EulerDiscreteScheduler and set_alpha_to_one=false, which Euler never reads: pairs
    equal the pipeline for both values."""
    folder = Path(
        tiny_teachers.save_sdxl(
            tmp_path / "euler", scheduler=EulerDiscreteScheduler, timestep_spacing="leading"
        )
    )
    assert '"set_alpha_to_one": false' in (folder / "scheduler" / "scheduler_config.json").read_text()
    z = noise(0, range(3), SHAPE)
    expected = pipeline_latents(folder, z, 8, guidance_scale=3.0)
    for rule in ("teacher", "one"):
        result = load_teacher(str(folder), final_alpha=rule).sample(z, PROMPTS, 8, 3.0, "ddim")
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
def test_a_first_order_dpm_solver_is_ddim(tmp_path: Path) -> None:
    """The first-order DPM-Solver of diffusers takes the same steps as our DDIM."""
    folder = Path(
        tiny_teachers.save_sdxl(
            tmp_path / "dpm",
            scheduler=DPMSolverMultistepScheduler,
            solver_order=1,
            timestep_spacing="trailing",
        )
    )
    z = noise(0, range(3), SHAPE)
    result = load_teacher(str(folder)).sample(z, PROMPTS, 8, 3.0, "ddim")
    torch.testing.assert_close(result, pipeline_latents(folder, z, 8, guidance_scale=3.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_a_row_does_not_depend_on_its_batch(folder: Path, solver: Any) -> None:
    teacher = load_teacher(str(folder))
    batch = teacher.sample(noise(0, range(3), SHAPE), PROMPTS, 4, 3.0, solver)
    for row in range(3):
        single = teacher.sample(noise(0, [row], SHAPE), PROMPTS[row : row + 1], 4, 3.0, solver)
        assert (single[0] - batch[row]).abs().max() < 1e-5 * batch.abs().max()


def test_description(folder: Path) -> None:
    result, teacher = describe_teacher(str(folder)), load_teacher(str(folder))
    assert result["pipeline"] == "StableDiffusionXLPipeline" and result["prediction_type"] == "epsilon"
    assert result["conditioning"]["encoders"] == {
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    }
    assert result["facts"]["time_ids"] == "height, width, 0, 0, height, width"
    assert len(teacher.encoders) == 2 and set(result["params"]) == {
        "unet",
        "text_encoder",
        "text_encoder_2",
        "vae",
    }


def test_the_refiner_is_refused(tmp_path: Path) -> None:
    """The refiner takes five time ids, the last of which is an aesthetic score."""
    folder = Path(tiny_teachers.save_sdxl(tmp_path / "refiner"))
    tiny_teachers.edit(folder, "unet/config.json", projection_class_embeddings_input_dim=5 * 8 + 24)
    with pytest.raises(UserError, match=r"takes 64 added numbers; expected six time ids of 8 and 24 of text"):
        load_teacher(str(folder))
