"""Reads the authors' checkpoints of LatentLPIPS (package elatentlpips, github.com/mingukkang/elatentlpips).

There are two forms. A trunk, `SPACE_latent_vgg16.pth.tar`, has a `state_dict` with
`[module.]model.features.N…` and the classifier. A calibrated distance, `SPACE_latest_vgg16_tuned.pth`, has
`net.sliceK.N…`, `linL.model.1.weight` and a copy of it, `lins.L.model.1.weight`. This file knows their names
and shapes; it shares no code with the package.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from d2g.core.errors import SettingError, UserError
from d2g.core.logs import logger
from d2g.core.machine_errors import raise_machine_error
from d2g.core.torch_files import load_tensors
from d2g.diffusion.latents import LatentSpace
from d2g.vision.weights import file_sha256
from latent_lpips.config import LPIPSConfig
from latent_lpips.distance import LatentLPIPS, require_nonnegative_heads

CHECKPOINT_SUFFIXES = (".pth", ".tar")
WEIGHTS_LICENSE = "CC-BY-NC-4.0"
LICENSE_NOTICE = (
    f"{{file}}: weights of the authors of elatentlpips, license {WEIGHTS_LICENSE}: "
    "for non-commercial use only"
)
OFFICIAL_SPACES: Mapping[str, LatentSpace] = MappingProxyType(
    {
        "sd15": LatentSpace(channels=4, downscale=8, scale=0.18215),
        "sd21": LatentSpace(channels=4, downscale=8, scale=0.18215),
        "sdxl": LatentSpace(channels=4, downscale=8, scale=0.13025),
        "sd3": LatentSpace(channels=16, downscale=8, scale=1.5305, shift=0.0609),
        "flux": LatentSpace(channels=16, downscale=8, scale=0.3611, shift=0.1159),
    }
)
"""Latent spaces with published weights, by the prefix of the files' names."""


def read_official_checkpoint(
    path: str | Path, space: str | None = None
) -> tuple[LatentLPIPS, dict[str, Any]]:
    """Load either form: returns the metric (not folded, fp32, on the CPU) and its metadata for `save_lpips`.

    A trunk alone gets heads of weight 1 (uncalibrated). `space` is a name of OFFICIAL_SPACES; by default it
    is read from the prefix of the file's name, if there is one. Only tensors and plain values are unpickled.
    Prints the license on stderr. Raises UserError for damaged, unsafe, incomplete or unknown files, for a
    file of another latent space than `space`, and for negative heads; SettingError for an unknown space.
    """
    path = Path(path)
    if space is not None and space not in OFFICIAL_SPACES:
        raise SettingError(f"latent space {space!r} is unknown, expected one of {', '.join(OFFICIAL_SPACES)}")
    # Translate the names of either form to ours.
    content = _unpickle(path)
    calibrated = "state_dict" not in content
    state = _calibrated_state(content, path) if calibrated else _trunk_state(content["state_dict"], path)
    # Complete the state: heads of a trunk, and counters that files of old torch versions lack (eval mode
    # does not read them).
    metric = LatentLPIPS(_network(state, path)).float()
    expected = metric.state_dict()
    if not calibrated:
        state |= {key: value for key, value in expected.items() if key.startswith("heads.")}
    state |= {
        key: v for key, v in expected.items() if key.endswith("num_batches_tracked") and key not in state
    }
    check_state_dict(state, expected, path, "VGG16-BN")
    require_nonnegative_heads([state[key] for key in sorted(state) if key.startswith("heads.")], str(path))
    metric.load_state_dict({key: v.float() if v.is_floating_point() else v for key, v in state.items()})
    metadata = _metadata(path, calibrated, _space(path, space, metric.config.channels))
    logger.warning(LICENSE_NOTICE.format(file=path.name))
    return metric, metadata


