"""A LatentLPIPS on disk: FOLDER/lpips.safetensors and FOLDER/config.json with entries `network` and `meta`.

`load_lpips` also reads the authors' checkpoint files (latent_lpips/official_checkpoints.py).
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

from d2g.core.atomic_files import share_weights
from d2g.core.config import from_json, to_json
from d2g.core.errors import UserError
from d2g.core.json_files import read_json_object
from d2g.core.machine_errors import raise_machine_error
from d2g.diffusion.latents import latent_space
from latent_lpips.config import LPIPSConfig, Precision
from latent_lpips.distance import LatentLPIPS, require_nonnegative_heads
from latent_lpips.official_checkpoints import CHECKPOINT_SUFFIXES, check_state_dict, read_official_checkpoint

WEIGHTS_FILE, CONFIG_FILE = "lpips.safetensors", "config.json"
TRUNK_PREFIX = "trunk."  # not stored: on disk the trunk has torchvision's keys


def save_lpips(
    metric: LatentLPIPS, folder: str | Path, meta: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write trunk and heads in `dtype` (fp16 halves the file) and `meta`, any JSON-serializable metadata.

    Each file is written under a temporary name and renamed, the config last, so a folder with a config is
    complete. A folded metric is stored folded. Raises UserError for a bf16 metric, whose weights are rounded,
    and for a folder that cannot be written.
    """
    folder = Path(folder)
    if metric.precision == "bf16":
        raise UserError(f"{folder}: this LatentLPIPS is rounded to bf16; load it with fp32 to save it")
    # Keys as in torchvision's VGG16, so that other code can read the trunk.
    state = {
        key.removeprefix(TRUNK_PREFIX): _to_stored(value, dtype).contiguous().cpu()
        for key, value in sorted(metric.state_dict().items())
    }
    # Write both files under temporary names, and rename the config last: it marks a complete folder.
    text = json.dumps({"network": to_json(metric.config), "meta": dict(meta)}, indent=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / f"{WEIGHTS_FILE}.tmp")
        (folder / f"{CONFIG_FILE}.tmp").write_text(text + "\n", encoding="utf-8")
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(folder / f"{name}.tmp", folder / name)
        share_weights(folder, WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{folder}: LatentLPIPS weights could not be written ({error}); free space or give another folder"
        ) from error


def load_lpips(
    path: str | Path,
    latent_channels: int | None = None,
    *,
    fold: bool = True,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
) -> LatentLPIPS:
    """Load a LatentLPIPS from a folder, from the lpips.safetensors in it, or from a file of the authors.

    With `fold`, batch norms are folded into the convolutions, which then compute in `precision` (see
    `LatentLPIPS.fold`). With `latent_channels`, weights for latents of another number of channels are an
    error. Raises UserError for missing, damaged or mismatched files and for negative head weights.
    """
    path = Path(path)
    # The shapes come from the authors' file itself, or from the config of our folder.
    if path.suffix in CHECKPOINT_SUFFIXES:
        metric, _ = read_official_checkpoint(path)
        _check_channels(path, metric.config.channels, latent_channels)
    else:
        folder = _complete_folder(path)
        config = read_lpips_config(folder)
        _check_channels(path, config.channels, latent_channels)
        metric = LatentLPIPS(config).float()
        # Check names, shapes and signs before anything is loaded.
        state = _read_tensors(folder / WEIGHTS_FILE)
        state = {
            key if key.startswith("heads.") else TRUNK_PREFIX + key: value for key, value in state.items()
        }
        check_state_dict(state, metric.state_dict(), folder / WEIGHTS_FILE, CONFIG_FILE)
        heads = [state[key].float() for key in sorted(state) if key.startswith("heads.")]
        require_nonnegative_heads(heads, str(folder / WEIGHTS_FILE))
        metric.load_state_dict({key: _to_fp32(value) for key, value in state.items()})
    # Fold on the target device, because `auto` depends on its hardware.
    metric.to(device)
    return metric.fold(precision) if fold else metric


def _check_channels(path: Path, channels: int, expected: int | None) -> None:
    if expected is not None and channels != expected:
        raise UserError(
            f"{path}: LatentLPIPS weights take latents of {channels} channels, expected {expected} "
            "as in these latents; give weights trained in the same latent space"
        )


def convert_official_checkpoint(
    path: str | Path, out: str | Path, space: str | None = None
) -> dict[str, Any]:
    """Convert a file of the authors to a LatentLPIPS folder `out`; returns its metadata and channels.

    The metadata names the license. `space` and errors: see `read_official_checkpoint`.
    """
    metric, metadata = read_official_checkpoint(path, space)
    save_lpips(metric, out, metadata)
    return {"channels": metric.config.channels, **metadata}


def read_lpips_meta(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a LatentLPIPS folder or of a file of the authors."""
    if Path(path).suffix in CHECKPOINT_SUFFIXES:
        return read_official_checkpoint(path)[1]
    meta: dict[str, Any] = _read_config(_complete_folder(path)).get("meta", {})
    return meta


def latent_scale(vae: Any) -> dict[str, float]:
    """Scale and shift of an autoencoder's latents, for the metadata of a metric that is trained on them; {}
    for a tiny autoencoder, whose raw latents are already scaled."""
    if "Tiny" in type(vae).__name__:
        return {}
    space = latent_space(vae)
    return {"scaling_factor": space.scale, "shift_factor": space.shift}


def require_latent_scale(path: str | Path, meta: Mapping[str, Any], vae: Any, name: str) -> None:
    """Raise UserError if the metadata of weights records another scale than that of the latents of `vae`,
    which is called `name`."""
    scale = latent_scale(vae)
    if "scaling_factor" not in meta or not scale:
        return
    expected = {key: float(meta.get(key) or 0.0) for key in scale}
    if any(abs(expected[key] - scale[key]) > 1e-6 for key in scale):
        raise UserError(
            f"{path}: these weights take latents of scale {expected['scaling_factor']:g} and "
            f"shift {expected['shift_factor']:g}, {name} has {scale['scaling_factor']:g} and "
            f"{scale['shift_factor']:g}; give that latent space's autoencoder, or weights of this one"
        )


def _complete_folder(path: str | Path) -> Path:
    path = Path(path)
    folder = path.parent if path.suffix == ".safetensors" else path
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: no {name}, expected a LatentLPIPS folder with {WEIGHTS_FILE} and {CONFIG_FILE}; "
                "train one with `d2g lpips train`, or give another folder"
            )
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    data = read_json_object(folder / CONFIG_FILE, "train or copy it again")
    if not isinstance(data.get("network"), dict):
        raise UserError(
            f"{folder / CONFIG_FILE}: has no 'network' entry, expected a LatentLPIPS config; copy it again"
        )
    return data


def read_lpips_config(folder: Path) -> LPIPSConfig:
    """The shape of the LatentLPIPS in a folder, without its weights. Raises UserError for a damaged file."""
    return from_json(LPIPSConfig, _read_config(folder)["network"])


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise_machine_error(error, file)
        raise UserError(f"{file}: not readable as safetensors ({error}); train or copy it again") from error


def _to_stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _to_fp32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
