"""Export a student: a small safetensors folder, a diffusers pipeline, LoRA adapters, ComfyUI or ONNX."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.config import to_json
from d2g.core.errors import SettingError, UserError
from d2g.core.precision import exact_fp32
from d2g.core.seeds import noise
from d2g.core.staged_folder import staged
from d2g.diffusion.pipelines import family_of
from distill.config.export import ExportConfig
from distill.export.output import DTYPES as DTYPES
from distill.export.output import (
    check_out,
    check_parity,
    is_export,
    max_abs_diff,
    parse_dtype,
    save_tensors,
)
from distill.export.to_comfyui import CHECKPOINT, export_comfyui
from distill.export.to_diffusers import export_lora as export_lora
from distill.export.to_diffusers import export_pipeline as export_pipeline
from distill.export.to_onnx import export_onnx
from distill.sampling import OneStepSampler, load_checkpoint, load_student
from distill.student_files import (
    GUIDANCE_WEIGHT,
    condition_teacher,
    guiding_clip,
    kind_settings,
    pairs_guidance,
    pairs_size,
    recorded_teacher_sha256,
    student_folder,
    student_guidance,
    student_tensors,
)

WRITERS = {"diffusers": export_pipeline, "lora": export_lora, "comfyui": export_comfyui}
"""Formats whose weights may be stored in half precision, with a model card."""


MAIN_FILES = {
    "safetensors": "student.json",
    "diffusers": "model_index.json",
    "lora": "pytorch_lora_weights.safetensors",
    "comfyui": CHECKPOINT,
    "onnx": "student.onnx",
}
"""A file of each format that no other one writes."""


def export(config: ExportConfig, out: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Export a student in the configured format. Returns `out` and `parity_max_abs_err`.

    `parity_max_abs_err` is the largest difference between the exported and the training code's student; see
    the function of each format. Raises UserError if `out` holds a run, the student, the teacher or an export
    in another format, and if the parity is not finite, or above `PARITY_BOUND` in fp32. `out` is left
    unchanged on every error.
    """
    if not config.student:
        raise SettingError("student is not set; give --student")
    _expect_no_other_format(config, out)
    if config.format != "safetensors" and not kind_settings(config.student).is_diffusion:
        kind = kind_settings(config.student).kind
        raise UserError(
            f"student {config.student} is a generator of kind {kind}, for which there is no class in "
            f"diffusers, so that format={config.format} cannot hold it; use --format safetensors"
        )
    with exact_fp32(torch.device(device)):  # the rounding of TF32 would dominate the parity
        if config.format == "safetensors":
            return export_student(config.student, out, config.dtype or "fp16", config.teacher, device)
        if config.format == "onnx":
            if config.dtype not in (None, "fp32"):
                raise SettingError(f"dtype is {config.dtype!r}; the format onnx is written in fp32")
            return export_onnx(config.student, out, config.teacher, config.card)
        export_weights = WRITERS[config.format]
        return export_weights(
            config.student, out, config.dtype or "fp32", config.teacher, config.card, device
        )


def _expect_no_other_format(config: ExportConfig, out: Path) -> None:
    """Raise UserError if `out` holds an export in another format: the weights of two students could mix."""
    for name, file in MAIN_FILES.items():
        if name == config.format or not (out / file).is_file():
            continue
        # Other pipelines are refused by the format's own checks.
        if name != "diffusers" or is_export(out):
            raise UserError(
                f"--out {out} holds an export in the format {name} ({file}), and --format is "
                f"{config.format}; choose another --out, or remove the folder first"
            )


def export_student(
    run: str,
    out: Path,
    dtype: str = "fp16",
    teacher: str | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Write the EMA weights of a student, adapters merged, to OUT/ema.safetensors and OUT/student.json.

    `teacher`: the name to record, if not the one that the run names. Returns `out` and `parity_max_abs_err`:
    the largest difference between the latents of the run's student and of the exported one, on two noises.
    """
    saved_dtype = parse_dtype(dtype)
    weights, source, timestep = student_folder(run)
    check_out(out, run, teacher or source)
    tensors = student_tensors(run, weights)
    cast = {k: v.to(saved_dtype) if v.is_floating_point() else v for k, v in tensors.items()}

    # student.json: what loading needs, and what the model card tells about the training.
    facts: dict[str, Any] = {"teacher": source, "student_timestep": timestep}
    if (kind := kind_settings(run)).kind != "diffusion":
        facts["student"] = to_json(kind)
    base = teacher or source
    guided = GUIDANCE_WEIGHT in tensors or family_of(base).embedded_guidance is not None
    scale = student_guidance(run, base) if guided else pairs_guidance(run, base)
    if scale is not None:
        facts["guidance"] = scale
    if teacher_sha256 := recorded_teacher_sha256(run):
        facts["teacher_sha256"] = teacher_sha256
    if clip := guiding_clip(run):
        facts["clip_guidance_sha256"] = clip
    if size := pairs_size(run):
        facts["latent_size"] = list(size)
    if before_sha256 := condition_teacher(run):
        facts["condition_teacher"] = before_sha256

    # Write both files.
    with staged(out, "exports to") as folder:
        write_atomically(folder / "student.json", json.dumps(facts, indent=1))
        save_tensors(cast, folder / "ema.safetensors", {k: str(v) for k, v in facts.items()})
        # Compare the latents of the run's student with those of the written one.
        original = _example_latents(load_checkpoint(run, weights, base, device))
        exported = _example_latents(load_student(str(folder), teacher, device))
        parity = max_abs_diff((original, exported))
        check_parity(parity, saved_dtype)
        if teacher is not None:
            write_atomically(folder / "student.json", json.dumps({**facts, "teacher": teacher}, indent=1))
    return {"out": str(out), "parity_max_abs_err": parity}


def _example_latents(sampler: OneStepSampler) -> Tensor:
    """Latents of a student for its example prompts and two noises, on the CPU."""
    inputs = (noise(0, range(2), sampler.student.noise_shape), sampler.examples, sampler.example_prior)
    return sampler.latents(*inputs).cpu()
