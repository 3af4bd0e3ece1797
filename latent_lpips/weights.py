"""A LatentLPIPS on disk: FOLDER/lpips.safetensors and FOLDER/config.json (network, meta).

The authors' checkpoint files load too, see latent_lpips.official_checkpoints.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2g.core.config import from_json, to_json
from d2g.core.errors import UserError
from latent_lpips.config import LPIPSConfig, Precision
from latent_lpips.distance import LatentLPIPS, refuse_negative
from latent_lpips.official_checkpoints import SUFFIXES, check, read_checkpoint

WEIGHTS, CONFIG = "lpips.safetensors", "config.json"
PREFIX = "trunk."  # left out on disk, so that the trunk's keys are torchvision's


def save(
    metric: LatentLPIPS, folder: str | Path, meta: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write trunk and heads (stored as `dtype`; fp16 halves the file) and `meta`, any JSON-able facts.

    Each file is written under a temporary name and renamed, the config last, so a folder with a config is
    whole. A folded metric is stored folded, but one in bf16 is refused: its weights are rounded. Raises
    UserError when the folder can't be written.
    """
    folder = Path(folder)
    if metric.precision == "bf16":
        raise UserError(f"{folder}: this LatentLPIPS is rounded to bf16; load it with fp32 to save it")
    state = {
        key.removeprefix(PREFIX): _stored(value, dtype).contiguous().cpu()
        for key, value in sorted(metric.state_dict().items())
    }
    text = json.dumps({"network": to_json(metric.config), "meta": dict(meta)}, indent=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / f"{WEIGHTS}.tmp")
        (folder / f"{CONFIG}.tmp").write_text(text + "\n", encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            os.replace(folder / f"{name}.tmp", folder / name)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{folder}: LatentLPIPS weights could not be written ({error}); free space or name another folder"
        ) from error


def load(
    path: str | Path,
    fold: bool = True,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
) -> LatentLPIPS:
    """The metric of a folder, of the lpips.safetensors in it, or of an authors' file, on `device`.

    With `fold`, batch norms go into the convolutions, which take `precision` (see LatentLPIPS.fold). Raises
    UserError for missing, damaged or mismatched files and for negative heads.
    """
    path = Path(path)
    if path.suffix in SUFFIXES:
        metric, _ = read_checkpoint(path)
    else:
        folder = _folder(path)
        metric = LatentLPIPS(_network(folder))
        state = _read(folder / WEIGHTS)
        state = {key if key.startswith("heads.") else PREFIX + key: value for key, value in state.items()}
        check(state, metric.state_dict(), folder / WEIGHTS, CONFIG)
        heads = [state[key].float() for key in sorted(state) if key.startswith("heads.")]
        refuse_negative(heads, str(folder / WEIGHTS))
        metric.load_state_dict({key: _loaded(value) for key, value in state.items()})
    metric.to(device)
    return metric.fold(precision) if fold else metric


def load_lpips(
    path: str | Path,
    latent_channels: int,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
) -> LatentLPIPS:
    """`load`, for a latent space of `latent_channels`. Raises UserError when the weights are for another."""
    path = Path(path)
    metric = None if path.suffix not in SUFFIXES else load(path, precision=precision, device=device)
    channels = metric.config.channels if metric else _network(_folder(path)).channels
    if channels != latent_channels:
        raise UserError(
            f"{path}: LatentLPIPS weights take latents of {channels} channels, expected {latent_channels} "
            "as in these latents; give weights trained in the same latent space"
        )
    return metric if metric else load(path, precision=precision, device=device)


def convert(path: str | Path, out: str | Path, space: str | None = None) -> dict[str, Any]:
    """Write an authors' file as a folder of ours, with its licence among the facts. Returns the facts, and
    the latent's channels.

    `space`: see authors.read_checkpoint, whose errors this raises.
    """
    metric, facts = read_checkpoint(path, space)
    save(metric, out, facts)
    return {"channels": metric.config.channels, **facts}


def read_meta(path: str | Path) -> dict[str, Any]:
    """The facts given to `save`."""
    if Path(path).suffix in SUFFIXES:
        return read_checkpoint(path)[1]
    meta: dict[str, Any] = _config(_folder(path)).get("meta", {})
    return meta


def _folder(path: str | Path) -> Path:
    path = Path(path)
    folder = path.parent if path.suffix == ".safetensors" else path
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: no {name}, expected a LatentLPIPS folder with {WEIGHTS} and {CONFIG}; "
                "make one with `d2g lpips train` or name another folder"
            )
    return folder


def _config(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{folder / CONFIG}: not readable as JSON ({error}); train or copy it again"
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("network"), dict):
        raise UserError(
            f"{folder / CONFIG}: has no 'network' entry, expected a LatentLPIPS config; copy it again"
        )
    return data


def _network(folder: Path) -> LPIPSConfig:
    return from_json(LPIPSConfig, _config(folder)["network"])


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not readable as safetensors ({error}); train or copy it again") from error


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _loaded(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
