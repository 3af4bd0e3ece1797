"""SD3 and SD3.5 teachers, a flow over three text encoders, against diffusers' StableDiffusion3Pipeline."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion.latents import latent_space
from d2g.diffusion.pretrained import load_vae
from d2g.diffusion.schedule import FlowSchedule
from d2g.diffusion.teacher import check_solver, describe_teacher, load_teacher

SHAPE, PROMPTS = (8, 4, 4), [*tiny.CAPTIONS[:2], ""]
DYNAMIC = dict(use_dynamic_shifting=True, base_image_seq_len=2, max_image_seq_len=16, max_shift=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sd3") / "teacher"
    tiny_teachers.save_sd3(out)
    return out


def pipeline_latents(folder: Path, latents: Tensor, steps: int, **settings: Any) -> Tensor:
    bare = not (folder / "text_encoder_3").exists()
    pipe = tiny_teachers.diffusers_pipeline(
        folder, **(dict(text_encoder_3=None, tokenizer_3=None) if bare else {})
    )
    assert type(pipe).__name__ == "StableDiffusion3Pipeline"
    images: Tensor = pipe(
        PROMPTS, latents=latents, num_inference_steps=steps, output_type="latent", **settings
    ).images
    return images


def test_pairs_equal_diffusers_pipeline(folder: Path, tmp_path: Path) -> None:
    sd3 = Path(tiny_teachers.save_sd3(tmp_path / "sd3", network=tiny_teachers.SD3))
    cases = [(folder, 8, 3.0), (folder, 7, 1.0), (folder, 1, 3.0), (sd3, 4, 3.0)]
    for name, steps, guidance in cases:
        teacher, z = load_teacher(str(name)), noise(0, range(3), SHAPE)
        result = teacher.sample(z, PROMPTS, steps, guidance, "euler")
        expected = pipeline_latents(name, z, steps, guidance_scale=guidance)
        assert result.abs().max() > 0.5
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_trailing_equals_the_pipeline_with_its_sigmas(folder: Path) -> None:
    teacher, z = load_teacher(str(folder), spacing="trailing"), noise(0, range(3), SHAPE)
    result = teacher.sample(z, PROMPTS, 6, 3.0, "euler")
    pipe = tiny_teachers.diffusers_pipeline(folder)
    expected = pipe(
        PROMPTS,
        latents=z,
        sigmas=np.linspace(1.0, 1 / 6, 6).tolist(),
        guidance_scale=3.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    linspace = load_teacher(str(folder)).sample(z, PROMPTS, 6, 3.0, "euler")
    assert (result - linspace).abs().max() > 1e-2


def test_missing_t5_embeddings_are_zeros(folder: Path, tmp_path: Path) -> None:
    bare, z = Path(tiny_teachers.save_sd3(tmp_path / "bare", with_t5=False)), noise(0, range(3), SHAPE)
    teacher = load_teacher(str(bare))
    result = teacher.sample(z, PROMPTS, 6, 3.0, "euler")
    torch.testing.assert_close(result, pipeline_latents(bare, z, 6, guidance_scale=3.0), rtol=0, atol=1e-4)
    hidden = teacher.encode(["a red cube"]).tensors["hidden"]
    assert hidden.shape == (1, 12 + 256, 48) and not hidden[:, 12:].any() and hidden[:, :12].any()
    assert (teacher.facts["t5"], len(teacher.encoders)) == ("absent: zeros", 2)
    with_t5 = load_teacher(str(folder))
    assert (with_t5.facts["t5"], len(with_t5.encoders)) == ("encoded", 3)
    assert with_t5.encode(["a red cube"]).tensors["hidden"][:, 12:].any()


def test_a_tokenizer_without_its_t5_is_not_used(folder: Path, tmp_path: Path) -> None:
    """diffusers saves such a folder from a pipeline that was loaded with text_encoder_3=None alone."""
    bare, z = Path(shutil.copytree(folder, tmp_path / "bare")), noise(0, range(3), SHAPE)
    shutil.rmtree(bare / "text_encoder_3")
    tiny_teachers.edit(bare, "model_index.json", text_encoder_3=[None, None])
    result = load_teacher(str(bare)).sample(z, PROMPTS, 6, 3.0, "euler")
    torch.testing.assert_close(result, pipeline_latents(bare, z, 6, guidance_scale=3.0), rtol=0, atol=1e-4)


def test_a_t5_without_its_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    tiny_teachers.edit(bare, "model_index.json", tokenizer_3=[None, None])
    with pytest.raises(UserError, match="has text_encoder_3 but no tokenizer_3; "):
        describe_teacher(str(bare))


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_depends_on_the_size(kind: str, tmp_path: Path) -> None:
    folder = Path(tiny_teachers.save_sd3(tmp_path / "dynamic", time_shift_type=kind, **DYNAMIC))
    teacher, result = load_teacher(str(folder)), {}
    for size in (4, 6):
        z = noise(0, range(3), (8, size, 4))
        result[size] = teacher.sample(z, PROMPTS, 5, 3.0, "euler")
        expected = pipeline_latents(folder, z, 5, guidance_scale=3.0, height=4 * size, width=16)
        torch.testing.assert_close(result[size], expected, rtol=0, atol=1e-4)
    schedule = teacher.schedule
    assert schedule.points(5, (4, 4))[2].sigma != schedule.points(5, (6, 4))[2].sigma
    assert teacher.facts["dynamic_shift"]["kind"] == kind and "shift" not in teacher.facts


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_row_does_not_depend_on_its_batch(folder: Path, solver: Any) -> None:
    teacher = load_teacher(str(folder))
    batch = teacher.sample(noise(0, range(3), SHAPE), PROMPTS, 4, 3.0, solver)
    for row in range(3):
        single = teacher.sample(noise(0, [row], SHAPE), PROMPTS[row : row + 1], 4, 3.0, solver)
        assert (single[0] - batch[row]).abs().max() < 1e-5 * batch.abs().max()


def test_the_flow_is_integrated_in_fp32(folder: Path) -> None:
    """Only the network is in bf16: diffusers' scheduler on fp32 latents takes its outputs to the same result.

    The outputs are those of one run, because inputs that are equal up to rounding in fp32 may be rounded to
    different numbers in bf16.
    """
    teacher = load_teacher(str(folder), precision="bf16")
    inputs, velocities = list[Tensor](), list[Tensor]()

    def record(network: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        inputs.append(kwargs["hidden_states"])
        velocities.append(output[0] if isinstance(output, tuple) else output.sample)

    teacher.network.register_forward_hook(record, with_kwargs=True)
    x = noise(0, range(3), SHAPE)
    result = teacher.sample(x, PROMPTS, 5, 1.0, "euler")
    scheduler = tiny_teachers.diffusers_pipeline(folder).scheduler
    scheduler.set_timesteps(5)
    for t, network_input, velocity in zip(scheduler.timesteps, inputs, velocities, strict=True):
        assert velocity.dtype == network_input.dtype == torch.bfloat16
        torch.testing.assert_close(network_input.float(), x, rtol=2**-8, atol=1e-5)
        x = scheduler.step(velocity.float(), t, x).prev_sample
    torch.testing.assert_close(result, x, rtol=0, atol=1e-5)


def test_settings_without_meaning_for_a_flow_are_refused(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    assert teacher.default_solver == "euler" and isinstance(teacher.schedule, FlowSchedule)
    check_solver(teacher, "euler", 28, 7.0)
    check_solver(teacher, "heun", 28, 7.0)
    with pytest.raises(SettingError, match=r"solver is 'ddim', but teacher .* is a flow; take euler or heun"):
        check_solver(teacher, "ddim", 28)
    with pytest.raises(SettingError, match="steps is 1001; expected 1 to 1000"):
        check_solver(teacher, "euler", 1001)
    with pytest.raises(SettingError, match=r"spacing is 'leading', .* take linspace or trailing"):
        load_teacher(str(folder), spacing="leading")


def test_description(folder: Path) -> None:
    result = describe_teacher(str(folder))
    assert result["pipeline"] == "StableDiffusion3Pipeline"
    assert result["prediction_type"] == "flow_prediction" and result["latent_shape"] == [8, 4, 4]
    assert result["latent_space"] == {"channels": 8, "downscale": 4, "scale": 1.5305, "shift": 0.0609}
    assert result["solver_defaults"] == {
        "solver": "euler",
        "spacing": "linspace",
        "final_alpha_one": True,
        "train_steps": 1000,
    }
    assert result["facts"]["shift"] == 3.0 and result["facts"]["t5_tokens"] == 256
    assert set(result["params"]) >= {"transformer", "text_encoder_3", "vae"}


def test_latent_scale_and_shift_come_from_the_autoencoder(folder: Path) -> None:
    assert load_teacher(str(folder)).space == latent_space(load_vae(str(folder)))


def test_a_vp_scheduler_is_refused(tmp_path: Path) -> None:
    folder = Path(tiny_teachers.save_sd3(tmp_path / "odd", with_t5=False))
    tiny_teachers.edit(folder, "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(
        UserError, match="DDIMScheduler does not go with StableDiffusion3Pipeline; expected Flow"
    ):
        load_teacher(str(folder))
