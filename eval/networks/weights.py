"""Find and read weight files strictly, and name them by their sha256."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from d2g.core.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFile:
    """A weight file as its authors publish it. `names`: the file's, the same bytes under each."""

    names: tuple[str, ...]
    sha256: str
    """The first digits, which the names end in."""
    mib: int
    source: str

    def __str__(self) -> str:
        return f"{self.names[0]} ({self.mib} MiB, sha256 {self.sha256}…, {self.source})"


def weights_folder() -> Path:
    """Where published weights are looked for: PyTorch's own folder, which other packages fill too."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_weights(published: PublishedFile, given: str | Path | None) -> Path:
    """The file `given`, or the published one in `weights_folder()`, whole.

    Raises UserError when there is none, saying what to fetch and where to put it, and when a file under a
    published name is not what its name says.
    """
    if given is None:
        folder = weights_folder()
        held = [folder / name for name in published.names if (folder / name).is_file()]
        if not held:
            raise UserError(f"no weights in {folder}: fetch {published} and put it there, or give its path")
        given = held[0]
    file = Path(given)
    if file.name in published.names and file.is_file() and not file_sha256(file).startswith(published.sha256):
        raise UserError(
            f"{file} is damaged: its sha256 does not start with {published.sha256}; fetch it again"
        )
    return file


def file_sha256(file: str | Path) -> str:
    """sha256 of a file's bytes."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_strict(net: nn.Module, file: str | Path, what: str) -> None:
    """Load a .safetensors or .pth state dict, `what` it should be. Names and shapes must agree."""
    fill_parameters(net, read_state(file, what), file, what)


def fill_parameters(net: nn.Module, state: Mapping[str, Tensor], file: str | Path, what: str) -> None:
    """Put the state that was read from `file` into a network. Names and shapes must agree."""
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
    # A plain dict carries no version, so old files without batch counters load too.
    net.load_state_dict(dict(state))


def read_state(file: str | Path, what: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or a PyTorch checkpoint. Raises UserError when there are none."""
    state = read_checkpoint(file, what)
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{file} is no state dict of tensors; put {what} there")
    return state


def read_checkpoint(file: str | Path, what: str) -> dict[str, Tensor]:
    """The same without a look at what the dict holds: some checkpoints nest."""
    from safetensors.torch import load_file

    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no weights there; put {what} at that path or give its path")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # on damaged bytes the unpickler raises almost anything
        raise UserError(f"{file} is damaged or no weights file; put {what} there") from error
