"""A finished student for others: a small safetensors folder, a diffusers pipeline, LoRA adapters, ONNX."""

import json
from pathlib import Path
from typing import Any

import torch

from d2g.core.atomic_files import write_atomically
from d2g.core.errors import SettingError
from d2g.core.seeds import noise
from distill.config.export import ExportConfig
from distill.export.output import DTYPES as DTYPES
from distill.export.output import apart, check_out, checked, exact_sums, named_dtype, save_tensors, staged
from distill.export.to_diffusers import export_lora as export_lora
from distill.export.to_diffusers import export_pipeline as export_pipeline
from distill.export.to_onnx import export_onnx
from distill.sampling import load_one_step, student_folder, student_tensors


def export(config: ExportConfig, out: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Export a student as configured. Returns `out` and `parity_max_abs_err`; see each format's function.

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
    chosen = named_dtype(dtype)
    _, source, timestep = student_folder(run)
    check_out(out, run, teacher or source)
    tensors = student_tensors(run)
    cast = {k: v.to(chosen) if v.is_floating_point() else v for k, v in tensors.items()}
    facts = {"teacher": source, "student_timestep": timestep}
    with staged(out) as folder:
        write_atomically(folder / "student.json", json.dumps(facts, indent=1))
        save_tensors(cast, folder / "ema.safetensors", {k: str(v) for k, v in facts.items()})
        before, after = load_one_step(run), load_one_step(str(folder))
        drawn, told = noise(0, range(2), before.student.latent_shape), before.examples
        parity = checked(apart((before.latents(drawn, told), after.latents(drawn, told))), chosen)
        if teacher is not None:
            write_atomically(folder / "student.json", json.dumps({**facts, "teacher": teacher}, indent=1))
    return {"out": str(out), "parity_max_abs_err": parity}
