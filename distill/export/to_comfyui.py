"""Export a student of Stable Diffusion 1.x or SDXL to ComfyUI: one file with original names, and a workflow.

The workflow is one Euler step of KSampler. At its largest sigma, ComfyUI gives the sampler the noise times
sqrt(1 + sigma^2), so that the network reads the noise itself at its last timestep. The step to 0 returns
the data prediction: what the student computes.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.errors import UserError
from d2g.core.logs import logger
from d2g.core.seeds import noise
from d2g.core.staged_folder import staged
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode
from d2g.diffusion.pipelines import open_pipeline
from d2g.diffusion.schedule import Schedule
from distill.config.export import CardOptions
from distill.export.card_scores import own_results
from distill.export.model_card import ComfyUIUsage, model_card
from distill.export.original_names import original_clip, original_open_clip, original_unet, original_vae
from distill.export.output import check_out, check_parity, max_abs_diff, parse_dtype, save_tensors
from distill.sampling import OneStepSampler, load_student
from distill.student_files import student_folder

CHECKPOINT, WORKFLOW = "one-step.safetensors", "workflow.json"
SAMPLING = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
"""Prediction of the network -> name in ComfyUI's node ModelSamplingDiscrete."""

PUBLISHED_SIZES: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "scaling_factor": 0.18215,
    },
    "StableDiffusionXLPipeline": {
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "scaling_factor": 0.13025,
    },
}
"""What ComfyUI takes for granted of both models."""

