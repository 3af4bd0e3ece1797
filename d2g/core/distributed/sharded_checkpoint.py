"""Checkpoints of a run on many processes: each rank writes its shards, and any number of ranks can read them.

RUN/checkpoints/000012800/state/            torch.distributed.checkpoint: weights and optimizer states
RUN/checkpoints/000012800/ema.safetensors   averaged weights, not sharded, for sampling
RUN/checkpoints/000012800/meta.json         images, steps, networks, size and sha256 of every file

The folder has a temporary name until all files are synced: a folder whose name is a number is complete.
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
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from d2g.core.atomic_files import fsync_path, share_weights
from d2g.core.distributed import process_group
from d2g.core.distributed.checkpoint import Checkpoint, discard, latest, prune, remedy
from d2g.core.distributed.checkpoint_index import DATA_FILE, INDEX, SafeReader
from d2g.core.distributed.engine import full_tensor
from d2g.core.distributed.low_memory_adamw import empty_moment
from d2g.core.errors import UserError

STATE = "state"
T = TypeVar("T")


def network_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of a network by `prefix.name`; sharded ones are DTensors."""
    return {f"{prefix}.{name}": value.detach() for name, value in module.state_dict().items()}


def optimizer_tensors(prefix: str, optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Optimizer states by `prefix.parameter.key`. Learning rates and betas come from the config."""
    return {
        f"{prefix}.{name}.{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


@dataclass
class Writer:
    """Writes a run's checkpoints, one at a time. Call every method on every rank.

    keep: number of newest checkpoints to keep, besides those whose names are in `spare`.
    background: write copies of the tensors while training continues.
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
        """Write a checkpoint, or start to with `background`.

        tensors: what each rank holds, sharded or not. files: state dicts that rank 0 writes as one
        NAME.safetensors each. Raises UserError on every rank when one of them cannot write; earlier
        checkpoints stay.
        """
        self.finish()
        temporary = self.folder / f".{nimg:09d}.tmp"
        target = self.folder / f"{nimg:09d}"
        gathered = {name: _on_rank_0(values, self.background) for name, values in files.items()}
        with _FailTogether(temporary, target, self.folder):
            if process_group.rank() == 0:
                # Remove what killed writers have left. A run has one writer.
                for leftover in self.folder.glob(".*.tmp"):
                    shutil.rmtree(leftover)
                (temporary / STATE).mkdir(parents=True)
        with _FailTogether(temporary, target, self.folder):
            writer = FileSystemWriter(temporary / STATE)
            # Copies on the CPU need no copying ahead, which would wait for all that training has queued.
            if self.background:
                writer.per_thread_copy_ahead = 0
            writing = self._write(dict(tensors), writer)
            future = self._submit(lambda: _complete(writing, gathered, temporary))
        self._pending = (target, {**meta, "nimg": nimg, "processes": process_group.world_size()}, future)
        if not self.background:
            self.finish()

    def _submit(self, work: Callable[[], T]) -> "Future[T]":
        """Run `work` in the writer's thread with `background`, else now."""
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
        # Use a process group of its own, so that its messages do not mix with those of the gradients.
        writing = async_save(tensors, storage_writer=writer, process_group=process_group.side_group())
        assert isinstance(writing, Future)
        return writing

    @property
    def done(self) -> bool:
        """Whether this rank is not writing a checkpoint."""
        return self._pending is None or self._pending[2].done()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and give it its name."""
        if self._pending is None:
            return
        target, meta, future = self._pending
        self._pending = None
        temporary = target.with_name(f".{target.name}.tmp")
        # Wait for this rank's files; then collect size and sha256 of the files of all ranks.
        own_files: dict[str, list[Any]] = {}
        with _FailTogether(temporary, target, self.folder):
            own_files = future.result()
        parts = process_group.gather_objects(own_files)
        files = {name: facts for part in parts for name, facts in part.items()}
        with _FailTogether(temporary, target, self.folder):
            # Rank 0 writes meta.json after every file of every rank is synced.
            if process_group.rank() == 0:
                meta_file = temporary / "meta.json"
                meta_file.write_text(json.dumps({**meta, "files": files}, indent=1), encoding="utf-8")
                for path in (meta_file, temporary / STATE, temporary):
                    fsync_path(path)
                # Give the folder its name. A resumed run may write the same point again.
                if target.exists():
                    discard(target)
                os.replace(temporary, target)
                fsync_path(self.folder)
                prune(self.folder, self.keep, self.spare)


class _FailTogether:
    """An error on one rank becomes the same UserError on all ranks, and the temporary folder is removed."""

    def __init__(self, temporary: Path, target: Path, folder: Path) -> None:
        self.temporary, self.target, self.folder = temporary, target, folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, Exception | CheckpointException):
            return  # Ctrl-C. CheckpointException is no Exception either, but all ranks get it
        # Every rank learns of every error, and raises the first one.
        reasons = [
            reason
            for reason in process_group.gather_objects(None if error is None else _reason(error))
            if reason
        ]
        if not reasons:
            return
        # Remove the incomplete folder, and name the checkpoint that a rerun continues from.
        if process_group.rank() == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
        last = latest(self.folder)
        last_good = (
            f"the last good checkpoint is {last.folder}" if last else "no checkpoint was written before"
        )
        raise UserError(
            f"cannot write checkpoint {self.target}: {reasons[0]}; {last_good}; "
            "free space, then run the same command again"
        ) from error


def _complete(
    writing: "Future[Any]", files: Mapping[str, dict[str, Tensor]], temporary: Path
) -> dict[str, list[Any]]:
    """After DCP has written its files: write the safetensors on rank 0, then sync this rank's files.

    Returns size and sha256 of each of this rank's files by name.
    """
    writing.result()
    for name, values in files.items() if process_group.rank() == 0 else ():
        save_file(values, temporary / f"{name}.safetensors")
        share_weights(temporary)
    return {str(path.relative_to(temporary)): _facts(path) for path in _own_files(temporary)}


def _save(tensors: dict[str, Tensor], writer: FileSystemWriter) -> None:
    with _without_dcp_warnings():
        dcp_save(tensors, storage_writer=writer, no_dist=not process_group.joined())


@contextmanager
def _without_dcp_warnings() -> Iterator[None]:
    """Silence DCP's warnings about a missing process group, which it prints even with `no_dist`, and, in
    torch 2.9, about its own use of typed storages."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        yield


def _reason(error: BaseException) -> str:
    """The first line of an error's text; DCP may have wrapped the error."""
    inner = getattr(error, "failures", None)
    if inner:
        error = next(iter(inner.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _on_rank_0(values: Mapping[str, Tensor], copy: bool) -> dict[str, Tensor]:
    """Full tensors on rank 0's CPU, gathered one at a time. `copy`: copy CPU tensors too."""
    tensors = {}
    for name, value in values.items():
        full = full_tensor(value.detach())
        if process_group.rank() == 0:
            tensors[name] = full.to("cpu", copy=copy).contiguous()
    return tensors


def _own_files(temporary: Path) -> Iterable[Path]:
    """The files that this rank has written."""
    own = [
        path for path in (temporary / STATE).iterdir() if path.name.startswith(f"__{process_group.rank()}_")
    ]
    if process_group.rank() == 0:
        own += [temporary / STATE / ".metadata", *temporary.glob("*.safetensors")]
    return own


def _facts(path: Path) -> list[Any]:
    """Sync a file; return its size and sha256."""
    fsync_path(path)
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def verify(last: Checkpoint) -> None:
    """Raise UserError on every rank unless every file of a checkpoint is as it was written.

    Each rank reads a part of the files. A file that meta.json does not list is refused like a changed one.
    """
    files = last.meta.get("files")
    listed: Mapping[str, Any] = files if isinstance(files, dict) else {}
    names = sorted({*listed, *_present(last.folder), f"{STATE}/{INDEX}"})
    bad = ""
    for name in names[process_group.rank() :: process_group.world_size()]:
        path = last.folder / name
        if name not in listed:
            bad = bad or f"{path} is not in the list of files in {last.folder / 'meta.json'}"
        elif not path.is_file():
            bad = bad or f"{path} is missing"
        elif _facts(path) != listed[name]:
            bad = bad or f"{path} is not what was written ({path.stat().st_size} bytes)"
    if reasons := [reason for reason in process_group.gather_objects(bad) if reason]:
        raise UserError(f"{reasons[0]}; {remedy(last.folder)}")


def _present(folder: Path) -> list[str]:
    """The files in a checkpoint's folder that a resumed run may read."""
    state = folder / STATE
    data = [path.name for path in state.iterdir()] if state.is_dir() else []
    return [f"{STATE}/{name}" for name in data if DATA_FILE.fullmatch(name)] + [
        path.name for path in folder.glob("*.safetensors")
    ]


def read(last: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's state by name, not sharded, on this process's CPU."""
    reader = SafeReader(last.folder / STATE)
    tensors = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in reader.read_metadata().state_dict_metadata.items()
        if isinstance(facts, TensorStorageMetadata)
    }
    with _without_dcp_warnings():
        dcp_load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def load(last: Checkpoint, prefix: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the network `prefix` and its optimizer's states. The number of ranks may differ from that of the
    run that wrote them. Raises UserError where names differ from the network's.
    """
    reader = SafeReader(last.folder / STATE)
    stored = reader.read_metadata().state_dict_metadata
    tensors = network_tensors(prefix, module)
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    # Allocate a tensor for each stored optimizer state.
    offloaded = {p for g in optimizer.param_groups if g.get("offload") for p in g["params"]}
    for name, parameter in module.named_parameters():
        start = f"optim.{prefix}.{name}."
        for key, facts in stored.items():
            if key.startswith(start) and "." not in key.removeprefix(start):
                assert isinstance(facts, TensorStorageMetadata)
                slot = _empty_state(parameter, facts, parameter in offloaded)
                states.setdefault(parameter, {})[key.removeprefix(start)] = tensors[key] = slot
    # Names must match in both directions; then fill the tensors of this rank in place.
    expected = {key for key in stored if key.startswith((f"{prefix}.", f"optim.{prefix}."))}
    if unmatched := sorted(expected ^ set(tensors)):
        raise UserError(f"{last.folder}: {unmatched[0]} is in the checkpoint or in the network, not in both")
    with _without_dcp_warnings():
        dcp_load(tensors, storage_reader=reader, no_dist=not process_group.joined())
    # Fused and capturable optimizers need their step counters on the parameters' device, others on the CPU.
    on_device = {
        p for g in optimizer.param_groups if g.get("fused") or g.get("capturable") for p in g["params"]
    }
    for parameter, values in states.items():
        if parameter in on_device and "step" in values:
            values["step"] = values["step"].to(parameter.device, torch.float32)
        optimizer.state[parameter] = values


def _empty_state(parameter: nn.Parameter, facts: TensorStorageMetadata, offload: bool) -> Tensor:
    """An optimizer state to load into, sharded like its parameter; step counters stay on the CPU."""
    if not facts.size and parameter.shape:
        return torch.zeros((), dtype=facts.properties.dtype)
    return empty_moment(parameter, facts.size, facts.properties.dtype, offload)
