"""Export a student to diffusers: a pipeline folder, or LoRA adapters for the teacher's own pipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed.engine import store_frozen_in_bf16
from d2g.core.errors import UserError
from d2g.core.logs import logger
from d2g.core.seeds import noise
from d2g.core.staged_folder import staged
from d2g.diffusion import pretrained
from d2g.diffusion.families.base import Pipeline
from d2g.diffusion.latents import decode
from d2g.diffusion.lora import adapters_from_teacher, has_lora, unexplained_weights
from d2g.diffusion.pipelines import open_pipeline
from d2g.diffusion.schedule import FlowSchedule, Schedule
from distill.config.export import CardOptions
from distill.export.card_scores import own_results
from distill.export.model_card import AdapterUsage, PipelineUsage, model_card
from distill.export.one_step_pipeline import (
    pipeline_schedule,
    sample_own_noise,
    sample_pipeline,
    sample_with_adapters,
    save_one_step,
    save_scheduler,
    saved_pipeline_class,
)
from distill.export.original_names import kohya_adapters
from distill.export.output import (
    check_out,
    check_parity,
    max_abs_diff,
    parse_dtype,
    save_tensors,
)
from distill.models.student import Student, add_guidance_embedding
from distill.sampling import OneStepSampler, load_checkpoint, load_student
from distill.student_files import stored_tensors, student_config, student_folder

KOHYA_FILE = "comfyui/lora.safetensors"
"""Adapters under kohya's names. Beside the others, diffusers would not know which file to load."""


