"""Output folder of an export: checks, weights, and the bound on its parity."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from d2g.core.errors import SettingError, UserError
from d2g.diffusion.pipelines import SHIPPED

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PARITY_BOUND = 1e-3
"""Largest difference allowed for an fp32 export.

It is a quarter of the step between two 8-bit pixel values, and above the 1e-4 by which two summation orders
differ in fp32. Half precision has no bound, because the effect of rounded weights depends on the network: at
the last timestep of an epsilon teacher it is multiplied by 14.6.
"""


def check_out(out: Path, student: str, teacher: str, replaced: Iterable[str] = ()) -> None:
    """Raise UserError if `out` holds a run, a checkpoint, the student, the teacher, a pipeline that no export
    wrote, or without an export one of the entries `replaced`, which this one would replace.
    """
    if files := [name for name in ("config.json", "checkpoints", "meta.json") if (out / name).exists()]:
        raise UserError(f"--out {out} holds a run or a model ({', '.join(files)}); choose another --out")
    for role, source in (("student", student), ("teacher", teacher)):
        folder = SHIPPED[source] / role if source in SHIPPED else Path(source)
        if folder.is_dir() and folder.resolve() == out.resolve():
            raise UserError(f"--out {out} is the {role} itself; choose another --out")
    if (out / "model_index.json").exists() and not is_export(out):
        raise UserError(f"--out {out} holds a pipeline that no export wrote; choose another --out")
    if not is_export(out) and (others := [name for name in replaced if os.path.lexists(out / name)]):
        raise UserError(
            f"--out {out} holds what no export wrote and this one would replace ({', '.join(others)}); "
            "choose another --out"
        )


def is_export(folder: Path) -> bool:
    """Whether a folder holds an export with a model card."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    return text.startswith("---") and "diffusion2gan" in text


def parse_dtype(name: str) -> torch.dtype:
    """The torch type of a name in DTYPES. Raises SettingError for another name."""
    if name not in DTYPES:
        raise SettingError(f"dtype is {name!r}; expected {', '.join(DTYPES)}")
    return DTYPES[name]


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a .safetensors file. Raises UserError when the disk refuses."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {file.parent}: {error}; free space or choose another --out, then run again"
        ) from error


def max_abs_diff(*pairs: tuple[Tensor, Tensor]) -> float:
    """Largest absolute difference within the pairs of tensors; NaN if any value is NaN."""
    return float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())


def check_parity(parity: float, dtype: torch.dtype) -> float:
    """Return `parity` unchanged. Raises UserError if it is not finite, or above PARITY_BOUND in fp32."""
    name = str(dtype).removeprefix("torch.")
    if not math.isfinite(parity):
        raise UserError(
            f"the student, or its export in {name}, draws values that are not finite; nothing was written; "
            "look at the student with `d2g sample`, or choose another --dtype"
        )
    if dtype == torch.float32 and parity > PARITY_BOUND:
        raise UserError(
            f"the export's latents or images differ by {parity:.2e} from the student's own, expected at most "
            f"{PARITY_BOUND:g} in {name}; nothing was written; choose another --format and report this"
        )
    return parity
