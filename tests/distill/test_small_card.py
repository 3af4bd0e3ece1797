"""The recipes for a GPU of 24 GB: their forecast, and both stages to the end at tiny size; bf16 storage."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.config import override
from d2g.core.distributed import checkpoint, sharded_checkpoint
from d2g.core.distributed.engine import store_frozen_in_bf16
from d2g.core.errors import SettingError
from d2g.core.seeds import noise
from distill.config.presets import SMALL_CARD_RECIPES
from distill.config.run import DistillConfig
from distill.export.export import export_lora, export_student
from distill.models.student import set_trainable, student_from_teacher
from distill.planning.memory import predict
from distill.planning.reference_models import configs_only
from distill.sampling import load_student
from distill.training.train import train
from jobs import make_pairs
from tiny_teachers import random_inputs

TINY = (
    "train.images=16",
    "train.batch_size=4",
    "engine.gradient_accumulation=2",
    "student.lora_rank=16",
    "optim.lr=1e-2",  # four steps move the student further than bf16 rounds it
    "train.loader_workers=0",
    "train.report_images=8",
    "train.checkpoint_images=8",
    "train.on_collapse=off",
)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_CARD_RECIPES)
def test_the_forecast_of_a_small_card_is_below_22_gib(name: str, tmp_path: Path) -> None:
    """The second stage needs more than the first: the same student, and a discriminator."""
    recipe = SMALL_CARD_RECIPES[name]
    config = replace(recipe["gan"], teacher=configs_only(recipe.model, tmp_path / name))
    memory = predict(config, 1)
    assert memory.total < 22
    assert recipe["ode"].engine == recipe["gan"].engine and recipe["ode"].student == recipe["gan"].student


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "save"), [("sd15-24gb", tiny.save_teacher), ("sdxl-24gb", tiny_teachers.save_sdxl)]
)
def test_a_recipe_of_a_small_card_runs_to_its_end_and_resumes_bit_for_bit(
    name: str, save: Callable[[Path], Any], tmp_path: Path
) -> None:
    save(tmp_path / "teacher")
    tiny.save_lpips(tmp_path / "lpips")
    pairs = make_pairs(tmp_path / "teacher", tmp_path)

    def stage_of(stage: str, init: str, *settings: str) -> DistillConfig:
        config = replace(SMALL_CARD_RECIPES[name][stage], teacher=str(tmp_path / "teacher"), pairs=str(pairs))
        return override(replace(config, init=init, lpips=str(tmp_path / "lpips")), (*TINY, *settings))

    train(stage_of("ode", ""), tmp_path / "ode")
    ode = str(tmp_path / "ode")
    train(stage_of("gan", ode), tmp_path / "once")
    for length in ("train.images=8", "train.images=16"):
        train(stage_of("gan", ode, length, "engine.offload_optimizer=true"), tmp_path / "twice")
    once, twice = (
        sharded_checkpoint.read(checkpoint.open_checkpoint(tmp_path / run / "checkpoints" / "000000016"))
        for run in ("once", "twice")
    )
    assert once.keys() == twice.keys() and all(torch.equal(once[key], twice[key]) for key in once)

    # Frozen weights are stored in bf16 and have no moments; large adapters have them in 8 bits.
    moments = {key for key in once if key.endswith(".exp_avg")}
    assert all(".lora_" in key for key in moments if key.startswith("optim.student."))
    assert {once[key].dtype for key in moments} <= {torch.uint8, torch.float32}
    assert any(once[key].dtype == torch.bfloat16 for key in once if key.startswith("discriminator.unet."))
    assert export_student(str(tmp_path / "once"), tmp_path / "out", "fp32")["parity_max_abs_err"] == 0.0

    # Both stages trained the same adapters, which are exported for the teacher's own pipeline.
    facts = export_lora(str(tmp_path / "once"), tmp_path / "lora")
    assert facts["base_weights"] == "bf16" and facts["parity_max_abs_err"] <= 1e-4
    assert "rank 16." in (tmp_path / "lora" / "README.md").read_text()
    one = load_student(str(tmp_path / "once"))
    z = noise(5, range(2), one.student.latent_shape)
    own = one.latents(z, one.examples)
    for file in ("pytorch_lora_weights.safetensors", "comfyui/lora.safetensors"):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "teacher", trust_remote_code=False)
        pipe.scheduler = LCMScheduler.from_pretrained(tmp_path / "lora" / "scheduler")
        before = draw(pipe, z, one.examples)
        unrounded = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
        store_frozen_in_bf16(pipe.unet.requires_grad_(False))
        torch.nn.Module.float(pipe.unet)
        rounding = (draw(pipe, z, one.examples) - before).abs().max()
        pipe.unet.load_state_dict(unrounded)
        pipe.load_lora_weights(str(tmp_path / "lora" / file))
        assert (draw(pipe, z, one.examples) - own).abs().max() < 4 * rounding
        assert (before - own).abs().max() > 20 * rounding


def draw(pipe: Any, z: Tensor, prompts: list[str]) -> Tensor:
    """Latents of one step of a pipeline of diffusers."""
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "latent"}
    latents: Tensor = pipe(prompts, latents=z, **settings).images
    return latents


def test_bf16_storage_of_frozen_weights_keeps_every_bit_of_a_bf16_step(teacher: Path) -> None:
    config = override(DistillConfig(), ["student.lora_rank=2"]).student
    plain, stored = (student_from_teacher(str(teacher), -1, config) for _ in range(2))
    for student in (plain, stored):
        set_trainable(student, config)
        for number, parameter in enumerate(student.parameters()):
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    store_frozen_in_bf16(stored)
    _, noise, cond = random_inputs("sd", 2)
    gradients = []
    for student in (plain, stored):
        with torch.autocast("cpu", torch.bfloat16):
            latents = student(noise, cond)
        latents.square().sum().backward()
        gradients.append([latents, *(p.grad for p in student.parameters() if p.requires_grad)])
    assert len(gradients[0]) > 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["engine.frozen_weights=bf16", "train.precision=fp32"],
            "frozen_weights is bf16, but train.precision",
        ),
        (
            ["engine.frozen_weights=bf16", "stage=gan", "gan.freeze_backbone=true"],
            "gan.penalty=single computes in fp32",
        ),
        (["engine.offload_optimizer=true", "optim.name=radam"], "but optim.name is radam"),
        (
            ["engine.offload_optimizer=true", "engine.parallel=fsdp"],
            "offload_optimizer is True but parallel is fsdp",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        override(DistillConfig(), settings)
