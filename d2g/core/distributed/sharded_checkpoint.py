"""Checkpoints of a run on many processes: each rank writes what it holds, and any number of ranks reads it.

RUN/checkpoints/000012800/state/      torch.distributed.checkpoint: weights and optimizers
RUN/checkpoints/000012800/ema.safetensors   whole, for whoever draws
RUN/checkpoints/000012800/meta.json   images, steps, what the networks are, every file's size and sha256

The folder has a temporary name until all of it is synced: what bears a number is whole.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from d2g.core.atomic_files import sync
from d2g.core.distributed import process_group
from d2g.core.distributed.checkpoint import Checkpoint, discard, latest, prune
from d2g.core.distributed.engine import whole
from d2g.core.errors import UserError

STATE = "state"
T = TypeVar("T")


def network_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by name, as they lie: sharded ones as DTensors."""
    return {f"{prefix}.{name}": value.detach() for name, value in module.state_dict().items()}


def optimizer_tensors(prefix: str, optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """What an optimizer remembers of each parameter, by the parameter's name. Rates and betas are config."""
    return {
        f"{prefix}.{name}.{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


@dataclass
class Writer:
    """Writes a run's checkpoints, one at a time; with `background` from copies, while training goes on.

    keep: the newest so many stay, and those that `spare` names.
    """

    folder: Path
    keep: int = 2
    background: bool = False
    spare: set[str] = field(default_factory=set)
    _pending: tuple[Path, dict[str, Any], "Future[Any]"] | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))

    def save(
        self,
        nimg: int,
        tensors: Mapping[str, Tensor],
        files: Mapping[str, Mapping[str, Tensor]],
        meta: Mapping[str, Any],
    ) -> None:
        """On every rank. files: state dicts that become one NAME.safetensors each, written by rank 0.

        Raises UserError on every rank when one of them cannot write; what was there before stays.
        """
        self.finish()
        temporary = self.folder / f".{nimg:09d}.tmp"
        target = self.folder / f"{nimg:09d}"
        gathered = {name: _on_rank_0(values, self.background) for name, values in files.items()}
        with _together(temporary, target, self.folder):
            if process_group.rank() == 0:
                for torn in self.folder.glob(".*.tmp"):  # what killed writers left; a run has one writer
                    shutil.rmtree(torn)
                (temporary / STATE).mkdir(parents=True)
        with _together(temporary, target, self.folder):
            writing = self._write(dict(tensors), FileSystemWriter(temporary / STATE))
            future = self._submit(lambda: _complete(writing, gathered, temporary))
        self._pending = (target, {**meta, "nimg": nimg, "processes": process_group.world_size()}, future)
        if not self.background:
            self.finish()

    def _submit(self, work: Callable[[], T]) -> "Future[T]":
        """In the writer's thread with `background`, else at once."""
        if self.background:
            return self._thread.submit(work)
        done: Future[T] = Future()
        done.set_result(work())
        return done

    def _write(self, tensors: dict[str, Tensor], writer: FileSystemWriter) -> "Future[Any]":
        if not self.background or not process_group.joined():
            if self.background:
                tensors = {name: value.to("cpu", copy=True) for name, value in tensors.items()}
            return self._submit(lambda: _save(tensors, writer))
        # A group of its own: its messages must not mix with those of the gradients.
        writing = async_save(tensors, storage_writer=writer, process_group=process_group.side_group())
        assert isinstance(writing, Future)
        return writing

    @property
    def done(self) -> bool:
        """Whether nothing is being written on this rank."""
        return self._pending is None or self._pending[2].done()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written and give it its name. On every rank."""
        if self._pending is None:
            return
        target, meta, future = self._pending
        self._pending = None
        temporary = target.with_name(f".{target.name}.tmp")
        mine: dict[str, list[Any]] = {}
        with _together(temporary, target, self.folder):
            mine = future.result()
        files = {name: facts for part in process_group.gather_objects(mine) for name, facts in part.items()}
        with _together(temporary, target, self.folder):
            if process_group.rank() == 0:
                facts = temporary / "meta.json"
                facts.write_text(json.dumps({**meta, "files": files}, indent=1), encoding="utf-8")
                for path in (facts, temporary / STATE, temporary):
                    sync(path)
                if target.exists():  # the same point of the same run, written again after a resume
                    discard(target)
                os.replace(temporary, target)
                sync(self.folder)
                prune(self.folder, self.keep, self.spare)


class _together:
    """What fails on one rank fails on all, with the same one line, and leaves nothing half there."""

    def __init__(self, temporary: Path, target: Path, folder: Path) -> None:
        self.temporary, self.target, self.folder = temporary, target, folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, Exception | CheckpointException):
            return  # Ctrl-C. DCP's own error is no Exception either, but one that all ranks have
        reasons = [
            reason
            for reason in process_group.gather_objects(None if error is None else _first(error))
            if reason
        ]
        if not reasons:
            return
        if process_group.rank() == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
        last = latest(self.folder)
        safe = f"the last good checkpoint is {last.folder}" if last else "no checkpoint was written before"
        raise UserError(
            f"cannot write checkpoint {self.target}: {reasons[0]}; {safe}; "
            "free space, then run the same command again"
        ) from error


def _complete(
    writing: "Future[Any]", files: Mapping[str, dict[str, Tensor]], temporary: Path
) -> dict[str, list[Any]]:
    """Once DCP has written: whole files, on rank 0; then the facts of what this rank wrote, all synced."""
    writing.result()
    for name, values in files.items() if process_group.rank() == 0 else ():
        save_file(values, temporary / f"{name}.safetensors")
    return {str(path.relative_to(temporary)): _facts(path) for path in _mine(temporary)}


def _save(tensors: dict[str, Tensor], writer: FileSystemWriter) -> None:
    with _alone_is_fine():
        dcp_save(tensors, storage_writer=writer, no_dist=not process_group.joined())


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """DCP warns of every process that has no group, even when told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _first(error: BaseException) -> str:
    """The line that says why, of an error that DCP may have wrapped."""
    inner = getattr(error, "failures", None)
    if inner:
        error = next(iter(inner.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _on_rank_0(values: Mapping[str, Tensor], copy: bool) -> dict[str, Tensor]:
    """Whole tensors on rank 0's CPU, gathered one at a time. `copy`: also of those that are there."""
    found = {}
    for name, value in values.items():
        full = whole(value.detach())
        if process_group.rank() == 0:
            found[name] = full.to("cpu", copy=copy).contiguous()
    return found


def _mine(temporary: Path) -> Iterable[Path]:
    """The files that this rank vouches for."""
    own = [
        path for path in (temporary / STATE).iterdir() if path.name.startswith(f"__{process_group.rank()}_")
    ]
    if process_group.rank() == 0:
        own += [temporary / STATE / ".metadata", *temporary.glob("*.safetensors")]
    return own


def _facts(path: Path) -> list[Any]:
    sync(path)
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def verify(last: Checkpoint) -> None:
    """Raise UserError on every rank unless every file of a checkpoint is as it was written.

    Ranks share out the reading.
    """
    names = sorted(last.meta["files"])
    bad = ""
    for name in names[process_group.rank() :: process_group.world_size()]:
        path = last.folder / name
        if not path.is_file():
            bad = bad or f"{path} is missing"
        elif _facts(path) != last.meta["files"][name]:
            bad = bad or f"{path} is not what was written ({path.stat().st_size} bytes)"
    if found := [reason for reason in process_group.gather_objects(bad) if reason]:
        raise UserError(f"{found[0]}; delete {last.folder} to go on from the checkpoint before it")


def read(last: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's state by name, whole, on the CPU of this process alone."""
    reader = FileSystemReader(last.folder / STATE)
    tensors = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in reader.read_metadata().state_dict_metadata.items()
        if isinstance(facts, TensorStorageMetadata)
    }
    with _alone_is_fine():
        dcp_load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def load(last: Checkpoint, prefix: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the network `prefix` and its optimizer's memory back, whatever the number of ranks was or is.

    Raises UserError where names or shapes differ from what the network has.
    """
    reader = FileSystemReader(last.folder / STATE)
    stored = reader.read_metadata().state_dict_metadata
    tensors = network_tensors(prefix, module)
    memory: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, parameter in module.named_parameters():
        start = f"optim.{prefix}.{name}."
        for key, facts in stored.items():
            if key.startswith(start) and "." not in key.removeprefix(start):
                assert isinstance(facts, TensorStorageMetadata)
                slot = _slot(parameter, facts)
                memory.setdefault(parameter, {})[key.removeprefix(start)] = tensors[key] = slot
    expected = {key for key in stored if key.startswith((f"{prefix}.", f"optim.{prefix}."))}
    if odd := sorted(expected ^ set(tensors)):
        raise UserError(f"{last.folder}: {odd[0]} is in the checkpoint or in the network, not in both")
    with _alone_is_fine():
        dcp_load(tensors, storage_reader=reader, no_dist=not process_group.joined())
    # Fused kernels want their step counters beside the parameters; others, on the host.
    beside = {p for g in optimizer.param_groups if g.get("fused") or g.get("capturable") for p in g["params"]}
    for parameter, values in memory.items():
        if parameter in beside and "step" in values:
            values["step"] = values["step"].to(parameter.device, torch.float32)
        optimizer.state[parameter] = values


def _slot(parameter: nn.Parameter, facts: TensorStorageMetadata) -> Tensor:
    """Room for one tensor of an optimizer's memory, sharded as its parameter where it has its shape."""
    if facts.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=facts.properties.dtype, requires_grad=False)
    device = parameter.device if facts.size.numel() > 1 else "cpu"  # step counters stay on the host
    return torch.zeros(facts.size, dtype=facts.properties.dtype, device=device)