def check_state_dict(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: Path, authority: str
) -> None:
    """Raise UserError unless `state` has the names and shapes of `expected`, which come from `authority`."""
    # First the names, in both directions, then the shapes.
    for key in sorted(set(state) ^ set(expected)):
        what = "lacks" if key in expected else "has the unknown"
        raise UserError(f"{file}: {what} tensor {key.removeprefix('trunk.')!r}; copy the file again")
    for key in sorted(state):
        shape, expected_shape = tuple(state[key].shape), tuple(expected[key].shape)
        if shape != expected_shape:
            raise UserError(
                f"{file}: tensor {key.removeprefix('trunk.')!r} is {shape}, {authority} says "
                f"{expected_shape}; copy the file again"
            )


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        content = load_tensors(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, expected an elatentlpips checkpoint") from error
    except Exception as error:  # on damaged bytes the unpickler raises almost anything
        raise_machine_error(error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: not a checkpoint of tensors alone ({reason}); fetch it again, and don't open files "
            "that need more than that"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    return content


def _trunk_state(state: Any, path: Path) -> dict[str, Tensor]:
    """Return a trunk's state under our names, without the classifier's layers."""
    renamed: dict[str, Tensor] = {}
    for key, value in _tensors(state, path).items():
        name = key.removeprefix("module.").removeprefix("model.")
        if not name.startswith("classifier."):
            renamed[f"trunk.{name}"] = value
    return renamed


def _calibrated_state(state: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Return a calibrated distance's state under our names. Raises UserError if its two heads differ."""
    renamed: dict[str, Tensor] = {}
    # Collect trunk and heads under our names; unknown names stay, so that the check reports them.
    copies: dict[str, Tensor] = {}
    for key, value in _tensors(state, path).items():
        if match := re.fullmatch(r"net\.slice\d+\.(\d+\..+)", key):
            renamed[f"trunk.features.{match[1]}"] = value
        elif match := re.fullmatch(r"(lin|lins\.)(\d+)\.model\.1\.weight", key):
            (renamed if match[1] == "lin" else copies)[f"heads.{match[2]}"] = value.flatten()
        else:
            renamed[key] = value  # `check_state_dict` rejects it by name
    # The file has every head twice; both must be equal.
    for key, value in copies.items():
        if key not in renamed or not torch.equal(renamed[key], value):
            raise UserError(
                f"{path}: lins and lin differ in {key.replace('heads.', 'head ')}; fetch it again"
            )
    return renamed


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: expected an elatentlpips checkpoint, tensors by name; got something else")
    return dict(state)


def _network(state: Mapping[str, Tensor], path: Path) -> LPIPSConfig:
    first = state.get("trunk.features.0.weight")
    if first is None or first.dim() != 4:
        raise UserError(
            f"{path}: has no first convolution; expected an elatentlpips checkpoint, either a trunk "
            "(state_dict) or a calibrated distance (net.slice1.0.weight)"
        )
    return LPIPSConfig(channels=first.shape[1], width=first.shape[0] / 64)


def _space(path: Path, space: str | None, channels: int) -> str | None:
    name = space or next((name for name in OFFICIAL_SPACES if path.name.startswith(f"{name}_")), None)
    if name is not None and OFFICIAL_SPACES[name].channels != channels:
        raise UserError(
            f"{path}: takes latents of {channels} channels, {name} has {OFFICIAL_SPACES[name].channels}; "
            "give the latent space that the file belongs to"
        )
    return name


def _metadata(path: Path, calibrated: bool, space: str | None) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "source": f"elatentlpips, {path.name}",
        "sha256": file_sha256(path),
        "license": WEIGHTS_LICENSE,
        "calibrated": calibrated,
    }
    # A known latent space also fixes the scale that the weights expect.
    if space is not None:
        scale, shift = OFFICIAL_SPACES[space].scale, OFFICIAL_SPACES[space].shift
        metadata |= {"latent_space": space, "scaling_factor": scale, "shift_factor": shift}
    return metadata