def export_pipeline(
    student: str,
    out: Path,
    dtype: str = "fp32",
    teacher: str | None = None,
    options: CardOptions | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Write a student as a pipeline folder that plain diffusers loads and runs in one step, with a README.md.

    The network itself disables guidance, whatever scale a caller passes, and the scheduler refuses other
    numbers of steps (`distill.export.one_step_pipeline`). A student with a guidance input uses the scale.
    `teacher`: source of the other components, if not the teacher that the student names.

    Returns `out` and `parity_max_abs_err`: the largest difference in latents and in images in [0, 1] between
    the training code's student and the folder as diffusers runs it in fp32, on two noises. Raises UserError
    for a student that no diffusers pipeline can draw.
    """
    saved_dtype, options = parse_dtype(dtype), options or CardOptions()
    # Check all inputs before the expensive part.
    scores = own_results(student, options.scores)
    source = teacher or student_folder(student)[1]
    schedule = pipeline_schedule(source)
    check_out(out, student, source, ("README.md", *open_pipeline(source).components))
    sampler = load_student(student, source, device)
    _set_default_size(sampler.student, source)
    guided, reads_text = sampler.student.guided, sampler.student.reads_text
    # Write the pipeline, draw with it, and write the card with the difference.
    settings = _call_settings(sampler)
    with staged(out, "exports to") as folder:
        if reads_text:
            parity = _write_text_pipeline(sampler, source, schedule, folder, saved_dtype, settings)
        else:
            parity = _write_noiseless_pipeline(sampler, source, schedule, folder, saved_dtype)
        text = model_card(
            student=student,
            teacher=source,
            timestep=sampler.student.evaluation_point,
            parity=check_parity(parity, saved_dtype),
            options=options,
            scores=scores,
            usage=PipelineUsage(
                pipeline=saved_pipeline_class(source),
                dtype=str(saved_dtype).removeprefix("torch."),
                guided=guided,
                reads_text=reads_text,
                reads_labels=sampler.conditioner.kind == "label",
                settings=settings,
                settings_needed=not sampler.student.family.takes_guidance and bool(settings),
            ),
        )
        write_atomically(folder / "README.md", text)
    return {"out": str(out), "parity_max_abs_err": parity}


def _call_settings(sampler: OneStepSampler) -> dict[str, Any]:
    """Arguments, besides one step, with which the pipeline computes what the student computes.

    Text-conditional U-Nets need none: they disable guidance themselves, or take the scale as an input.
    """
    student = sampler.student
    _, height, width = student.latent_shape
    pixels = (height * student.downscale, width * student.downscale)
    size = {} if _has_default_size(student) else {"height": pixels[0], "width": pixels[1]}
    if student.family.takes_guidance:
        return {"guidance_scale": sampler.guidance, **size} if student.guided else size
    if sampler.conditioner.kind == "none":
        return {}
    scale = sampler.guidance if student.guided else 1
    # Pipelines of class-conditional models take neither size nor text.
    return {"guidance_scale": scale, **size, **student.family.pipeline_settings(pixels)}


def _has_default_size(student: Student) -> bool:
    """Whether a pipeline of the student's network draws at the student's size where no other is set."""
    return student.latent_shape == student.family.latent_shape(student.conditioning_config)


def _set_default_size(student: Student, teacher: str) -> None:
    """Write the student's latent size into the config of a U-Net, whose pipelines take their default from it.

    Transformers compute positions from that entry, so that it stays. Raises UserError where the pipeline of
    one takes no size.
    """
    if _has_default_size(student):
        return
    _, height, width = student.latent_shape
    if student.family.network == "unet":
        size = height if height == width else [height, width]
        student.network.register_to_config(sample_size=size)
    elif not student.family.reads_text:
        _, *own = student.family.latent_shape(student.conditioning_config)
        raise UserError(
            f"the student draws latents of {height}x{width}, the size of its pairs, but the teacher's "
            f"{open_pipeline(teacher).kind} draws {own[0]}x{own[1]} alone; use --format safetensors"
        )


def _write_text_pipeline(
    sampler: OneStepSampler,
    source: str,
    schedule: Schedule | FlowSchedule,
    folder: Path,
    dtype: torch.dtype,
    settings: Mapping[str, Any],
) -> float:
    """Write the pipeline of a text-conditional student, and return its parity."""
    guided, timestep = sampler.student.guided, sampler.student.timestep
    latents_noise = noise(0, range(2), sampler.student.latent_shape)
    latents = sampler.latents(latents_noise, sampler.examples)
    expected = latents.cpu(), _decode_images(sampler, latents)
    # Without an input for the guidance scale, diffusers would apply classifier-free guidance.
    if sampler.student.family.takes_guidance and not guided:
        add_guidance_embedding(sampler.student.network)
    own_text = dict(sampler.conditioner.models) if sampler.own_text else {}
    save_one_step(source, sampler.student.network, schedule, timestep, folder, dtype, own_text)
    sampler.drop_weights()  # the exported ones need the room
    exported = sample_pipeline(folder, latents_noise, sampler.examples, settings, sampler.device)
    return max_abs_diff(*zip(expected, exported, strict=True))


def _write_noiseless_pipeline(
    sampler: OneStepSampler, source: str, schedule: Schedule | FlowSchedule, folder: Path, dtype: torch.dtype
) -> float:
    """Write the pipeline of a class-conditional or unconditional student, and return its parity on images."""
    # These pipelines sample their noise themselves, from this generator.
    latents_noise = torch.randn(2, *sampler.student.latent_shape, generator=torch.Generator().manual_seed(0))
    expected = _decode_images(sampler, sampler.latents(latents_noise, sampler.examples))
    save_one_step(source, sampler.student.network, schedule, sampler.student.timestep, folder, dtype)
    labels = [int(prompt) for prompt in sampler.examples] if sampler.conditioner.kind == "label" else None
    sampler.drop_weights()
    exported = sample_own_noise(folder, labels, len(latents_noise), sampler.device)
    return max_abs_diff((exported, expected))


def export_lora(
    student: str,
    out: Path,
    dtype: str = "fp32",
    teacher: str | None = None,
    options: CardOptions | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Write the adapters of a LoRA student to OUT/pytorch_lora_weights.safetensors, and OUT/scheduler.

    The teacher's own pipeline loads them with `pipe.load_lora_weights(OUT)` and runs without guidance.
    Adapters of a U-Net are also written to OUT/comfyui/lora.safetensors, under kohya's names. The adapters
    hold the whole difference between student and teacher: if adapters of an earlier run were merged, the sum
    of both (`d2g.diffusion.lora.adapters_from_teacher`). With engine.frozen_weights=bf16 it is the difference
    to the teacher rounded to bf16.

    Returns what `export_pipeline` returns, where the teacher is rounded as in training, and `base_weights`,
    "fp32" or "bf16". For bf16 it also returns `teacher_max_abs_err`, the difference with the teacher in fp32.
    Raises UserError for a student without adapters, with a guidance input, or whose other weights are not the
    teacher's, rounded or not.
    """
    saved_dtype, options = parse_dtype(dtype), options or CardOptions()
    # Check all inputs before the expensive part.
    scores = own_results(student, options.scores)
    source = teacher or student_folder(student)[1]
    pipeline = open_pipeline(source)
    _require_lora_loader(pipeline, source)
    schedule = pipeline_schedule(source)
    check_out(out, student, source, ("README.md", "scheduler", "comfyui"))
    sampler, adapters, rounded = _load_lora_student(student, source, device)

    # Draw with the training code, write, and draw again with diffusers.
    latents_noise = noise(0, range(2), sampler.student.latent_shape)
    latents = sampler.latents(latents_noise, sampler.examples)
    expected = latents.cpu(), _decode_images(sampler, latents)
    sampler.drop_weights()  # the pipeline with adapters needs the room
    with staged(out, "exports to") as folder:
        save_scheduler(schedule, sampler.student.timestep, folder / "scheduler")
        cast = {name: value.to(saved_dtype) for name, value in adapters.items()}
        save_tensors(cast, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})
        kohya_file = KOHYA_FILE if pipeline.family.network == "unet" else ""
        if kohya_file:
            save_tensors(kohya_adapters(cast), folder / kohya_file, {"format": "pt"})
        settings = {"guidance_scale": 1, **_call_settings(sampler)}
        inputs = (source, folder, latents_noise, sampler.examples, settings, device)
        exported = sample_with_adapters(*inputs, rounded=rounded)
        parity = check_parity(max_abs_diff(*zip(expected, exported, strict=True)), saved_dtype)
        results: dict[str, Any] = {"out": str(out), "parity_max_abs_err": parity, "base_weights": "fp32"}

        # The student's frozen weights are the teacher's in bf16: also compare with the teacher in fp32.
        if rounded:
            unrounded = sample_with_adapters(*inputs)
            difference = max_abs_diff(*zip(expected, unrounded, strict=True))
            results |= {"base_weights": "bf16", "teacher_max_abs_err": difference}
            logger.info(
                "the student's base is the teacher in bf16; on the teacher in fp32, latents or pixels of the "
                "adapters differ from the student's by up to %.2e",
                difference,
            )

        # The card reports the measured difference from the training code.
        rank = next(len(value) for name, value in adapters.items() if ".lora_A." in name)
        text = model_card(
            student=student,
            teacher=source,
            timestep=sampler.student.evaluation_point,
            parity=parity,
            options=options,
            scores=scores,
            usage=AdapterUsage(
                pipeline=pipeline.kind,
                rank=rank,
                scheduler=_scheduler_class(schedule),
                comfyui=kohya_file,
                settings=settings,
                guided=sampler.student.guided,
                unrounded_difference=results.get("teacher_max_abs_err"),
            ),
        )
        write_atomically(folder / "README.md", text)
    return results


