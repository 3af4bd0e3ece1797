"""Read weight files strictly, and name them by their sha256."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from core.errors import UserError


def file_sha256(file: str | Path) -> str:
    """sha256 of a file's bytes."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_strict(net: nn.Module, file: str | Path, what: str) -> None:
    """Load a .safetensors or .pth state dict, `what` it should be. Names and shapes must agree."""
    state = _read_state(Path(file), what)
    own = net.state_dict()
    missing = sorted(n for n in own.keys() - state.keys() if not n.endswith("num_batches_tracked"))
    strange = sorted(state.keys() - own.keys())
    reshaped = sorted(n for n in own.keys() & state.keys() if own[n].shape != state[n].shape)
    if missing or strange or reshaped:
        first = (missing + strange + reshaped)[0]
        raise UserError(
            f"{file} is not {what}: {len(missing)} tensors missing, {len(strange)} unknown, "
            f"{len(reshaped)} of another shape, the first {first!r}; put that file there"
        )
    net.load_state_dict(
        state
    )  # a plain dict carries no version, so old files without batch counters load too


def _read_state(file: Path, what: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not file.is_file():
        raise UserError(f"{file}: no weights there; put {what} at that path or give its path")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # on damaged bytes the unpickler raises almost anything
        raise UserError(f"{file} is damaged or no weights file; put {what} there") from error
