"""A finished student for others: a small safetensors folder, a diffusers pipeline, LoRA adapters, ONNX."""

import json
from dataclasses import dataclass, field
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
from core.lora import adapters, has_lora
from core.one_step_pipeline import draw_plainly, draw_with_adapters, save_one_step, save_scheduler
from core.pipelines import open_pipeline
from core.seeds import noise
from distill.card import CardOptions, adapter_usage, card, pipeline_usage, read_result
from distill.export_onnx import PROMPTS, export_onnx
from distill.generator import told_guidance
from distill.sample import OneStep, load_one_step, student_config, student_folder, student_tensors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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


EXPORT_PRESETS = {"default": ExportConfig()}
"""Presets of `d2g export`."""


def export(config: ExportConfig, out: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Export a student as configured. Returns `out` and `parity_max_abs_err`; see the functions below."""
    if not config.student:
        raise SettingError("student is not set; give --student")
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
    tensors = student_tensors(run)
    cast = {k: v.to(chosen) if v.is_floating_point() else v for k, v in tensors.items()}
    facts = {"teacher": source, "student_timestep": timestep}
    write_atomically(out / "student.json", json.dumps(facts, indent=1))
    _save(cast, out / "ema.safetensors", {k: str(v) for k, v in facts.items()})
    before, after = load_one_step(run), load_one_step(str(out))
    drawn = noise(0, range(2), before.student.latent_shape)
    difference = (before.latents(drawn, PROMPTS) - after.latents(drawn, PROMPTS)).abs().max()
    if teacher is not None:
        write_atomically(out / "student.json", json.dumps({**facts, "teacher": teacher}, indent=1))
    return {"out": str(out), "parity_max_abs_err": float(difference)}


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
    one, source = _loaded(student, teacher, device)
    drawn = noise(0, range(2), one.student.latent_shape)
    latents = one.latents(drawn, PROMPTS)
    own = latents.cpu(), _images(one, latents)
    guided, schedule = one.student.guided, pretrained.load_schedule(source)
    if not guided:
        told_guidance(one.student.unet)
    save_one_step(source, one.student.unet, schedule, one.student.timestep, out, chosen)
    found = draw_plainly(out, drawn, PROMPTS, one.guidance if guided else None, device)
    parity = _apart(own, found)
    text = card(
        student=student,
        teacher=source,
        timestep=one.student.timestep,
        parity=parity,
        options=options,
        scores=scores,
        what="One-step student",
        use=pipeline_usage(open_pipeline(source).kind, guided, str(chosen).removeprefix("torch.")),
    )
    write_atomically(out / "README.md", text)
    return {"out": str(out), "parity_max_abs_err": parity}


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

    Raises UserError for a student without adapters, or with more than adapters.
    """
    chosen, options = _dtype(dtype), options or CardOptions()
    scores = [read_result(file) for file in options.scores]  # what is wrong with them shows before the work
    folder, _, _ = student_folder(student)
    tensors = checkpoint.Checkpoint(folder, 0, {}).tensors("ema")
    if not has_lora(tensors):
        raise UserError(f"student {student} has no adapters; export it with --format diffusers")
    one, source = _loaded(student, teacher, device)
    if one.student.guided:
        raise UserError(
            f"student {student} is told the guidance scale, which adapters alone cannot hold; "
            "export it with --format diffusers"
        )
    settings = student_config(student)
    # Scaled here, for diffusers takes alpha = rank where a file says nothing else.
    scale = settings.alpha / settings.lora_rank
    plain = {k: (v * scale if ".lora_B." in k else v).to(chosen) for k, v in adapters(tensors).items()}
    drawn = noise(0, range(2), one.student.latent_shape)
    latents = one.latents(drawn, PROMPTS)
    save_scheduler(pretrained.load_schedule(source), one.student.timestep, out / "scheduler")
    _save(plain, out / "pytorch_lora_weights.safetensors", {"format": "pt"})
    parity = _apart(
        (latents.cpu(), _images(one, latents)), draw_with_adapters(source, out, drawn, PROMPTS, device)
    )
    text = card(
        student=student,
        teacher=source,
        timestep=one.student.timestep,
        parity=parity,
        options=options,
        scores=scores,
        what="One-step LoRA",
        use=adapter_usage(open_pipeline(source).kind, settings.lora_rank),
    )
    write_atomically(out / "README.md", text)
    return {"out": str(out), "parity_max_abs_err": parity}


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise SettingError(f"dtype is {name!r}; expected {', '.join(DTYPES)}")
    return DTYPES[name]


def _loaded(student: str, teacher: str | None, device: torch.device | str) -> tuple[OneStep, str]:
    return load_one_step(student, teacher, device), teacher or student_folder(student)[1]


@torch.no_grad()
def _images(one: OneStep, latents: Tensor) -> Tensor:
    """As diffusers gives them with output_type="pt"."""
    return (decode(one.vae, latents) / 2 + 0.5).clamp(0, 1).cpu()


def _apart(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def _save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {file.parent}: {error}; free space or choose another --out, then run again"
        ) from error
