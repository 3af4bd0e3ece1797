"""Where an export goes, and whether it may: none lies in --out that does not draw the student's image."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from d2g.core.errors import SettingError, UserError
from d2g.diffusion.pipelines import SHIPPED

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PARITY_BOUND = 1e-3
"""Of an export in fp32: a quarter of the step between two 8-bit pixels, and above the 1e-4 within which two
orders of the same fp32 sums stay. Half precision has none, for what rounding the weights changes depends on
the network: at an epsilon teacher's last timestep it is multiplied by 14.6.
"""


def check_out(out: Path, student: str, teacher: str) -> None:
    """Raise UserError where an export would be mixed with a run, with what it is made of, or with a pipeline
    that no export wrote."""
    if run := [name for name in ("config.json", "checkpoints") if (out / name).exists()]:
        raise UserError(f"--out {out} holds a run or a model ({', '.join(run)}); choose another --out")
    for what, source in (("student", student), ("teacher", teacher)):
        folder = SHIPPED[source] / what if source in SHIPPED else Path(source)
        if folder.is_dir() and folder.resolve() == out.resolve():
            raise UserError(f"--out {out} is the {what} itself; choose another --out")
    if (out / "model_index.json").exists() and not _ours(out):
        raise UserError(f"--out {out} holds a pipeline that no export wrote; choose another --out")


def _ours(folder: Path) -> bool:
    readme = folder / "README.md"
    return readme.is_file() and "diffusion2gan" in readme.read_text(encoding="utf-8", errors="replace")


def named_dtype(name: str) -> torch.dtype:
    """One of DTYPES. Raises SettingError for another name."""
    if name not in DTYPES:
        raise SettingError(f"dtype is {name!r}; expected {', '.join(DTYPES)}")
    return DTYPES[name]


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder to write an export into. When the block ends well, what is in it takes the place of what OUT
    has under the same names; when it does not, OUT is as it was."""
    made, temporary = not out.exists(), out / f".export.{os.getpid()}.tmp"
    try:
        for torn in out.glob(".export.*.tmp"):  # what killed exports left
            shutil.rmtree(torn)
        temporary.mkdir(parents=True)
        yield temporary
        for entry in sorted(temporary.iterdir(), key=lambda path: (path.is_file(), path.name)):
            if (out / entry.name).is_dir():
                shutil.rmtree(out / entry.name)
            os.replace(entry, out / entry.name)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error}; free space or choose another --out, then run again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a .safetensors file. Raises UserError when the disk refuses."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {file.parent}: {error}; free space or choose another --out, then run again"
        ) from error


def apart(*pairs: tuple[Tensor, Tensor]) -> float:
    """The largest difference within any pair of tensors; NaN where one is."""
    return float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())


def checked(parity: float, dtype: torch.dtype) -> float:
    """`parity`, of an export in `dtype`. Raises UserError where it is no export of the student."""
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


@contextmanager
def exact_sums() -> Iterator[None]:
    """Without TensorFloat-32 in convolutions, whose ten bits would hide what parity is there to show."""
    old = torch.backends.cudnn
    with old.flags(old.enabled, old.benchmark, deterministic=old.deterministic, allow_tf32=False):
        yield
