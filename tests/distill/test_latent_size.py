"""Students of pairs with another latent size than that of the teacher's network draw at the pairs' size."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny_teachers
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion.teacher_sampler import SolverSettings
from distill.config.export import ExportConfig
from distill.export.export import export
from distill.export.one_step_pipeline import sample_own_noise
from distill.sampling import load_student
from distill.saved_samples import save_both_samples
from distill.training.train import train
from exported import readme_of
from jobs import distill_config
from pairgen.generate import generate_pairs
from tiny_teachers import diffusers_pipeline

SIDE = 6
"""Latent side of the pairs; the tiny networks have 4, or 8 in pixels."""
FAMILIES = ("sd", "sdxl", "sd3", "flux", "pixart", "dit")


def train_on_size(kind: str, folder: Path, side: int = SIDE, *settings: str) -> str:
    """A run of one step on pairs of this side."""
    teacher = tiny_teachers.save_kind(kind, folder / "teacher")
    config = tiny_teachers.pair_config(teacher, folder)
    generate_pairs(replace(config, latent_size=side, num_pairs=5), folder / "pairs")
    losses = ("regression.losses=mse", "train.images=4", *settings)
    train(distill_config(Path(teacher), folder / "pairs", *losses), folder / "run")
    return str(folder / "run")


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_on_size(request.param, tmp_path_factory.mktemp(request.param))


def test_samples_and_exports_have_the_size_of_the_pairs(run: str, tmp_path: Path) -> None:
    sampler = load_student(run)
    channels = sampler.student.latent_shape[0]
    assert sampler.student.latent_shape == sampler.student.noise_shape == (channels, SIDE, SIDE)
    pixels = SIDE * sampler.student.downscale
    assert sampler(sampler.examples).shape == (2, 3, pixels, pixels)
    export(ExportConfig(student=run, format="safetensors", dtype="fp32"), tmp_path / "student")
    exported = load_student(str(tmp_path / "student"))
    assert torch.equal(exported(exported.examples), sampler(sampler.examples))


def test_diffusers_draws_the_export_at_the_size_of_the_pairs(run: str, tmp_path: Path) -> None:
    """U-Nets by default, transformers with the settings in the README. DiT's pipeline takes no size."""
    sampler = load_student(run)
    if sampler.student.family.name == "dit":
        with pytest.raises(UserError, match=r"draws latents of 6x6, .* DiTPipeline draws 4x4 alone"):
            export(ExportConfig(student=run, format="diffusers"), tmp_path / "pipeline")
        return
    export(ExportConfig(student=run, format="diffusers"), tmp_path / "pipeline")
    pixels, readme = SIDE * sampler.student.downscale, readme_of(tmp_path / "pipeline")
    if sampler.student.family.network == "unet":
        settings = {}
    else:
        assert f"height={pixels}, width={pixels}" in readme
        settings = {"guidance_scale": 1, "height": pixels, "width": pixels}
        settings |= sampler.student.family.pipeline_settings((pixels, pixels))
    if sampler.student.guided:
        settings["guidance_scale"] = sampler.guidance
    z = noise(5, range(2), sampler.student.latent_shape)
    pipe = diffusers_pipeline(tmp_path / "pipeline")
    packed = sampler.student.family.pack(z)
    images = pipe(
        sampler.examples, num_inference_steps=1, latents=packed, output_type="pt", **settings
    ).images
    assert images.shape[-2:] == (pixels, pixels)
    expected = sampler.images(z, sampler.examples)
    torch.testing.assert_close(images.mul(255).round(), expected.float(), rtol=0, atol=1)
    drawn = pipe(sampler.examples, num_inference_steps=1, output_type="pt", **settings).images
    assert drawn.shape == images.shape


def test_a_student_of_pixels_has_the_size_of_its_pairs(tmp_path: Path) -> None:
    run = train_on_size("ldm", tmp_path)
    sampler = load_student(run)
    assert sampler([""]).shape == (1, 3, 24, 24)
    export(ExportConfig(student=run, format="diffusers"), tmp_path / "pipeline")
    assert sample_own_noise(tmp_path / "pipeline", None, 2).shape == (2, 3, 24, 24)


def test_the_teacher_beside_a_student_draws_at_its_size(tmp_path: Path) -> None:
    run = train_on_size("sd", tmp_path)
    settings = SolverSettings(steps=2)
    save_both_samples(run, str(tmp_path / "teacher"), ["a red cube"], tmp_path / "out", 0, 4, settings)
    files = [tmp_path / "out" / who / "00000.png" for who in ("student", "teacher")]
    assert [Image.open(BytesIO(file.read_bytes())).size for file in files] == [(24, 24)] * 2


def test_adapters_name_the_size(tmp_path: Path) -> None:
    run = train_on_size("sd", tmp_path, SIDE, "student.lora_rank=2")
    export(ExportConfig(student=run, format="lora"), tmp_path / "lora")
    assert "height=24, width=24" in readme_of(tmp_path / "lora")


def test_a_generator_of_another_size_is_refused(tmp_path: Path) -> None:
    teacher = tiny_teachers.save_kind("sd", tmp_path / "teacher")
    config = tiny_teachers.pair_config(teacher, tmp_path)
    generate_pairs(replace(config, latent_size=8), tmp_path / "pairs")
    settings = ("student.kind=stylegan-t", "regression.losses=[]", "gan.z_conditioning=false", "gan.mix_z=0")
    with pytest.raises(SettingError, match=r"makes latents of 4x4, .* but the pairs have latents of 8x8"):
        train(distill_config(Path(teacher), tmp_path / "pairs", *settings, stage="gan"), tmp_path / "run")