ORIGINAL_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
ORIGINAL_SETTINGS: dict[str, Any] = {
    "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}
"""Settings of a UNet2DConditionModel for which original checkpoints have no other value."""


def export_comfyui(
    student: str,
    out: Path,
    dtype: str = "fp32",
    teacher: str | None = None,
    options: CardOptions | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Write OUT/one-step.safetensors, OUT/workflow.json in ComfyUI's API format, and a README.md.

    Returns `out` and `parity_max_abs_err`: the largest difference in latents and images, on two noises,
    between the student and itself with the weights of the file, which diffusers' own converter reads back.
    Raises UserError for a student that ComfyUI's samplers cannot draw. A model of another size than SD 1.x or
    SDXL is written with a warning, because ComfyUI recognizes models by their size.
    """
    saved_dtype, options = parse_dtype(dtype), options or CardOptions()
    # Check all inputs before the expensive part.
    scores = own_results(student, options.scores)
    source = teacher or student_folder(student)[1]
    kind = open_pipeline(source).kind
    schedule = _comfyui_schedule(source, kind)
    check_out(out, student, source, ("README.md",))
    sampler = load_student(student, source, device)
    _require_plain_student(sampler, student, schedule)

    # Write the file, read it back into the student, and draw with both.
    latents_noise = noise(0, range(2), sampler.student.latent_shape)
    expected = _draw(sampler, latents_noise)
    with staged(out, "exports to") as folder:
        weights = {name: value.to(saved_dtype) for name, value in _weights(sampler, source, kind).items()}
        save_tensors(weights, folder / CHECKPOINT, {"format": "pt"})
        _load_back(sampler, folder / CHECKPOINT)
        parity = max_abs_diff(*zip(expected, _draw(sampler, latents_noise), strict=True))
        height, width = (8 * size for size in sampler.student.latent_shape[1:])
        workflow = one_step_workflow(SAMPLING[schedule.prediction], height, width)
        write_atomically(folder / WORKFLOW, json.dumps(workflow, indent=1) + "\n")
        text = model_card(
            student=student,
            teacher=source,
            timestep=sampler.student.evaluation_point,
            parity=check_parity(parity, saved_dtype),
            options=options,
            scores=scores,
            usage=ComfyUIUsage(
                checkpoint=CHECKPOINT, workflow=WORKFLOW, unlike=_unlike_published(sampler, kind)
            ),
        )
        write_atomically(folder / "README.md", text)
    return {"out": str(out), "parity_max_abs_err": parity}


def one_step_workflow(sampling: str, height: int, width: int, prompt: str = "a red cube") -> dict[str, Any]:
    """A workflow for ComfyUI's API that draws one image of `height` x `width` pixels in one step.

    Node 2 sets what the network predicts; cfg 1 evaluates it once.
    """
    text = {"clip": ["1", 1]}
    sampler = {
        **{"seed": 0, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
        **{"model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0]},
    }
    nodes: list[tuple[str, dict[str, Any]]] = [
        ("CheckpointLoaderSimple", {"ckpt_name": CHECKPOINT}),
        ("ModelSamplingDiscrete", {"model": ["1", 0], "sampling": sampling, "zsnr": False}),
        ("CLIPTextEncode", {**text, "text": prompt}),
        ("CLIPTextEncode", {**text, "text": ""}),
        ("EmptyLatentImage", {"width": width, "height": height, "batch_size": 1}),
        ("KSampler", sampler),
        ("VAEDecode", {"samples": ["6", 0], "vae": ["1", 2]}),
        ("SaveImage", {"images": ["7", 0], "filename_prefix": "one-step"}),
    ]
    return {
        str(number): {"class_type": name, "inputs": inputs} for number, (name, inputs) in enumerate(nodes, 1)
    }


def _comfyui_schedule(teacher: str, kind: str) -> Schedule:
    """The teacher's schedule. Raises UserError unless it is one that ComfyUI gives SD 1.x and SDXL."""
    from diffusers import DDIMScheduler

    instead = "export the student with --format diffusers or safetensors"
    config = pretrained.load_on_meta(teacher, "unet").config if kind in PUBLISHED_SIZES else None
    if config is None or (kind == "StableDiffusionPipeline" and config.use_linear_projection):
        name = "Stable Diffusion 2" if config is not None else kind
        raise UserError(
            f"teacher {teacher} is a {name}; the format comfyui supports SD 1.x and SDXL; {instead}"
        )
    _require_original_layout(teacher, config, instead)
    schedule = pretrained.load_schedule(teacher)
    expected = DDIMScheduler(**pretrained.SD_BETAS).alphas_cumprod.double()
    # ComfyUI computes its own table of noise levels.
    if (
        not isinstance(schedule, Schedule)
        or schedule.alphas_cumprod.shape != expected.shape
        or not torch.allclose(schedule.alphas_cumprod.double(), expected, rtol=1e-4)
    ):
        raise UserError(f"teacher {teacher} has another noise schedule than Stable Diffusion's; {instead}")
    return schedule


def _require_original_layout(teacher: str, config: Any, instead: str) -> None:
    """Raise UserError for a U-Net or an autoencoder that original checkpoints have no names for."""
    other = [f"{name}={config[name]}" for name, value in ORIGINAL_SETTINGS.items() if config[name] != value]
    other += sorted({*config.down_block_types, *config.up_block_types} - ORIGINAL_BLOCKS)
    if not isinstance(config.layers_per_block, int):
        other.append(f"layers_per_block={list(config.layers_per_block)}")
    if (vae := open_pipeline(teacher).class_name("vae")) != "AutoencoderKL":
        other.append(f"an {vae}")
    if other:
        raise UserError(
            f"teacher {teacher} has {', '.join(other)}, which an original checkpoint cannot hold; {instead}"
        )


def _require_plain_student(sampler: OneStepSampler, student: str, schedule: Schedule) -> None:
    """Raise UserError for a student that KSampler does not evaluate as training did."""
    if sampler.student.guided:
        raise UserError(
            f"student {student} has the guidance scale as an input, which original checkpoints have no name "
            "for; export it with --format diffusers"
        )
    if sampler.student.timestep != len(schedule) - 1:
        raise UserError(
            f"student {student} is at timestep {sampler.student.timestep}, but ComfyUI's samplers start at "
            f"{len(schedule) - 1}; export it with --format diffusers"
        )


def _weights(sampler: OneStepSampler, teacher: str, kind: str) -> dict[str, Tensor]:
    """All weights of the one-file checkpoint, under original names."""
    network = sampler.student.network
    weights = original_unet(network.state_dict(), network.config.layers_per_block)
    weights |= original_vae(pretrained.load_model(teacher, "vae").state_dict())
    encoders: Any = sampler.conditioner.models
    text = encoders["text_encoder"].state_dict()
    if kind == "StableDiffusionPipeline":
        return weights | original_clip(text, "cond_stage_model.")
    second = encoders["text_encoder_2"].state_dict()
    weights |= original_clip(text, "conditioner.embedders.0.")
    return weights | original_open_clip(second, "conditioner.embedders.1.model.")


def _load_back(sampler: OneStepSampler, file: Path) -> None:
    """Load the U-Net and the VAE of a one-file checkpoint by diffusers' converter into a student."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    weights = load_file(file)
    network = sampler.student.network
    network.load_state_dict(convert_ldm_unet_checkpoint(dict(weights), network.config))
    sampler.vae.load_state_dict(convert_ldm_vae_checkpoint(dict(weights), sampler.vae.config))


@torch.no_grad()
def _draw(sampler: OneStepSampler, latents_noise: Tensor) -> tuple[Tensor, Tensor]:
    """Latents, and images in [0, 1], on the CPU."""
    latents = sampler.latents(latents_noise, sampler.examples)
    return latents.cpu(), (decode(sampler.vae, latents) / 2 + 0.5).clamp(0, 1).cpu()


def _unlike_published(sampler: OneStepSampler, kind: str) -> list[str]:
    """Settings in which the model differs from the published one, which ComfyUI would not recognize."""
    actual = {**sampler.student.network.config, "scaling_factor": sampler.vae.config.scaling_factor}
    unlike = [
        f"{name} {actual[name]} instead of {value}"
        for name, value in PUBLISHED_SIZES[kind].items()
        if (list(actual[name]) if isinstance(value, list) else actual[name]) != value
    ]
    if unlike:
        logger.warning("ComfyUI does not know models of this size: %s", "; ".join(unlike))
    return unlike
