"""PixArt teachers, T5 with a learned variance, against diffusers' own pipelines."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.seeds import noise
from d2g.diffusion.teacher import describe_teacher, load_teacher

SHAPE, PROMPTS = (4, 4, 4), [*tiny.CAPTIONS[:2], " A Red CUBE "]
KINDS: dict[str, dict[str, Any]] = {
    "alpha": dict(sigma=False),
    "alpha with sizes": dict(sigma=False, sized=True),
    "sigma": dict(sigma=True),
}


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pixart") / "teacher"
    tiny_teachers.save_pixart(out, **KINDS[request.param], timestep_spacing="trailing")
    return out


def pipeline_latents(folder: Path, latents: Tensor, steps: int, **settings: Any) -> Tensor:
    height, width = (4 * side for side in latents.shape[-2:])
    images: Tensor = tiny_teachers.diffusers_pipeline(folder)(
        PROMPTS,
        latents=latents,
        num_inference_steps=steps,
        output_type="latent",
        clean_caption=False,
        use_resolution_binning=False,
        height=height,
        width=width,
        **settings,
    ).images
    return images


def test_pairs_equal_diffusers_pipeline(folder: Path) -> None:
    teacher = load_teacher(str(folder), final_alpha="teacher")
    for size in ((4, 4), (4, 6)):
        z = noise(0, range(3), (4, *size))
        for guidance in (3.0, 1.0):
            result = teacher.sample(z, PROMPTS, 8, guidance, "ddim")
            expected = pipeline_latents(folder, z, 8, guidance_scale=guidance)
            assert 0.5 < result.abs().max() < 50
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_a_row_does_not_depend_on_its_batch(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    batch = teacher.sample(noise(0, range(3), SHAPE), PROMPTS, 4, 3.0, "heun")
    for row in range(3):
        single = teacher.sample(noise(0, [row], SHAPE), PROMPTS[row : row + 1], 4, 3.0, "heun")
        assert (single[0] - batch[row]).abs().max() < 1e-5 * batch.abs().max()


def test_captions_are_lower_cased_as_in_diffusers(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    rows = teacher.encode(["A Red Cube ", "a red cube", "a red cub"]).tensors
    assert torch.equal(rows["hidden"][0], rows["hidden"][1]) and torch.equal(rows["mask"][0], rows["mask"][1])
    assert not torch.equal(rows["mask"][1], rows["mask"][2])


def test_description(folder: Path) -> None:
    result, teacher = describe_teacher(str(folder)), load_teacher(str(folder))
    alpha = result["pipeline"] == "PixArtAlphaPipeline"
    assert result["facts"]["t5_tokens"] == (120 if alpha else 300)
    assert teacher.encode(["a"]).tensors["hidden"].shape[1] == result["facts"]["t5_tokens"]
    sized = teacher.latent_shape[1] == 128
    assert result["facts"]["micro_conditions"] == ("height, width, height / width" if sized else None)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
def test_the_published_config(tmp_path: Path) -> None:
    """The transformer has its old class name; the first-order DPM-Solver with trailing spacing is DDIM."""
    folder = Path(
        tiny_teachers.save_pixart(
            tmp_path / "old",
            sigma=False,
            scheduler=DPMSolverMultistepScheduler,
            solver_order=1,
            timestep_spacing="trailing",
        )
    )
    tiny_teachers.edit(folder, "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    tiny_teachers.edit(folder, "transformer/config.json", _class_name="Transformer2DModel")
    z = noise(0, range(3), SHAPE)
    result = load_teacher(str(folder)).sample(z, PROMPTS, 8, 3.0, "ddim")
    torch.testing.assert_close(result, pipeline_latents(folder, z, 8, guidance_scale=3.0), rtol=0, atol=1e-4)
