"""Reading the index of a sharded checkpoint, `state/.metadata`, without executing what a stranger put there.

torch.distributed.checkpoint writes the index as a pickle and reads it with `pickle.load`, which runs code.
Here only the records of an index are read, as plain values; the index is then built anew from checked values.
"""

import io
import math
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from d2g.core.errors import UserError
from d2g.core.machine_errors import raise_machine_error

INDEX = ".metadata"
_PACKAGE = "torch.distributed.checkpoint"
_RECORDS = {
    (f"{_PACKAGE}.metadata", "Metadata"),
    (f"{_PACKAGE}.metadata", "TensorStorageMetadata"),
    (f"{_PACKAGE}.metadata", "TensorProperties"),
    (f"{_PACKAGE}.metadata", "ChunkStorageMetadata"),
    (f"{_PACKAGE}.metadata", "MetadataIndex"),
    (f"{_PACKAGE}.metadata", "StorageMeta"),
    (f"{_PACKAGE}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_PACKAGE}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}
"""The classes and functions that an index names. Each is read as a `_Record` and is never called."""

DATA_FILE = re.compile(r"__\d+_\d+\.distcp")
"""Names of the files that hold the tensors, in the folder of the index."""


class _Record:
    """A pickled object of the index: the class's name, its arguments and its state."""

    name = ""
    state: Any = None

    def __new__(cls, *arguments: Any) -> "_Record":
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        """Arguments are not needed: the records that are used have a state."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles records, sizes and dtypes; refuses every other name."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        # Classes of this file alone: a pickle can set attributes of the classes that it gets.
        self._records: dict[tuple[str, str], type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if (module, name) not in _RECORDS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        key = (module, name)
        if key not in self._records:
            self._records[key] = type(name, (_Record,), {"name": name})
        return self._records[key]


class SafeReader(FileSystemReader):
    """torch's reader of a `state` folder, with an index that is checked against the folder's files."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index. Raises UserError if it is damaged or names anything but tensors in this folder."""
        metadata = read_index(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def read_index(folder: Path) -> Metadata:
    """The index of the checkpoint in a `state` folder, built from checked values.

    Every tensor lies in files of the folder, within their sizes, and needs no more memory than its file has
    bytes. Raises UserError otherwise.
    """
    path = folder / INDEX
    try:
        data = path.read_bytes()
        for opcode, argument, _ in pickletools.genops(data):
            # These reserve memory for as many values as they say. No writer of an index uses them.
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(str(argument)) > len(data):
                raise pickle.UnpicklingError(f"{opcode.name} {argument} in {len(data)} bytes")
        return _metadata(_IndexUnpickler(data).load(), folder)
    except Exception as error:  # the unpickler raises almost any error on damaged bytes
        raise_machine_error(error)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is damaged or not a checkpoint's index ({reason}); "
            f"delete {folder.parent} to continue from the checkpoint before it"
        ) from error


def _metadata(record: Any, folder: Path) -> Metadata:
    """Build the index from its record. Raises ValueError for what does not agree."""
    state = _state(record, "Metadata")
    lengths = {path.name: path.stat().st_size for path in folder.iterdir() if DATA_FILE.fullmatch(path.name)}
    storage = {
        _position(position): _location(location, lengths)
        for position, location in _mapping(state["storage_data"]).items()
    }
    tensors = {_text(name): _tensor(facts) for name, facts in _mapping(state["state_dict_metadata"]).items()}
    for name, tensor in tensors.items():
        itemsize, available = tensor.properties.dtype.itemsize, 0
        for chunk in tensor.chunks:
            # torch.save writes at least the bytes of a chunk: a longer one would only reserve memory.
            size = math.prod(chunk.sizes)
            location = storage.get(MetadataIndex(name, chunk.offsets))
            if location is None or (size * itemsize > location.length):
                raise ValueError(f"{name} says {size} values, more than its file holds")
            available += size
        if math.prod(tensor.size) > available:
            raise ValueError(f"{name} has shape {tuple(tensor.size)}, its parts hold {available} values")
    version = state.get("version")
    planner: dict[str, tuple[str]] = {name: (name,) for name in tensors}
    return Metadata(tensors, planner, storage, version=version if isinstance(version, str) else None)  # type: ignore[arg-type]


def _tensor(record: Any) -> TensorStorageMetadata:
    state = _state(record, "TensorStorageMetadata")
    dtype, *_ = _state(state["properties"], "TensorProperties", tuple)
    if not isinstance(dtype, torch.dtype) or not isinstance(state["chunks"], list):
        raise ValueError("a tensor has no dtype or no parts")
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in state["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype),
        _sizes(state["size"]),
        [ChunkStorageMetadata(_sizes(chunk["offsets"]), _sizes(chunk["sizes"])) for chunk in chunks],
    )


def _position(record: Any) -> MetadataIndex:
    state = _state(record, "MetadataIndex")
    index = state.get("index")
    return MetadataIndex(
        _text(state["fqn"]), _sizes(state["offset"]), index if isinstance(index, int) else None
    )


def _location(record: Any, lengths: dict[str, int]) -> _StorageInfo:
    state = _state(record, "_StorageInfo")
    name, (offset, length) = _text(state["relative_path"]), _sizes((state["offset"], state["length"]))
    if state.get("transform_descriptors") or offset + length > lengths.get(name, 0):
        raise ValueError(f"{name} is missing, shorter than the index says, or transformed")
    return _StorageInfo(name, offset, length)


def _state(record: Any, name: str, kind: type[Any] = dict) -> Any:
    if not isinstance(record, _Record) or record.name != name or not isinstance(record.state, kind):
        raise ValueError(f"expected {name}, got {type(record).__name__}")
    return record.state


def _mapping(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a dict, got {type(value).__name__}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a name, got {type(value).__name__}")
    return value


def _sizes(value: Any) -> torch.Size:
    """Non-negative sizes below 2**63."""
    if not isinstance(value, tuple) or not all(type(v) is int and 0 <= v < 2**63 for v in value):
        raise ValueError("sizes and offsets are not whole numbers")
    return torch.Size(value)
