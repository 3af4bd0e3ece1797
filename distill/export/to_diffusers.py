"""A student that plain diffusers draws: a pipeline in a folder, or LoRA adapters for the teacher's own."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed import checkpoint
from d2g.core.errors import UserError
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode
from d2g.diffusion.lora import has_lora, whole_update
from d2g.diffusion.pipelines import open_pipeline
from d2g.diffusion.schedule import Schedule
from distill.config.export import CardOptions
from distill.export.card_scores import own_results
from distill.export.model_card import adapter_usage, card, pipeline_usage
from distill.export.one_step_pipeline import (
    draw_plainly,
    draw_untold,
    draw_with_adapters,
    pipeline_schedule,
    save_one_step,
    save_scheduler,
    written_kind,
)
from distill.export.output import apart, check_out, checked, named_dtype, save_tensors, staged
from distill.models.student import add_guidance_embedding
from distill.sampling import OneStep, load_one_step, student_config, student_folder


def export_pipeline(
    student: str,
    out: Path,
    dtype: str = "fp32",
    teacher: str | None = None,
    options: CardOptions | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Write a student as a folder that plain diffusers loads and that draws in one step, with a README.md.

    Guidance is off in the network itself, whatever scale a caller gives; other numbers of steps are refused
    by the scheduler (`distill.export.one_step_pipeline`). A student that is told the scale takes `guidance_scale`.
    `teacher`: where its other pieces come from, if not from where the student says.

    Returns `out` and `parity_max_abs_err`: the largest difference in latents and in images in [0, 1] between
    our own student and the folder, loaded by diffusers in fp32, on two noises.
    """
    chosen, options = named_dtype(dtype), options or CardOptions()
    scores = own_results(student, options.scores)  # what is wrong with them shows before the work
    source = teacher or student_folder(student)[1]
    schedule = pipeline_schedule(source)  # refuses before the work
    check_out(out, student, source)
    one = load_one_step(student, source, device)
    guided, timestep = one.student.guided, one.student.timestep
    with staged(out) as folder:
        if one.student.reads_text:
            drawn = noise(0, range(2), one.student.latent_shape)
            latents = one.latents(drawn, one.examples)
            own = latents.cpu(), _images(one, latents)
            if not guided:
                add_guidance_embedding(one.student.unet)
            save_one_step(source, one.student.unet, schedule, timestep, folder, chosen)
            found = draw_plainly(folder, drawn, one.examples, one.guidance if guided else None, device)
            parity = apart(*zip(own, found, strict=True))
        else:
            parity = _untold(one, source, schedule, folder, chosen)
        text = card(
            student=student,
            teacher=source,
            where=one.student.where,
            parity=checked(parity, chosen),
            options=options,
            scores=scores,
            what="One-step student",
            use=pipeline_usage(written_kind(source), guided, str(chosen).removeprefix("torch.")),
            text=one.student.reads_text,
        )
        write_atomically(folder / "README.md", text)
    return {"out": str(out), "parity_max_abs_err": parity}


def _untold(one: OneStep, source: str, schedule: Schedule, out: Path, dtype: torch.dtype) -> float:
    """Write an unconditional student's pipeline; how far its images, drawn by diffusers, are from ours."""
    drawn = torch.randn(2, *one.student.latent_shape, generator=torch.Generator().manual_seed(0))
    own = _images(one, one.latents(drawn, one.examples))
    save_one_step(source, one.student.unet, schedule, one.student.timestep, out, dtype)
    return apart((draw_untold(out, len(drawn), one.device), own))


def export_lora(
    student: str,
    out: Path,
    dtype: str = "fp32",
    teacher: str | None = None,
    options: CardOptions | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Write a LoRA student's adapters to OUT/pytorch_lora_weights.safetensors, and OUT/scheduler, for the
    teacher's own pipeline: `pipe.load_lora_weights(OUT)`, guidance_scale=1.

    They are all that the student is beside the teacher: of a run that began from another's adapters, both
    runs' (`d2g.diffusion.lora.whole_update`). Raises UserError for a student without adapters, or with more than such.
    """
    chosen, options = named_dtype(dtype), options or CardOptions()
    scores = own_results(student, options.scores)  # what is wrong with them shows before the work
    folder, named, _ = student_folder(student)
    source = teacher or named
    pipeline = open_pipeline(source)
    kind = pipeline.kind
    if not pipeline.family.reads_text:
        raise UserError(
            f"teacher {source} is a {kind}, into which diffusers loads no adapters; export the student with "
            "--format safetensors, which merges them"
        )
    schedule = pipeline_schedule(source)
    check_out(out, student, source)
    tensors = checkpoint.Checkpoint(folder, 0, {}).tensors("ema")
    if not has_lora(tensors):
        raise UserError(f"student {student} has no adapters; export it with --format diffusers")
    one = load_one_step(student, source, device)
    if one.student.guided:
        raise UserError(
            f"student {student} is told the guidance scale, which adapters alone cannot hold; "
            "export it with --format diffusers"
        )
    plain = _adapters(student, source, tensors)
    drawn = noise(0, range(2), one.student.latent_shape)
    latents = one.latents(drawn, one.examples)
    own = latents.cpu(), _images(one, latents)
    with staged(out) as written:
        save_scheduler(schedule, one.student.timestep, written / "scheduler")
        cast = {k: v.to(chosen) for k, v in plain.items()}
        save_tensors(cast, written / "pytorch_lora_weights.safetensors", {"format": "pt"})
        found = draw_with_adapters(source, written, drawn, one.examples, device)
        parity = checked(apart(*zip(own, found, strict=True)), chosen)
        text = card(
            student=student,
            teacher=source,
            where=one.student.where,
            parity=parity,
            options=options,
            scores=scores,
            what="One-step LoRA",
            use=adapter_usage(kind, next(len(v) for k, v in plain.items() if ".lora_A." in k)),
        )
        write_atomically(written / "README.md", text)
    return {"out": str(out), "parity_max_abs_err": parity}


def _adapters(student: str, teacher: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What makes the run's student of the teacher's network, in fp32. Raises UserError where no adapters
    do."""
    settings = student_config(student)
    weights = {f"unet.{k}": v for k, v in pretrained.load_unet(teacher).state_dict().items()}
    found, unexplained = whole_update(tensors, weights, settings.lora_rank, settings.alpha)
    if unexplained:
        raise UserError(
            f"student {student} is more than adapters: {len(unexplained)} weights without any, first "
            f"{min(unexplained)}, are not those of {teacher}, so an earlier stage trained them, its export "
            "rounded them, or the teacher is another; export it with --format diffusers"
        )
    return found


@torch.no_grad()
def _images(one: OneStep, latents: Tensor) -> Tensor:
    """As diffusers gives them with output_type="pt"."""
    return (decode(one.vae, latents) / 2 + 0.5).clamp(0, 1).cpu()
