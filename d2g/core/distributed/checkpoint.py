"""Checkpoints: a folder per point in training, whole or absent. Tensors in safetensors, counters in JSON.

RUN/checkpoints/000012800/{student,ema,…}.safetensors  state.pt (optimisers)  meta.json
"""

import json
import os
import pickle
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d2g.core.atomic_files import sync
from d2g.core.config import read_object
from d2g.core.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    nimg: int
    meta: dict[str, Any]

    def load(self, name: str, module: nn.Module) -> None:
        """Strictly load `name`.safetensors into `module`, keeping the module's dtypes and device."""
        module.load_state_dict(self.tensors(name), strict=True)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The state dict `name`. Raises UserError where it is absent or damaged."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            found = sorted(p.stem for p in self.folder.glob("*.safetensors"))
            raise UserError(
                f"{self.folder}: no {name}.safetensors, found {', '.join(found) or 'none'}; "
                "choose another checkpoint"
            )
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); {remedy(self.folder)}") from error

    def state(self) -> dict[str, Any]:
        """Optimiser states and the like. Raises UserError where they are absent or damaged."""
        path = self.folder / "state.pt"
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            why = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{path} is damaged ({why}); {remedy(self.folder)}") from error
        return state


def save(
    folder: Path,
    nimg: int,
    modules: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write a checkpoint under a temporary name, sync it, rename it; then drop all but the newest `keep`.

    Raises UserError when the disk is full or the folder cannot be written; what was there before stays.
    """
    target = folder / f"{nimg:09d}"
    temporary = folder / f".{nimg:09d}.{os.getpid()}.tmp"
    try:
        for torn in folder.glob(".*.tmp"):  # what killed writers left; a run has one writer
            shutil.rmtree(torn)
        temporary.mkdir(parents=True, exist_ok=True)
        for name, tensors in modules.items():
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
                temporary / f"{name}.safetensors",
            )
        torch.save(dict(state), temporary / "state.pt")
        (temporary / "meta.json").write_text(json.dumps({**meta, "nimg": nimg}, indent=1))
        for path in (*sorted(temporary.iterdir()), temporary):
            sync(path)
        if target.exists():  # the same point of the same run, written again after a resume
            discard(target)
        os.replace(temporary, target)
        sync(folder)  # before older ones go
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = latest(folder)
        safe = f"the last good checkpoint is {last.folder}" if last else "no checkpoint was written before"
        raise UserError(
            f"cannot write checkpoint {target}: {error}; {safe}; free space, then run the same command again"
        ) from error
    prune(folder, keep)
    return target


def prune(folder: Path, keep: int, spare: Collection[str] = ()) -> None:
    """Drop all whole checkpoints but the newest `keep` and those named in `spare`."""
    for old in _whole(folder)[:-keep]:
        if old.name not in spare:
            discard(old)


def discard(folder: Path) -> None:
    """Delete a checkpoint. A kill halfway leaves a name that no reader sees and the next writer sweeps."""
    away = folder.with_name(f".{folder.name}.old.tmp")
    os.replace(folder, away)
    sync(folder.parent)
    shutil.rmtree(away)


def _whole(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.isdigit() and (p / "meta.json").is_file())


def whole_points(folder: Path) -> list[int]:
    """Images at each whole checkpoint of a run's `checkpoints` folder, ascending."""
    return [int(path.name) for path in _whole(folder)]


def all_whole(folder: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints` folder, oldest first. Raises UserError for one without a
    meta.json: its writer gave it its name when all of it was there.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.isdigit():
            _refuse_lost_meta(path)
    return _whole(folder)


def _refuse_lost_meta(folder: Path) -> None:
    meta = folder / "meta.json"
    # Asked twice, for a writer may drop the folder, or write it again, meanwhile.
    if not meta.is_file() and folder.is_dir() and not meta.is_file():
        raise UserError(f"{folder} is damaged (it has no meta.json); delete {folder} to go on without it")


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run's `checkpoints` folder, or None. Raises UserError for damage."""
    whole = all_whole(folder)
    return open_checkpoint(whole[-1]) if whole else None


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint folder by name. Raises UserError for damage, or naming the ones that are there."""
    _refuse_lost_meta(folder)
    if not (folder / "meta.json").is_file():
        found = [p.name for p in _whole(folder.parent)]
        raise UserError(f"no checkpoint {folder}; found {', '.join(found) or 'none'} beside it")
    meta = read_object(folder / "meta.json", remedy(folder))
    if not isinstance(nimg := meta.get("nimg"), int):
        raise UserError(f"{folder / 'meta.json'} is damaged (it names no nimg); {remedy(folder)}")
    return Checkpoint(folder, nimg, meta)


def remedy(folder: Path) -> str:
    """What to do about a damaged checkpoint."""
    return f"delete {folder} to go on from the checkpoint before it"