def _require_lora_loader(pipeline: Pipeline, source: str) -> None:
    """Raise UserError for a pipeline into which diffusers loads no adapters."""
    if "lora" not in [export.name for export in pipeline.family.exports]:
        raise UserError(
            f"teacher {source} is a {pipeline.kind}, into which diffusers loads no adapters; export the "
            "student with --format safetensors, which merges them"
        )


def _scheduler_class(schedule: Schedule | FlowSchedule) -> str:
    return "FlowMatchEulerDiscreteScheduler" if isinstance(schedule, FlowSchedule) else "LCMScheduler"


def _load_lora_student(
    student: str, teacher: str, device: torch.device | str
) -> tuple[OneStepSampler, dict[str, Tensor], bool]:
    """Load a LoRA student: (sampler, adapters, whether the teacher is rounded), the last two of `_adapters`.

    Raises UserError for a student that adapters alone cannot represent.
    """
    weights, _, _ = student_folder(student)
    tensors = stored_tensors(student, weights)
    if not has_lora(tensors):
        raise UserError(f"student {student} has no adapters; export it with --format diffusers")
    sampler = load_checkpoint(student, weights, teacher, device)
    if sampler.own_text:
        raise UserError(
            f"student {student} has text encoders of its own, which adapters cannot hold; export it with "
            "--format diffusers"
        )
    if sampler.student.guided and sampler.student.family.embedded_guidance is None:
        raise UserError(
            f"student {student} has the guidance scale as an input, which adapters alone cannot hold; "
            "export it with --format diffusers"
        )
    return sampler, *_adapters(student, teacher, tensors)


def _adapters(student: str, teacher: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Return the adapters, fp32, that turn the teacher's network into the student, and whether it is rounded.

    The network is rounded to bf16 if training stored its frozen weights so (engine.frozen_weights=bf16).
    Raises UserError if adapters alone cannot turn one into the other.
    """
    settings = student_config(student)
    component = open_pipeline(teacher).family.network
    network = pretrained.load_model(teacher, component).requires_grad_(False)
    unexplained: list[str] = []
    for rounded in (False, True):
        if rounded:
            store_frozen_in_bf16(network)
        weights = {f"{component}.{name}": value for name, value in network.state_dict().items()}
        unexplained = unexplained_weights(tensors, weights)
        if not unexplained:
            return adapters_from_teacher(tensors, weights, settings.lora_rank, settings.alpha), rounded
    raise UserError(
        f"student {student} is more than adapters: {len(unexplained)} frozen weights, first "
        f"{min(unexplained)}, are neither those of {teacher} nor these rounded to bf16, so an earlier stage "
        "trained them, its export rounded them, other adapters were merged into rounded ones, or the teacher "
        "is another; export it with --format diffusers"
    )


@torch.no_grad()
def _decode_images(sampler: OneStepSampler, latents: Tensor) -> Tensor:
    """Images in [0, 1] on the CPU, as diffusers returns them with output_type="pt"."""
    return (decode(sampler.vae, latents) / 2 + 0.5).clamp(0, 1).cpu()
