"""A finished student as a small folder: safetensors, and JSON that says what it needs."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from core import checkpoint
from core.checkpoint import write_atomically
from core.errors import SettingError, UserError
from distill.sample import load_one_step, student_folder

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_student(run: str, out: Path, dtype: str = "fp16", teacher: str | None = None) -> dict[str, Any]:
    """Write the EMA student of a run to OUT/ema.safetensors and OUT/student.json.

    Returns `out` and `parity_max_abs_err`: the largest difference between the latents of the run's student
    and of the exported one on two noises. `teacher`: the name to record, if not the run's.
    """
    if dtype not in DTYPES:
        raise SettingError(f"dtype is {dtype!r}; expected {', '.join(DTYPES)}")
    folder, source, timestep = student_folder(run)
    tensors = checkpoint.Checkpoint(folder, 0, {}).tensors("ema")
    cast = {k: v.to(DTYPES[dtype]) if v.is_floating_point() else v for k, v in tensors.items()}
    facts = {"teacher": source, "student_timestep": timestep}
    write_atomically(out / "student.json", json.dumps(facts, indent=1))
    try:
        save_file(cast, out / "ema.safetensors", metadata={k: str(v) for k, v in facts.items()})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {out}: {error}; free space or choose another --out, then run again"
        ) from error
    before, after = load_one_step(run), load_one_step(str(out))
    noise = torch.randn(2, *before.student.latent_shape, generator=torch.Generator().manual_seed(0))
    difference = (before.latents(noise, ["", ""]) - after.latents(noise, ["", ""])).abs().max()
    if teacher is not None:
        write_atomically(out / "student.json", json.dumps({**facts, "teacher": teacher}, indent=1))
    return {"out": str(out), "parity_max_abs_err": float(difference)}
