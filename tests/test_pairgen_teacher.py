"""pairgen.teacher against diffusers' own pipeline, for every prediction type and way of spacing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from core.seeds import noise
from pairgen.teacher import Teacher, describe_teacher, load_teacher

SHAPE = (4, 4, 4)

# Steps that divide 1000, not linspace: elsewhere diffusers leaves its own grid (next = t - 1000 // steps).
CASES: dict[str, dict[str, Any]] = {
    "epsilon, as SD 1.5 is": dict(
        prediction_type="epsilon", timestep_spacing="leading", set_alpha_to_one=False
    ),
    "epsilon, trailing": dict(prediction_type="epsilon", timestep_spacing="trailing", set_alpha_to_one=True),
    "v, trailing": dict(prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True),
    "sample, leading": dict(prediction_type="sample", timestep_spacing="leading", set_alpha_to_one=True),
}


@pytest.fixture(scope="module", params=list(CASES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teachers") / "teacher"
    tiny.save_teacher(out, **CASES[request.param])
    return out


def pipeline_latents(
    folder: Path, latents: Tensor, prompts: list[str], steps: int, guidance: float
) -> Tensor:
    """The judge: diffusers' StableDiffusionPipeline on the same noise."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.init_noise_sigma == 1.0
    out = pipe(
        prompt=prompts,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
    )
    return out.images


def test_pairs_equal_diffusers_own_pipeline(folder: Path) -> None:
    teacher = load_teacher(str(folder), final_alpha="teacher")
    drawn, prompts = noise(0, range(3), SHAPE), tiny.CAPTIONS[:3]
    for guidance in (3.0, 1.0):
        found = teacher.sample(drawn, prompts, 8, guidance, "ddim")
        expected = pipeline_latents(folder, drawn, prompts, 8, guidance)
        assert found.abs().max() > 0.5
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def with_scheduler(teacher: Path, folder: Path, **settings: Any) -> Path:
    """A copy of the teacher whose scheduler_config.json says something else."""
    shutil.copytree(teacher, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def test_final_alpha_one_drops_the_last_steps_noise(teacher: Path, tmp_path: Path) -> None:
    """Overriding SD's set_alpha_to_one=False equals a pipeline whose scheduler says True."""
    sd = with_scheduler(teacher, tmp_path / "sd", set_alpha_to_one=False)
    one = with_scheduler(teacher, tmp_path / "one", set_alpha_to_one=True)
    drawn, prompts = noise(0, range(2), SHAPE), tiny.CAPTIONS[:2]
    expected = pipeline_latents(one, drawn, prompts, 4, 3.0)
    found = load_teacher(str(sd), final_alpha="one").sample(drawn, prompts, 4, 3.0, "ddim")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    kept = load_teacher(str(sd), final_alpha="teacher").sample(drawn, prompts, 4, 3.0, "ddim")
    assert (kept - expected).abs().max() > 1e-3


def test_spacing_overrides_the_schedulers(teacher: Path, tmp_path: Path) -> None:
    trailing = with_scheduler(teacher, tmp_path / "trailing", timestep_spacing="trailing")
    drawn = noise(0, range(2), SHAPE)
    found = load_teacher(str(teacher), spacing="trailing").sample(drawn, ["a", "b"], 4, 3.0, "ddim")
    assert torch.equal(found, load_teacher(str(trailing)).sample(drawn, ["a", "b"], 4, 3.0, "ddim"))
    assert not torch.equal(found, load_teacher(str(teacher)).sample(drawn, ["a", "b"], 4, 3.0, "ddim"))


@pytest.mark.parametrize("t", [0, 500, 999])
def test_epsilon_from_every_prediction(folder: Path, t: int) -> None:
    """alpha x0 + sigma eps = x and, for v, v = alpha eps - sigma x0: solved for eps from the raw output."""
    teacher = load_teacher(str(folder))
    x = noise(1, range(2), SHAPE)
    raw = teacher.unet(x, t, teacher.text.encode(tiny.CAPTIONS[:2])).sample
    alpha, sigma = teacher.schedule.alpha_sigma(t)
    x0 = {
        "epsilon": (x - sigma * raw) / alpha,
        "v_prediction": alpha * x - sigma * raw,
        "sample": raw,
    }[teacher.schedule.prediction]
    epsilon = teacher.denoiser(tiny.CAPTIONS[:2], 1.0)(x, t)
    torch.testing.assert_close(alpha * x0 + sigma * epsilon, x, rtol=0, atol=2e-5)


class Calls:
    """Sees every evaluation of a network from outside: batch sizes, and the text it was given."""

    def __init__(self, unet: nn.Module) -> None:
        self.rows: list[int] = []
        self.text: list[Tensor] = []
        unet.register_forward_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.rows.append(len(args[0]))
        self.text.append(args[2] if len(args) > 2 else kwargs["encoder_hidden_states"])


@pytest.fixture
def watched(teacher: Path) -> tuple[Teacher, Calls]:
    loaded = load_teacher(str(teacher))
    return loaded, Calls(loaded.unet)


def test_no_guidance_costs_one_evaluation_a_step(watched: tuple[Teacher, Calls]) -> None:
    teacher, calls = watched
    teacher.sample(noise(0, range(3), SHAPE), ["a", "b", "c"], 4, 1.0, "ddim")
    assert calls.rows == [3] * 4
    teacher.sample(noise(0, range(3), SHAPE), ["a", "b", "c"], 4, 2.0, "ddim")
    assert calls.rows[4:] == [6] * 4
    teacher.sample(noise(0, range(3), SHAPE), ["a", "b", "c"], 4, 1.0, "heun")
    assert calls.rows[8:] == [3] * 7


def test_the_unconditional_branch_is_the_encoded_empty_string(watched: tuple[Teacher, Calls]) -> None:
    teacher, calls = watched
    prompts = ["a red cube", "a blue sphere", "a red cube"]
    teacher.denoiser(prompts, 3.0)(noise(0, range(3), SHAPE), 500)
    empty, text = calls.text[0].chunk(2)
    torch.testing.assert_close(empty, teacher.text.encode([""]).expand_as(empty))
    torch.testing.assert_close(text, teacher.text.encode(prompts))
    assert (text[0] - text[1]).abs().max() > 1e-3


def test_bf16_networks_still_update_in_fp32(teacher: Path) -> None:
    full, half = load_teacher(str(teacher)), load_teacher(str(teacher), precision="bf16")
    assert next(half.unet.parameters()).dtype == torch.bfloat16
    drawn = noise(0, range(2), SHAPE)
    a, b = (t.sample(drawn, ["a", "b"], 4, 1.0, "ddim") for t in (full, half))
    assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.2 * a.abs().max()


def test_a_teacher_describes_itself(folder: Path, teacher: Path) -> None:
    found = describe_teacher(str(folder))
    assert found["pipeline"] == "StableDiffusionPipeline" and found["latent_shape"] == [4, 4, 4]
    assert found["latent_space"] == {"channels": 4, "downscale": 4, "scale": 0.7, "shift": 0.0}
    assert found["conditioning"] == {"text": "CLIPTextModel", "tokens": 12}
    assert found["params"]["unet"] == sum(p.numel() for p in load_teacher(str(folder)).unet.parameters())
    schedule = load_teacher(str(folder), final_alpha="teacher").schedule
    defaults = found["solver_defaults"]
    assert found["prediction_type"] == schedule.prediction
    assert (defaults["spacing"], defaults["final_alpha_one"]) == (schedule.spacing, schedule.final_alpha_one)
    assert defaults["train_steps"] == 1000 and len(found["sha256"]) == 64
