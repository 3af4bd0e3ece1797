"""Class-conditional teachers: DiT against diffusers' DiTPipeline, UNet2DModel against a plain loop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import tiny_teachers
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion.latents import LatentSpace, decode
from d2g.diffusion.pretrained import load_vae
from d2g.diffusion.solvers import guided
from d2g.diffusion.teacher import Teacher, check_solver, describe_teacher, load_teacher

LABELS = ["7", "0", "999"]


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dit") / "teacher"
    tiny_teachers.save_dit(out, timestep_spacing="trailing")
    return out


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pixels") / "teacher"
    tiny_teachers.save_pixels(out, classes=10)
    return out


def pipeline_noise(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """The noise that a pipeline without `latents=` samples."""
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pairs_equal_dit_pipeline(dit: Path, guidance: float) -> None:
    teacher = load_teacher(str(dit), final_alpha="teacher")
    z = pipeline_noise(torch.Generator().manual_seed(0), (3, 4, 4, 4))
    result = teacher.sample(z, LABELS, 8, guidance, "ddim")
    pipe = tiny_teachers.diffusers_pipeline(dit)
    assert type(pipe).__name__ == "DiTPipeline"
    decoder_input = tiny_teachers.DecoderInput(pipe.vae)
    images = pipe(
        [int(label) for label in LABELS],
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=8,
        output_type="pt",
    ).images
    assert result.abs().max() > 0.5
    torch.testing.assert_close(result, decoder_input.latents, rtol=0, atol=1e-4)
    decoded = (decode(load_vae(str(dit)), result) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, images, rtol=0, atol=1e-4)


def test_dit_null_label_is_its_number_of_classes(tmp_path: Path) -> None:
    """diffusers' pipeline always uses 1000; the model's embedding table has num_embeds_ada_norm classes."""
    teacher = load_teacher(tiny_teachers.save_dit(tmp_path, classes=7), final_alpha="teacher")
    z, cond = noise(0, range(2), (4, 4, 4)), teacher.encode(["6", "2"])
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    scheduler.set_timesteps(4)
    x = z
    for t in scheduler.timesteps:
        with torch.no_grad():
            labels = torch.tensor([7, 7, 6, 2])
            output = teacher.network(torch.cat([x, x]), t.expand(4), class_labels=labels).sample[:, :4]
        x = scheduler.step(guided(*output.chunk(2)[::-1], 3.0), t, x).prev_sample
    assert cond.null["class_labels"].tolist() == [7] and teacher.num_labels == 7
    torch.testing.assert_close(teacher.sample(z, ["6", "2"], 4, 3.0, "ddim"), x, rtol=0, atol=1e-4)


def test_the_published_dit_config(dit: Path, tmp_path: Path) -> None:
    """Its transformer was saved under an older class name."""
    old = Path(tiny_teachers.save_dit(tmp_path / "old", timestep_spacing="trailing"))
    tiny_teachers.edit(old, "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    tiny_teachers.edit(old, "transformer/config.json", _class_name="Transformer2DModel")
    z = noise(0, range(3), (4, 4, 4))
    result, same = (load_teacher(str(f)).sample(z, LABELS, 4, 3.0, "ddim") for f in (old, dit))
    assert torch.equal(result, same)


def loop(teacher: Teacher, folder: Path, z: Tensor, steps: int, labels: Tensor | None) -> Iterator[Tensor]:
    """diffusers' scheduler in a plain loop, for settings that its pipelines do not take."""
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    x = z
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = teacher.network(x, t, class_labels=labels).sample
        x = scheduler.step(output, t, x).prev_sample
    yield x


def test_a_class_conditional_unet_equals_diffusers_loop(pixels: Path) -> None:
    teacher, z = load_teacher(str(pixels), final_alpha="teacher"), noise(0, range(3), (3, 8, 8))
    result = teacher.sample(z, ["1", "9", "1"], 8, 1.0, "ddim")
    (expected,) = loop(teacher, pixels, z, 8, torch.tensor([1, 9, 1]))
    assert result.abs().max() > 0.5
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    (other,) = loop(teacher, pixels, z, 8, torch.tensor([2, 9, 1]))
    assert (other[0] - expected[0]).abs().max() > 1e-2 and torch.equal(other[1:], expected[1:])
    assert teacher.space == LatentSpace(channels=3, downscale=1, scale=1.0)
    assert torch.equal(decode(load_vae(str(pixels)), result), result)


def test_guidance_needs_a_null_class(pixels: Path, tmp_path: Path) -> None:
    teacher = load_teacher(str(pixels))
    check_solver(teacher, "heun", 18, 1.0)
    with pytest.raises(
        SettingError, match=r"no unconditional branch; take guidance 1, or name its null_class"
    ):
        check_solver(teacher, "heun", 18, 3.0)
    with_names = Path(tiny_teachers.save_pixels(tmp_path / "named", classes=10))
    tiny_teachers.edit(with_names, "model_index.json", null_class=9)
    guided_teacher = load_teacher(str(with_names))
    check_solver(guided_teacher, "heun", 18, 3.0)
    assert (guided_teacher.num_labels, guided_teacher.facts["null_label"]) == (9, 9)
    assert (teacher.num_labels, teacher.facts["null_label"]) == (10, None)
    z = noise(0, range(2), (3, 8, 8))
    one, null = (guided_teacher.encode([label]) for label in ("1", "2"))
    result = guided_teacher.sample(z, ["1", "1"], 1, 3.0, "ddim")
    cond, empty = (
        teacher.sample(z, [label] * 2, 1, 1.0, "ddim") for label in ("1", "9")
    )  # one step is linear in the network's output, and so is guidance
    torch.testing.assert_close(result, guided(cond, empty, 3.0), rtol=0, atol=1e-4)
    assert one.null["class_labels"].tolist() == null.null["class_labels"].tolist() == [9]
    tiny_teachers.edit(with_names, "model_index.json", null_class=10)
    with pytest.raises(UserError, match=r"null_class=10, but the UNet has 10 classes; expected the last"):
        load_teacher(str(with_names))


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_a_row_does_not_depend_on_its_batch(dit: Path, solver: Any) -> None:
    teacher = load_teacher(str(dit))
    batch = teacher.sample(noise(0, range(3), (4, 4, 4)), LABELS, 4, 3.0, solver)
    for row in range(3):
        single = teacher.sample(noise(0, [row], (4, 4, 4)), LABELS[row : row + 1], 4, 3.0, solver)
        assert (single[0] - batch[row]).abs().max() < 1e-5 * batch.abs().max()


@pytest.mark.parametrize("prompt", ["1000", "-1", "cat", "", "1.0", "\u0661"])
def test_prompts_must_be_class_numbers(dit: Path, prompt: str) -> None:
    with pytest.raises(UserError, match="expected a class number, 0 to 999") as caught:
        load_teacher(str(dit)).encode(["1", prompt])
    assert repr(prompt) in str(caught.value)


def test_descriptions(dit: Path, pixels: Path) -> None:
    result, teacher = describe_teacher(str(dit)), load_teacher(str(dit))
    assert result["pipeline"] == "DiTPipeline" and result["facts"]["null_label"] == 1000
    assert result["conditioning"] == {"kind": "label", "guidance": True, "encoders": {}, "num_labels": 1000}
    assert teacher.label_names is not None and teacher.label_names[999] == "thing 999, thingy 999"
    result = describe_teacher(str(pixels))
    assert result["conditioning"] == {"kind": "label", "guidance": False, "encoders": {}, "num_labels": 10}
    assert set(result["params"]) == {"unet"} and load_teacher(str(pixels)).label_names is None
