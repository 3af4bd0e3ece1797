"""Unconditional teachers, in pixels and in latents, against diffusers' DDIMPipeline and LDMPipeline."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

import tiny_teachers
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion.latents import LatentSpace, decode, encode
from d2g.diffusion.pretrained import load_vae
from d2g.diffusion.teacher import check_solver, describe_teacher, load_teacher


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pixels") / "teacher"
    tiny_teachers.save_pixels(out, timestep_spacing="trailing")
    return out


@pytest.fixture(scope="module")
def ldm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ldm") / "teacher"
    tiny_teachers.save_ldm(out)
    return out


def test_pixels_equal_diffusers_pipeline(pixels: Path) -> None:
    teacher = load_teacher(str(pixels), final_alpha="teacher")
    assert teacher.space == LatentSpace(channels=3, downscale=1, scale=1.0)
    z = torch.randn((3, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    result = teacher.sample(z, [""] * 3, 8, 1.0, "ddim")
    pipe = tiny_teachers.diffusers_pipeline(pixels)
    assert type(pipe).__name__ == "DDIMPipeline"
    images = pipe(3, torch.Generator().manual_seed(0), num_inference_steps=8, output_type="pt").images
    pixels_seen = (decode(load_vae(str(pixels)), result) / 2 + 0.5).clamp(0, 1)
    assert 0.1 < images.std() and result.abs().max() > 0.5
    torch.testing.assert_close(pixels_seen, images, rtol=0, atol=1e-4)
    # The pipeline clips pixels, so also compare unclipped pixels after half of the steps.
    x = z
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(result, x, rtol=0, atol=1e-4)


def test_latents_equal_diffusers_pipeline(ldm: Path) -> None:
    teacher = load_teacher(str(ldm), final_alpha="teacher")
    assert teacher.space == LatentSpace(channels=3, downscale=4, scale=0.3)
    z = torch.randn((3, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    result = teacher.sample(z, [""] * 3, 8, 1.0, "ddim")
    pipe = tiny_teachers.diffusers_pipeline(ldm)
    assert type(pipe).__name__ == "LDMPipeline"
    handed: list[Any] = []
    pipe.vqvae.quantize.register_forward_pre_hook(lambda module, args: handed.append(args[0]))
    images = pipe(3, torch.Generator().manual_seed(0), num_inference_steps=8, output_type="np").images
    torch.testing.assert_close(result, handed[0] * 0.3, rtol=0, atol=1e-4)
    decoded = (decode(load_vae(str(ldm)), result) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(decoded, torch.from_numpy(images), rtol=0, atol=1e-4)


def test_vq_latents_are_scaled_in_encode_and_decode(ldm: Path) -> None:
    vae, images = load_vae(str(ldm)), noise(0, range(2), (3, 16, 16)).clamp(-1, 1)
    with torch.no_grad():
        raw = vae.encode(images).latents
        torch.testing.assert_close(encode(vae, images), raw * 0.3)
        torch.testing.assert_close(decode(vae, encode(vae, images)), vae.decode(raw).sample)


def test_pixels_need_no_autoencoder(pixels: Path) -> None:
    images = noise(0, range(2), (3, 8, 8))
    vae = load_vae(str(pixels))
    assert torch.equal(encode(vae, images), images) and torch.equal(decode(vae, images), images)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_a_row_does_not_depend_on_its_batch(ldm: Path, solver: Any) -> None:
    teacher = load_teacher(str(ldm))
    batch = teacher.sample(noise(0, range(3), (3, 4, 4)), [""] * 3, 4, 1.0, solver)
    for row in range(3):
        single = teacher.sample(noise(0, [row], (3, 4, 4)), [""], 4, 1.0, solver)
        assert (single[0] - batch[row]).abs().max() < 1e-5 * batch.abs().max()


def test_settings_without_effect_are_refused(ldm: Path) -> None:
    teacher = load_teacher(str(ldm))
    assert (teacher.conditioning, teacher.num_labels, teacher.label_names) == ("none", 0, None)
    assert len(teacher.encode([""])[[0, 0, 0]]) == 3
    with pytest.raises(UserError, match="prompt 'a cat': this teacher is unconditional"):
        teacher.encode(["", "a cat"])
    check_solver(teacher, "ddim", 50)
    with pytest.raises(SettingError, match=r"no unconditional branch; take guidance 1$"):
        check_solver(teacher, "ddim", 50, 8.0)


def test_a_stochastic_scheduler_is_refused_with_a_remedy(tmp_path: Path) -> None:
    """As in google/ddpm-cifar10-32; following the error message makes it work."""
    folder = Path(
        tiny_teachers.save_pixels(
            tmp_path / "ddpm", scheduler=DDPMScheduler, beta_end=0.006, clip_sample=True
        )
    )
    with pytest.raises(
        UserError, match=r"scheduler DDPMScheduler cannot make pairs: it draws fresh noise"
    ) as result:
        load_teacher(str(folder))
    says = "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"
    assert says in str(result.value) and "\n" not in str(result.value)
    import diffusers

    pipe = tiny_teachers.diffusers_pipeline(folder)
    exec(says, {"pipe": pipe, **vars(diffusers)} | {"DDIMScheduler": diffusers.DDIMScheduler})
    pipe.save_pretrained(folder)
    teacher = load_teacher(str(folder))
    assert describe_teacher(str(folder))["scheduler"] == "DDIMScheduler"
    assert teacher.sample(noise(0, [0], (3, 8, 8)), [""], 4, 1.0, "ddim").isfinite().all()


def test_components_may_be_at_the_root_of_the_repository(pixels: Path, tmp_path: Path) -> None:
    """google/ddpm-* keep the UNet and the scheduler at the root, and diffusers finds them there."""
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(pixels / "model_index.json", flat)
    for file in (*(pixels / "unet").iterdir(), *(pixels / "scheduler").iterdir()):
        shutil.copy(file, flat)
    z = noise(0, range(2), (3, 8, 8))
    result, same = (load_teacher(str(f)).sample(z, ["", ""], 4, 1.0, "ddim") for f in (flat, pixels))
    assert torch.equal(result, same)
    pipeline = tiny_teachers.diffusers_pipeline(flat)
    assert torch.equal(pipeline.unet.conv_in.weight, load_teacher(str(flat)).network.conv_in.weight)
