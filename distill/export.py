"""A finished student for others: a small safetensors folder, a diffusers pipeline, LoRA adapters, ONNX."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from core import checkpoint, pretrained
from core.checkpoint import write_atomically
from core.config import nearest
from core.errors import SettingError, UserError
from core.latents import decode
from core.lora import has_lora, whole_update
from core.one_step_pipeline import (
    draw_plainly,
    draw_untold,
    draw_with_adapters,
    pipeline_schedule,
    save_one_step,
    save_scheduler,
    written_kind,
)
from core.pipelines import open_pipeline
from core.schedule import Schedule
from core.seeds import noise
from distill.card import CardOptions, adapter_usage, card, pipeline_usage, read_result
from distill.export_onnx import export_onnx
from distill.export_out import apart, check_out, checked, exact_sums, staged
from distill.generator import told_guidance
from distill.sample import OneStep, load_one_step, student_config, student_folder, student_tensors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CARDS = ("diffusers", "lora", "onnx")
"""Formats with a model card."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """One `d2g export`: which student, in what form."""

    student: str = ""
    format: Literal["safetensors", "diffusers", "lora", "onnx"] = "safetensors"
    dtype: Literal["fp32", "fp16", "bf16"] | None = None  # None: fp16 of safetensors, fp32 of the others
    teacher: str | None = None  # instead of the one the student names
    card: CardOptions = field(default_factory=CardOptions)

    def __post_init__(self) -> None:
        known = get_args(ExportConfig.__annotations__["format"])
        if self.format not in known:
            raise SettingError(f"format is {self.format!r}{nearest(self.format, known)}")
        if self.dtype is not None:
            _dtype(self.dtype)
        told = [f.name for f in fields(CardOptions) if getattr(self.card, f.name) != f.default]
        if told and self.format not in CARDS:
            raise SettingError(
                f"the format {self.format} has no model card, and no use for {', '.join(told)}; leave it "
                f"out, or choose --format {', '.join(CARDS)}"
            )


EXPORT_PRESETS = {"default": ExportConfig()}
"""Presets of `d2g export`."""


def export(config: ExportConfig, out: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Export a student as configured. Returns `out` and `parity_max_abs_err`; see the functions below.

    Raises UserError where `out` holds a run or what is exported, and, leaving `out` as it was, for an export
    that does not draw the student's image: beyond `PARITY_BOUND` in fp32, or not finite in any type.
    """
    if not config.student:
        raise SettingError("student is not set; give --student")
    with exact_sums():
        if config.format == "safetensors":
            return export_student(config.student, out, config.dtype or "fp16", config.teacher)
        if config.format == "onnx":
            if config.dtype not in (None, "fp32"):
                raise SettingError(f"dtype is {config.dtype!r}; the format onnx is written in fp32")
            return export_onnx(config.student, out, config.teacher, config.card)
        make = {"diffusers": export_pipeline, "lora": export_lora}[config.format]
        return make(config.student, out, config.dtype or "fp32", config.teacher, config.card, device)


def export_student(run: str, out: Path, dtype: str = "fp16", teacher: str | None = None) -> dict[str, Any]:
    """Write the EMA student of a run to OUT/ema.safetensors and OUT/student.json, adapters merged.

    Returns `out` and `parity_max_abs_err`: the largest difference between the latents of the run's student
    and of the exported one on two noises. `teacher`: the name to record, if not the run's.
    """
    chosen = _dtype(dtype)
    _, source, timestep = student_folder(run)
    check_out(out, run, teacher or source)
    tensors = student_tensors(run)
    cast = {k: v.to(chosen) if v.is_floating_point() else v for k, v in tensors.items()}
    facts = {"teacher": source, "student_timestep": timestep}
    with staged(out) as folder:
        write_atomically(folder / "student.json", json.dumps(facts, indent=1))
        _save(cast, folder / "ema.safetensors", {k: str(v) for k, v in facts.items()})
        before, after = load_one_step(run), load_one_step(str(folder))
        drawn, told = noise(0, range(2), before.student.latent_shape), before.examples
        parity = checked(apart((before.latents(drawn, told), after.latents(drawn, told))), chosen)
        if teacher is not None:
            write_atomically(folder / "student.json", json.dumps({**facts, "teacher": teacher}, indent=1))
    return {"out": str(out), "parity_max_abs_err": parity}


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
    by the scheduler (`core.one_step_pipeline`). A student that is told the scale takes `guidance_scale`.
    `teacher`: where its other pieces come from, if not from where the student says.

    Returns `out` and `parity_max_abs_err`: the largest difference in latents and in images in [0, 1] between
    our own student and the folder, loaded by diffusers in fp32, on two noises.
    """
    chosen, options = _dtype(dtype), options or CardOptions()
    scores = [read_result(file) for file in options.scores]  # what is wrong with them shows before the work
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
                told_guidance(one.student.unet)
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
    runs' (`core.lora.whole_update`). Raises UserError for a student without adapters, or with more than such.
    """
    chosen, options = _dtype(dtype), options or CardOptions()
    scores = [read_result(file) for file in options.scores]  # what is wrong with them shows before the work
    folder, named, _ = student_folder(student)
    source = teacher or named
    if (kind := open_pipeline(source).kind) not in pretrained.TEXT_STUDENTS:
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
        _save(cast, written / "pytorch_lora_weights.safetensors", {"format": "pt"})
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


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise SettingError(f"dtype is {name!r}; expected {', '.join(DTYPES)}")
    return DTYPES[name]


@torch.no_grad()
def _images(one: OneStep, latents: Tensor) -> Tensor:
    """As diffusers gives them with output_type="pt"."""
    return (decode(one.vae, latents) / 2 + 0.5).clamp(0, 1).cpu()


def _save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {file.parent}: {error}; free space or choose another --out, then run again"
        ) from error
