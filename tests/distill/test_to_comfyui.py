"""distill.export.to_comfyui: diffusers' converters read every weight back; an Euler step is the student."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.errors import UserError
from d2g.core.seeds import generator, noise
from d2g.diffusion import pretrained
from distill.config.export import ExportConfig
from distill.config.student import StudentConfig
from distill.export.export import export, export_lora, export_pipeline
from distill.export.to_comfyui import CHECKPOINT, export_comfyui
from distill.sampling import load_student
from exported import PROMPT, readme_of, save_lora_run, save_run


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def state(teacher: str, component: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = pretrained.load_model(teacher, component).state_dict()
    return weights


def plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): value for name, value in weights.items()}


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_run(tmp_path_factory.mktemp("comfyui") / "run", str(teacher))


@pytest.fixture(scope="module")
def exported(run: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "comfyui"
    result = export(ExportConfig(student=run, format="comfyui"), out)
    assert result["parity_max_abs_err"] == 0
    return out


def test_diffusers_converts_every_weight_back(run: str, teacher: Path, exported: Path) -> None:
    weights, one = load_file(exported / CHECKPOINT), load_student(run)
    network = one.student.network
    assert_equal(convert_ldm_unet_checkpoint(dict(weights), network.config), network.state_dict())
    assert_equal(convert_ldm_vae_checkpoint(dict(weights), one.vae.config), state(str(teacher), "vae"))
    text = convert_ldm_clip_checkpoint(dict(weights))
    assert_equal(plain(text), plain(state(str(teacher), "text_encoder")))
    prefixes = {name.split(".")[0] for name in weights}
    assert prefixes == {"model", "first_stage_model", "cond_stage_model"}


def test_from_single_file_loads_the_networks(run: str, teacher: Path, exported: Path) -> None:
    file, one = str(exported / CHECKPOINT), load_student(run)
    for cls, component, expected in (
        (UNet2DConditionModel, "unet", one.student.network.state_dict()),
        (AutoencoderKL, "vae", state(str(teacher), "vae")),
    ):
        model = cls.from_single_file(file, config=str(teacher), subfolder=component, local_files_only=True)
        assert_equal(model.state_dict(), expected)


def test_sdxl_is_converted_back(tmp_path: Path) -> None:
    teacher = tiny_teachers.save_sdxl(tmp_path / "teacher")
    run = save_run(tmp_path / "run", teacher)
    assert export_comfyui(run, tmp_path / "out")["parity_max_abs_err"] == 0
    weights, one = load_file(tmp_path / "out" / CHECKPOINT), load_student(run)
    network = one.student.network
    assert_equal(convert_ldm_unet_checkpoint(dict(weights), network.config), network.state_dict())
    assert_equal(convert_ldm_vae_checkpoint(dict(weights), one.vae.config), state(teacher, "vae"))
    first = convert_ldm_clip_checkpoint(dict(weights))
    assert_equal(plain(first), plain(state(teacher, "text_encoder")))
    model = pretrained.load_model(teacher, "text_encoder_2")
    second = convert_open_clip_checkpoint(model, dict(weights), "conditioner.embedders.1.model.")
    assert_equal(plain(second), plain(model.state_dict()))


SD15_NAMES = {
    # A few names of v1-5-pruned.safetensors with the shapes of a network of SD 1.5's layout.
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "model.diffusion_model.input_blocks.3.0.op.weight",
    "model.diffusion_model.input_blocks.11.0.in_layers.2.weight",
    "model.diffusion_model.middle_block.1.proj_in.weight",
    "model.diffusion_model.middle_block.2.out_layers.3.bias",
    "model.diffusion_model.output_blocks.2.1.conv.weight",
    "model.diffusion_model.output_blocks.5.2.conv.weight",
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
    "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
    "model.diffusion_model.time_embed.2.bias",
    "model.diffusion_model.out.2.weight",
}


def test_names_of_stable_diffusion_1_5() -> None:
    """A U-Net of SD 1.5's blocks has the number of tensors and the names of the published file."""
    from distill.export.original_names import original_unet

    with torch.device("meta"):
        network = UNet2DConditionModel(cross_attention_dim=768, block_out_channels=(32, 64, 128, 128))
    names = original_unet(network.state_dict(), 2)
    assert len(names) == 686 and set(names) >= SD15_NAMES


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' sampler
def test_one_euler_step_is_the_student(run: str, teacher: Path, exported: Path) -> None:
    """ComfyUI's KSampler at its largest sigma: noise * sqrt(1 + sigma^2), scaled back for the network."""
    workflow = json.loads((exported / "workflow.json").read_text())
    (sampler,) = [n["inputs"] for n in workflow.values() if n["class_type"] == "KSampler"]
    assert (sampler["steps"], sampler["cfg"], sampler["sampler_name"]) == (1, 1.0, "euler")
    (sampling,) = [n["inputs"] for n in workflow.values() if n["class_type"] == "ModelSamplingDiscrete"]
    assert sampling["sampling"] == "eps"
    for node in workflow.values():
        links = [value[0] for value in node["inputs"].values() if isinstance(value, list)]
        assert set(links) <= set(workflow), "every link ends at a node"

    # The step by diffusers' Euler sampler, with the network that diffusers reads from the file.
    unet = UNet2DConditionModel.from_single_file(
        str(exported / CHECKPOINT), config=str(teacher), subfolder="unet", local_files_only=True
    )
    euler = EulerDiscreteScheduler(**pretrained.SD_BETAS, timestep_spacing="trailing")
    euler.set_timesteps(1)
    one, z = load_student(run), noise(5, range(2), (4, 4, 4))
    x = z * (1 + euler.sigmas[0] ** 2) ** 0.5
    hidden = one.conditioner.encode(PROMPT).tensors["hidden"]
    with torch.no_grad():
        output = unet(euler.scale_model_input(x, euler.timesteps[0]), euler.timesteps[0], hidden).sample
    latents = euler.step(output, euler.timesteps[0], x).prev_sample
    torch.testing.assert_close(latents, one.latents(z, PROMPT), rtol=0, atol=1e-4)


