"""Find weight files, load them strictly, and identify them by their sha256."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from d2g.core.errors import UserError, first_line
from d2g.core.machine_errors import raise_machine_error
from d2g.core.torch_files import load_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFile:
    """A weight file as its authors publish it. `names`: the file names under which the same bytes exist."""

    names: tuple[str, ...]
    sha256: str
    """First hexadecimal digits, which the file names end in."""
    mib: int
    source: str

    def __str__(self) -> str:
        return f"{self.names[0]} ({self.mib} MiB, sha256 {self.sha256}…, {self.source})"


def weights_folder() -> Path:
    """Where to look for published weights: the folder of torch.hub, which other packages fill too."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_weights(published: PublishedFile, path: str | Path | None) -> Path:
    """The file at `path`, or without one the published file in `weights_folder()`.

    Raises UserError when there is none, saying what to fetch and where to put it, and when the digest of a
    file with a published name is wrong.
    """
    if path is None:
        folder = weights_folder()
        existing = [folder / name for name in published.names if (folder / name).is_file()]
        if not existing:
            raise UserError(f"no weights in {folder}: fetch {published} and put it there, or give its path")
        path = existing[0]
    file = Path(path)
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
    """Load a .safetensors or .pth state dict. Names and shapes must agree; `what` describes it in errors."""
    fill_parameters(net, read_state(file, what), file, what)


def fill_parameters(net: nn.Module, state: Mapping[str, Tensor], file: str | Path, what: str) -> None:
    """Load the state that was read from `file` into a network. Names and shapes must agree."""
    expected = net.state_dict()
    missing = sorted(n for n in expected.keys() - state.keys() if not n.endswith("num_batches_tracked"))
    unknown = sorted(state.keys() - expected.keys())
    reshaped = sorted(n for n in expected.keys() & state.keys() if expected[n].shape != state[n].shape)
    if missing or unknown or reshaped:
        first = (missing + unknown + reshaped)[0]
        raise UserError(
            f"{file} is not {what}: {len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(reshaped)} of another shape, the first {first!r}; put that file there"
        )
    # A plain dict has no version metadata, so old files without `num_batches_tracked` load too.
    net.load_state_dict(dict(state))


def read_state(file: str | Path, what: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or a PyTorch checkpoint. Raises UserError when there are none."""
    state = read_checkpoint(file, what)
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{file} is no state dict of tensors; put {what} there")
    return state


def read_checkpoint(file: str | Path, what: str) -> dict[str, Tensor]:
    """Read a checkpoint as `read_state` does, with values of any type: some nest their state dict."""
    from safetensors.torch import load_file

    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no weights there; put {what} at that path or give its path")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return dict(load_tensors(file))
    except Exception as error:  # the unpickler raises almost any error on damaged bytes
        raise_machine_error(error)
        reason = first_line(error)
        raise UserError(f"{file} is damaged or no weights file ({reason}); put {what} there") from error
