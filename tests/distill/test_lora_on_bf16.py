"""LoRA students whose frozen weights are stored in bf16: the next stage, and the export of their adapters."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from safetensors.torch import load_file
from torch import Tensor

from d2g.core.distributed.checkpoint import save
from d2g.core.distributed.engine import store_frozen_in_bf16
from d2g.core.errors import UserError
from d2g.core.seeds import noise
from distill.config.run import DistillConfig, EngineConfig
from distill.config.student import StudentConfig
from distill.export.export import export_lora, export_pipeline
from distill.models.student import student_from_teacher
from distill.sampling import load_checkpoint, load_student
from distill.training.state import new_state
from exported import PROMPT, readme_of, save_lora_run

CONFIG = StudentConfig(lora_rank=2, lora_alpha=6.0)
BF16 = EngineConfig(frozen_weights="bf16")
Z = noise(5, range(2), (4, 4, 4))


@pytest.fixture(scope="module")
def first(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    run = save_lora_run(tmp_path_factory.mktemp("first") / "run", str(teacher), CONFIG, engine=BF16)
    stored = ema_of(run)
    assert {value.dtype for name, value in stored.items() if ".base_layer." in name} == {torch.bfloat16}
    return run


@pytest.fixture(scope="module")
def second(first: str, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("second") / "run"
    return save_lora_run(folder, str(teacher), CONFIG, first, seed=5, engine=BF16)


def ema_file(run: str) -> Path:
    return next(Path(run).glob("checkpoints/*/ema.safetensors"))


def ema_of(run: str) -> dict[str, Tensor]:
    return load_file(ema_file(run))


def draw_with_adapters(teacher: str | Path, adapters: Path, name: str, rounded: bool = False) -> Tensor:
    """Latents of one step of the teacher's pipeline with adapters, by diffusers alone.

    rounded: with the U-Net's linear and convolution weights rounded to bf16.
    """
    pipe = DiffusionPipeline.from_pretrained(teacher, trust_remote_code=False)
    if rounded:
        store_frozen_in_bf16(pipe.unet.requires_grad_(False))
        torch.nn.Module.float(pipe.unet)
    pipe.scheduler = LCMScheduler.from_pretrained(adapters, subfolder="scheduler")
    pipe.load_lora_weights(str(adapters / name))
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "latent"}
    latents: Tensor = pipe(PROMPT, latents=Z, **settings).images
    return latents


@pytest.mark.parametrize("stage", ["first", "second"])
def test_adapters_are_exported_for_the_teacher(
    stage: str, teacher: Path, request: pytest.FixtureRequest, tmp_path: Path, caplog: Any
) -> None:
    run = request.getfixturevalue(stage)
    with caplog.at_level(logging.INFO, "d2g"):
        result = export_lora(run, tmp_path / "out")
    assert result["base_weights"] == "bf16" and result["parity_max_abs_err"] <= 1e-4
    assert caplog.text.count("the student's base is the teacher in bf16") == 1
    own = load_student(run).latents(Z, PROMPT)
    # What rounding the weights of a network without adapters changes is the measure.
    network = student_from_teacher(str(teacher))
    cond = load_student(run).conditioner.encode(PROMPT)
    with torch.no_grad():
        plain = network(Z, cond)
        store_frozen_in_bf16(network.requires_grad_(False))
        network.float()
        rounding = (network(Z, cond) - plain).abs().max()
    assert (own - plain).abs().max() > 20 * rounding
    for name in ("pytorch_lora_weights.safetensors", "comfyui/lora.safetensors"):
        on_teacher = draw_with_adapters(teacher, tmp_path / "out", name)
        assert 0 < (on_teacher - own).abs().max() < 4 * rounding
        exact = draw_with_adapters(teacher, tmp_path / "out", name, rounded=True)
        torch.testing.assert_close(exact, own, rtol=0, atol=1e-4)
    readme = readme_of(tmp_path / "out")
    assert f"differ from the student's by up to {result['teacher_max_abs_err']:.2e}" in readme
    assert "rank 2." in readme and "on the rounded weights" in readme


def test_the_next_stage_trains_the_same_adapters_further(first: str, teacher: Path, caplog: Any) -> None:
    """Merged into bf16 weights, they would lose their last bits."""
    config = DistillConfig(teacher=str(teacher), student=CONFIG, init=first, engine=BF16)
    with caplog.at_level(logging.INFO, "d2g"):
        start = new_state(config, torch.device("cpu")).student.module.state_dict()
    assert f"the adapters of {first} are trained further" in caplog.text
    stored = ema_of(first)
    assert start.keys() == stored.keys()
    assert all(torch.equal(start[name], value) for name, value in stored.items())


def test_other_adapters_are_merged_and_the_export_is_refused(
    first: str, teacher: Path, tmp_path: Path, caplog: Any
) -> None:
    other = StudentConfig(lora_rank=3)
    with caplog.at_level(logging.WARNING, "d2g"):
        run = save_lora_run(tmp_path / "run", str(teacher), other, first, engine=BF16)
    assert "has other adapters than this run (rank or alpha)" in caplog.text
    with pytest.raises(UserError, match="other adapters were merged into rounded ones"):
        export_lora(run, tmp_path / "out")
    # Frozen weights in fp32 keep the sum, which the export takes apart.
    in_fp32 = save_lora_run(tmp_path / "fp32", str(teacher), other, first)
    result = export_lora(in_fp32, tmp_path / "out")
    assert result["base_weights"] == "bf16" and result["parity_max_abs_err"] <= 1e-4
    assert "rank 5." in readme_of(tmp_path / "out")


@pytest.mark.parametrize("layer", ["unet.conv_in.weight", "to_q.base_layer.weight", "norm1.bias"])
def test_a_frozen_weight_that_is_not_the_rounded_teachers_is_refused(
    layer: str, first: str, tmp_path: Path
) -> None:
    """By one unit in the last place."""
    changed = tmp_path / "changed"
    changed.mkdir()
    shutil.copy(Path(first) / "config.json", changed)
    tensors = ema_of(first)
    name = next(name for name in tensors if name.endswith(layer))
    value = tensors[name].clone()
    value.view(-1)[0] = torch.nextafter(value.view(-1)[0], torch.full_like(value.view(-1)[0], torch.inf))
    save(changed / "checkpoints", 4, {"ema": {**tensors, name: value}}, {}, {"steps": 1})
    plain = name.replace(".base_layer", "")
    with pytest.raises(
        UserError, match=rf"is more than adapters: 1 frozen weights, first {plain}, are neither"
    ):
        export_lora(str(changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merging_keeps_the_bits_of_the_adapters(first: str, tmp_path: Path) -> None:
    """A pipeline in fp32 holds the sum in fp32, and a checkpoint draws as its run."""
    stored, result = ema_of(first), export_pipeline(first, tmp_path / "out")
    assert result["parity_max_abs_err"] <= 1e-4
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    name = next(name for name in stored if name.endswith("to_q.base_layer.weight"))
    layer = name.removesuffix(".base_layer.weight")
    a, b = (stored[f"{layer}.lora_{factor}.default.weight"] for factor in "AB")
    merged = weights[layer.removeprefix("unet.") + ".weight"]
    assert torch.equal(merged, stored[name].float() + 3 * (b @ a))
    assert not torch.equal(merged, merged.bfloat16().float())


def test_a_checkpoint_of_adapters_draws(first: str, teacher: Path) -> None:
    one = load_checkpoint(first, ema_file(first).parent, str(teacher))
    assert torch.equal(one.latents(Z, PROMPT), load_student(first).latents(Z, PROMPT))