def test_the_card_says_how_to_use_it(exported: Path) -> None:
    card = readme_of(exported)
    assert "`one-step.safetensors` into `models/checkpoints`" in card and "cfg 1, sampler euler" in card
    assert "does not know this model: block_out_channels" in card, "the tiny model has another size"
    assert {path.name for path in exported.iterdir()} == {CHECKPOINT, "workflow.json", "README.md"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student_timestep": 399}, "is at timestep 399, but ComfyUI's samplers start at 999"),
        ({"config": StudentConfig(guidance_conditioning=True)}, "has the guidance scale as an input"),
    ],
)
def test_students_that_ksampler_cannot_draw_are_refused(
    settings: dict[str, Any], message: str, teacher: Path, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "run", str(teacher), **settings)
    with pytest.raises(UserError, match=message):
        export_comfyui(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("unet/config.json", {"layers_per_block": [1, 1]}, r"layers_per_block=\[1, 1\]"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type=fourier"),
        ("unet/config.json", {"center_input_sample": True}, "center_input_sample=True"),
        (
            "unet/config.json",
            {"down_block_types": ["CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"]},
            "Resn",
        ),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "an AutoencoderTiny"),
    ],
)
def test_networks_that_original_checkpoints_cannot_hold_are_refused(
    file: str, values: dict[str, Any], message: str, run: str, teacher: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    tiny_teachers.edit(other, file, **values)
    with pytest.raises(
        UserError, match=f"has .*{message}.*, which an original checkpoint cannot hold; export"
    ):
        export_comfyui(run, tmp_path / "out", teacher=str(other))


def test_other_schedules_and_families_are_refused(tmp_path: Path) -> None:
    linear = tiny.save_teacher(tmp_path / "linear", beta_schedule="linear")
    with pytest.raises(UserError, match="has another noise schedule than Stable Diffusion's"):
        export_comfyui(save_run(tmp_path / "run", linear), tmp_path / "out")
    sd3 = tiny_teachers.save_sd3(tmp_path / "sd3")
    with pytest.raises(
        UserError, match=r"is a StableDiffusion3Pipeline; the format comfyui supports SD 1\.x and SDXL"
    ):
        export_comfyui(save_run(tmp_path / "run3", sd3), tmp_path / "out")


# Adapters.


def sample(pipe: Any, z: Tensor, **settings: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    latents: Tensor = pipe(PROMPT, num_inference_steps=1, latents=z, output_type="latent", **settings).images
    return latents


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_kohya_names_give_the_same_adapters(family: str, teacher: Path, tmp_path: Path) -> None:
    """diffusers converts the file with kohya's names to the tensors of its own file."""
    source = str(teacher) if family == "sd" else tiny_teachers.save_sdxl(tmp_path / "teacher")
    run = save_lora_run(tmp_path / "run", source, StudentConfig(lora_rank=2))
    export_lora(run, tmp_path / "out")
    cls = StableDiffusionPipeline if family == "sd" else StableDiffusionXLPipeline
    results = []
    for file in ("pytorch_lora_weights.safetensors", "comfyui/lora.safetensors"):
        pipe = cls.from_pretrained(source)
        pipe.load_lora_weights(str(tmp_path / "out" / file))
        adapters = get_peft_model_state_dict(pipe.unet, adapter_name="default_0")
        scales = {m.scaling["default_0"] for m in pipe.unet.modules() if hasattr(m, "scaling")}
        assert scales == {1.0}
        results.append(adapters)
    assert results[0] and len(results[0]) % 2 == 0
    assert_equal(results[1], results[0])
    assert "`comfyui/lora.safetensors` holds the same adapters" in readme_of(tmp_path / "out")


def test_a_style_lora_of_the_teacher_loads_onto_the_student(run: str, teacher: Path, tmp_path: Path) -> None:
    """As merging B A into the student's weights."""
    export_pipeline(run, tmp_path / "student")
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    rng = generator(6, 1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=rng))
    style = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "style", unet_lora_layers=style)

    z = noise(5, range(2), (4, 4, 4))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    before = sample(pipe, z)
    pipe.load_lora_weights(tmp_path / "style")
    one = load_student(run)
    with torch.no_grad():
        for name, module in one.student.network.named_modules():
            if f"{name}.lora_A.weight" in style:
                module.weight += style[f"{name}.lora_B.weight"] @ style[f"{name}.lora_A.weight"]
    styled = sample(pipe, z)
    torch.testing.assert_close(styled, one.latents(z, PROMPT), rtol=0, atol=1e-4)
    assert (styled - before).abs().max() > 0.1
