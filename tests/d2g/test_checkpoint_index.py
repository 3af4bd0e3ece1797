"""d2g.core.distributed.checkpoint_index: an untrusted index runs no code, allocates no large memory and reads
no file outside its folder.
"""

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from d2g.core.distributed import checkpoint, sharded_checkpoint
from d2g.core.distributed.checkpoint_index import read_index
from d2g.core.errors import UserError


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The `state` folder of a small checkpoint."""
    tensors = {"net.weight": torch.arange(12.0).view(3, 4), "net.step": torch.tensor(3)}
    sharded_checkpoint.Writer(tmp_path).save(8, tensors, {"ema": tensors}, {"steps": 1})
    return tmp_path / "000000008" / "state"


class CallOnUnpickling:
    """An object whose unpickling calls a function."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def update_digests(state: Path) -> None:
    """Write the digests of the current files into meta.json, as an attacker would."""
    meta_file = state.parent / "meta.json"
    meta = json.loads(meta_file.read_text())
    meta["files"] = {name: sharded_checkpoint._facts(state.parent / name) for name in meta["files"]}
    meta_file.write_text(json.dumps(meta))


def test_index_equals_the_one_that_torch_reads(state: Path) -> None:
    ours, theirs = read_index(state), FileSystemReader(state).read_metadata()
    assert ours.storage_data == theirs.storage_data and ours.planner_data == theirs.planner_data
    assert ours.version == theirs.version
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for name, tensor in ours.state_dict_metadata.items():
        expected = theirs.state_dict_metadata[name]
        assert isinstance(tensor, TensorStorageMetadata) and isinstance(expected, TensorStorageMetadata)
        assert (tensor.size, tensor.chunks) == (expected.size, expected.chunks)
        assert tensor.properties.dtype == expected.properties.dtype


@pytest.mark.parametrize("call", [os.mkdir, eval, open])
@pytest.mark.parametrize("place", ["everything", "version", "planner", "key", "dtype"])
def test_a_pickle_payload_does_not_run(
    call: Callable[..., Any], place: str, state: Path, tmp_path: Path
) -> None:
    created = tmp_path / "ran"
    arguments: dict[Callable[..., Any], tuple[str, ...]] = {
        os.mkdir: (str(created),),
        eval: (f"__import__('os').mkdir({str(created)!r})",),
        open: (str(created), "w"),
    }
    payload: Any = CallOnUnpickling(call, *arguments[call])
    metadata = FileSystemReader(state).read_metadata()
    if place == "everything":
        metadata = payload
    elif place == "version":
        metadata.version = payload
    elif place == "planner":
        metadata.planner_data = {"net.weight": payload}
    elif place == "key":
        metadata.storage_data[payload] = None
    else:
        metadata.state_dict_metadata["net.weight"].size = payload  # type: ignore[union-attr]
    (state / ".metadata").write_bytes(pickle.dumps(metadata))
    update_digests(state)
    last = checkpoint.open_checkpoint(state.parent)
    sharded_checkpoint.verify(last)
    with pytest.raises(UserError, match=r"which no checkpoint needs\); delete .*000000008 to continue"):
        sharded_checkpoint.read(last)
    assert not created.exists()


def test_bytes_entries_of_a_data_file_are_refused(state: Path) -> None:
    """torch reads entries that are not tensors with an unrestricted `torch.load`."""
    metadata: Metadata = FileSystemReader(state).read_metadata()
    metadata.state_dict_metadata["net.weight"] = BytesStorageMetadata()
    (state / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="BytesStorageMetadata, which no checkpoint needs"):
        read_index(state)


def test_a_pickle_cannot_change_classes_of_this_process(state: Path) -> None:
    """The pickle opcode BUILD sets attributes of the object that find_class returns."""
    target = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    (state / ".metadata").write_bytes(b"\x80\x02" + target + b"(N}X\x05\x00\x00\x00ownedK\x01stb.")
    with pytest.raises(UserError, match="is damaged or not a checkpoint's index"):
        read_index(state)
    assert not hasattr(Metadata, "owned")


@pytest.mark.parametrize(
    "case", ["outside", "missing file", "huge", "huge chunk", "beyond", "negative", "put"]
)
def test_the_index_is_checked_against_the_files(case: str, state: Path) -> None:
    metadata: Any = FileSystemReader(state).read_metadata()
    weight = metadata.state_dict_metadata["net.weight"]
    location = next(v for k, v in metadata.storage_data.items() if k.fqn == "net.weight")
    if case == "outside":
        location.relative_path = "../../../../etc/passwd"
    elif case == "missing file":
        location.relative_path = "__7_0.distcp"
    elif case == "huge":
        weight.size = torch.Size([10**9, 10**6])
    elif case == "huge chunk":
        weight.size = weight.chunks[0].sizes = torch.Size([10**9, 10**6])
    elif case == "beyond":
        location.length = 1 << 40
    elif case == "negative":
        weight.size = torch.Size([-3, -4])
    data = pickle.dumps(metadata)
    if case == "put":
        data = b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b"."
    (state / ".metadata").write_bytes(data)
    with pytest.raises(UserError, match="is damaged or not a checkpoint's index"):
        read_index(state)


@pytest.mark.parametrize("files", [[], {}, None, 3, {"ema.safetensors": None}, "state"])
def test_an_invalid_list_of_files_does_not_disable_the_check(files: object, state: Path) -> None:
    meta_file = state.parent / "meta.json"
    meta_file.write_text(json.dumps({**json.loads(meta_file.read_text()), "files": files}))
    with pytest.raises(UserError, match=r"is not in the list of files in|is not what was written"):
        sharded_checkpoint.verify(checkpoint.open_checkpoint(state.parent))


def test_changed_bytes_are_an_error_or_have_no_effect(state: Path) -> None:
    metadata, random_ = (state / ".metadata").read_bytes(), random.Random(0)
    for _ in range(150):
        data = bytearray(metadata)
        for _ in range(random_.choice([1, 1, 2, 8])):
            data[random_.randrange(len(data))] = random_.randrange(256)
        if random_.random() < 0.2:
            del data[random_.randrange(len(data)) :]
        (state / ".metadata").write_bytes(data)
        try:
            read_index(state)
        except UserError as error:
            assert "\n" not in str(error)
