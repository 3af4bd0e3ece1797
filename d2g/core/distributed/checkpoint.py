"""Checkpoints of one process: a folder per point in training, complete or absent.

RUN/checkpoints/000012800/{student,ema,…}.safetensors  state.pt (optimizers)  meta.json (counters)
"""

import json
import os
import pickle
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d2g.core.atomic_files import fsync_path, share_weights
from d2g.core.errors import UserError
from d2g.core.json_files import read_json_object
from d2g.core.machine_errors import raise_machine_error
from d2g.core.regular_files import require_regular
from d2g.core.torch_files import load_tensors

CHECKPOINTS_KEPT = 2
"""Number of newest checkpoints that a run keeps by default."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. `nimg`: training images seen; `meta`: the content of meta.json.

    advice: what to do about damaged tensors; empty for the advice of a run, to delete the checkpoint.
    """

    folder: Path
    nimg: int
    meta: dict[str, Any]
    advice: str = ""

    def load(self, name: str, module: nn.Module) -> None:
        """Load `name`.safetensors into `module` strictly. The module keeps its dtypes and device."""
        module.load_state_dict(self.tensors(name), strict=True)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The state dict in `name`.safetensors. Raises UserError if the file is missing or damaged."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            names = sorted(p.stem for p in self.folder.glob("*.safetensors"))
            raise UserError(
                f"{self.folder}: no {name}.safetensors, found {', '.join(names) or 'none'}; "
                "choose another checkpoint"
            )
        try:
            require_regular(path)  # safetensors says that a file is not there which it may not read
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise_machine_error(error, path)
            advice = self.advice or remedy(self.folder)
            raise UserError(f"{path} is damaged ({error}); {advice}") from error

    def state(self) -> dict[str, Any]:
        """The optimizer states in state.pt. Raises UserError if the file is missing or damaged."""
        path = self.folder / "state.pt"
        try:
            state: dict[str, Any] = load_tensors(path)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise_machine_error(error)
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{path} is damaged ({reason}); {remedy(self.folder)}") from error
        return state


def save(
    folder: Path,
    nimg: int,
    modules: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    keep: int = CHECKPOINTS_KEPT,
) -> Path:
    """Write a checkpoint to a temporary folder, sync and rename it, then delete all but the newest `keep`.

    modules: state dicts by file name. Returns the checkpoint's folder. Raises UserError when the disk is
    full or the folder cannot be written; earlier checkpoints stay.
    """
    target = folder / f"{nimg:09d}"
    temporary = folder / f".{nimg:09d}.{os.getpid()}.tmp"
    try:
        # Remove what killed writers have left. A run has one writer.
        for leftover in folder.glob(".*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True, exist_ok=True)
        # Write all files and sync them.
        for name, tensors in modules.items():
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
                temporary / f"{name}.safetensors",
            )
        torch.save(dict(state), temporary / "state.pt")
        (temporary / "meta.json").write_text(json.dumps({**meta, "nimg": nimg}, indent=1))
        share_weights(temporary)
        for path in (*sorted(temporary.iterdir()), temporary):
            fsync_path(path)
        # Give the folder its name. A resumed run may write the same point again.
        if target.exists():
            discard(target)
        os.replace(temporary, target)
        fsync_path(folder)  # before older checkpoints are deleted
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = latest(folder)
        last_good = (
            f"the last good checkpoint is {last.folder}" if last else "no checkpoint was written before"
        )
        raise UserError(
            f"cannot write checkpoint {target}: {error}; {last_good}; free space, then run the same command "
            "again"
        ) from error
    prune(folder, keep)
    return target


def prune(folder: Path, keep: int = CHECKPOINTS_KEPT, spare: Collection[str] = ()) -> None:
    """Delete all complete checkpoints but the newest `keep` and those whose names are in `spare`."""
    for old in _complete(folder)[:-keep]:
        if old.name not in spare:
            discard(old)


def discard(folder: Path) -> None:
    """Delete a checkpoint. If killed halfway, it leaves a temporary folder for the next writer to remove."""
    trash = folder.with_name(f".{folder.name}.old.tmp")
    os.replace(folder, trash)
    fsync_path(folder.parent)
    shutil.rmtree(trash)


def _complete(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.isdigit() and (p / "meta.json").is_file())


def complete_points(folder: Path) -> list[int]:
    """Training images of each complete checkpoint in a run's `checkpoints` folder, ascending."""
    return [int(path.name) for path in _complete(folder)]


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders of the checkpoints in a run's `checkpoints` folder, oldest first.

    Raises UserError for one without meta.json: it was complete when it got its name, so a file is lost.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.isdigit():
            _require_meta(path)
    return _complete(folder)


def _require_meta(folder: Path) -> None:
    meta = folder / "meta.json"
    # Check twice: meanwhile a writer may delete the folder, or write it again.
    if not meta.is_file() and folder.is_dir() and not meta.is_file():
        raise UserError(f"{folder} is damaged (it has no meta.json); delete {folder} to continue without it")


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run's `checkpoints` folder, or None. Raises UserError for damage."""
    folders = list_checkpoints(folder)
    return open_checkpoint(folders[-1]) if folders else None


class CheckpointMeta(TypedDict):
    """The fields that are read from a checkpoint's meta.json."""

    nimg: NotRequired[int]
    steps: NotRequired[int]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder. Raises UserError if it is damaged or missing, naming those beside it."""
    _require_meta(folder)
    if not (folder / "meta.json").is_file():
        names = [path.name for path in _complete(folder.parent)]
        raise UserError(f"no checkpoint {folder}; found {', '.join(names) or 'none'} beside it")
    meta = read_json_object(folder / "meta.json", remedy(folder), CheckpointMeta)
    if not isinstance(nimg := meta.get("nimg"), int):
        raise UserError(f"{folder / 'meta.json'} is damaged (it has no nimg); {remedy(folder)}")
    return Checkpoint(folder, nimg, meta)


def remedy(folder: Path) -> str:
    """The end of an error message about a damaged checkpoint: what to do."""
    return f"delete {folder} to continue from the checkpoint before it"
