"""The pair store: (noise, latent, prompt, index) rows to sharded HDF5 and back. The one door to h5py.

For readers outside this project the format is written down in docs/pair-format.md.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import h5py  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor

from d2g.core import seeds
from d2g.core.config import differing
from d2g.core.errors import UserError
from pairgen.store.hdf5_chunks import Chunks, Descriptor
from pairgen.store.spec import SCHEMA, StoreSpec, create_store, pending, read_spec

__all__ = ["PairBatch", "StoreSpec", "create_store", "pending", "read_spec"]

SEAL = 512  # bytes of the HDF5 user block, where the length and sha256 of the rest of the file stand
CHUNK_BYTES = 1 << 15  # one row of SD 1.5: a chunk is what a random row costs to read
BLOCK_BYTES = 1 << 24  # of latents that `read_blocks` holds at once
UNREADABLE = (OSError, KeyError, ValueError, RuntimeError, TypeError)  # what h5py raises on damaged files


@dataclass(frozen=True, kw_only=True, slots=True)
class PairBatch:
    """Rows: noise and scaled latent [B, C, H, W], B prompts, index [B] int64 (the pairs' numbers).

    A class-conditional teacher's prompts are its class numbers in decimal; an unconditional one's are empty.
    `skipped`: damaged files, and why, whose rows a reader with `skip_bad` replaced here by others.
    """

    noise: Tensor
    latent: Tensor
    prompts: list[str]
    index: Tensor
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> Tensor:
        """The class numbers [B] int64 of a class-conditional teacher's rows."""
        return torch.tensor([int(prompt) for prompt in self.prompts], dtype=torch.int64)

    def pin_memory(self) -> "PairBatch":
        """The same rows in page-locked memory, from which copies to a GPU overlap its work."""
        noise, latent, index = self.noise.pin_memory(), self.latent.pin_memory(), self.index.pin_memory()
        return replace(self, noise=noise, latent=latent, index=index)


class DamagedShard(UserError):
    """A file of a store that cannot be trusted. `reason`: what is wrong, without the file and the remedy."""

    reason: str


def _seal(length: int, sha256: str) -> bytes:
    text = json.dumps({"format": "diffusion2gan-pairs", "bytes": length, "sha256": sha256})
    return text.encode().ljust(SEAL - 1) + b"\n"


def seal_of(head: bytes) -> tuple[int, str]:
    """The length of a file and the sha256 of all after its first 512 bytes; (-1, "") if these say none."""
    try:
        seal = json.loads(head)
        return int(seal["bytes"]), str(seal["sha256"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return -1, ""


def _damaged(path: Path, reason: str) -> DamagedShard:
    folder = path.parent.parent
    return damaged(path, reason, f"run `d2g pairs repair {folder}`, then `d2g pairs generate` again")


def damaged(file: Path | str, reason: str, remedy: str) -> DamagedShard:
    error = DamagedShard(f"{file}: {reason}; {remedy}")
    error.reason = reason
    return error


def _bytes_of(values: Tensor) -> memoryview:
    return np.ascontiguousarray(values.numpy()).data


def encode_rows(spec: StoreSpec, rows: PairBatch, quarantined: Sequence[int] = ()) -> memoryview:
    """One HDF5 file as bytes, in memory: a full disk then meets a plain write, never HDF5 half way.

    `quarantined`: the pairs of this shard that are not among `rows`, because they have no finite latent.
    """
    row_bytes = prod(spec.latent_shape) * np.dtype(spec.dtype).itemsize
    chunks = (max(1, min(len(rows.index), CHUNK_BYTES // row_bytes)), *spec.latent_shape)
    buffer = io.BytesIO()
    # The 1.10 format checksums its metadata; the older default lets a flipped bit there change what is read.
    with h5py.File(buffer, "w", userblock_size=SEAL, libver=("v110", "v110")) as file:
        if spec.noise == "stored":
            _write_values(file, "noise", rows.noise, chunks)
        _write_values(file, "latent", rows.latent, chunks)
        if spec.conditioning == "text":
            _write_prompts(file, [prompt.encode() for prompt in rows.prompts])
        elif spec.conditioning == "label":
            file.create_dataset("label", data=rows.labels.numpy(), maxshape=(None,), fletcher32=True)
        index = rows.index.numpy().astype(np.uint64)
        file.create_dataset("index", data=index, maxshape=(None,), fletcher32=True)
        file.attrs["schema"] = SCHEMA
        file.attrs["spec"] = json.dumps(spec.as_json(), sort_keys=True)
        file.attrs["spec_sha256"] = spec.sha256
        file.attrs["rows"] = len(rows.index)
        file.attrs["quarantined"] = json.dumps(list(quarantined))
        file.attrs["noise_sha256"] = hashlib.sha256(_bytes_of(rows.noise)).hexdigest()
    image = buffer.getbuffer()
    image[:SEAL] = _seal(len(image), hashlib.sha256(image[SEAL:]).hexdigest())
    return image


def _write_values(file: Any, name: str, values: Tensor, chunks: tuple[int, ...]) -> None:
    # maxshape: HDF5 wants it for a dataset without rows, which a shard of quarantined rows has
    shape = (None, *chunks[1:])
    file.create_dataset(name, data=values.numpy(), chunks=chunks, maxshape=shape, fletcher32=True)


def _write_prompts(file: Any, prompts: list[bytes]) -> None:
    # Fixed length: variable-length strings live in HDF5's global heap, which no checksum covers.
    text = h5py.string_dtype("utf-8", max([1, *map(len, prompts)]))
    column = np.array(prompts, dtype=text)
    file.create_dataset("prompt", data=column, maxshape=(None,), fletcher32=True, compression="gzip")


def load_rows(path: Path, spec: StoreSpec) -> PairBatch:
    """All rows of one file in the stored dtype, after every check of `read_blocks`."""
    blocks = list(read_blocks(path, spec))
    return PairBatch(
        noise=torch.cat([block.noise for block in blocks]),
        latent=torch.cat([block.latent for block in blocks]),
        prompts=[prompt for block in blocks for prompt in block.prompts],
        index=torch.cat([block.index for block in blocks]),
    )


def read_blocks(path: Path, spec: StoreSpec) -> Iterator[PairBatch]:
    """The rows of one file in the stored dtype, a few at a time (at least one block, empty for a file without
    rows), with every check: length and sha256 of every byte before the first block, header, finite values,
    and after the last block the noise hash. Raises UserError with the first reason found; index order is the
    caller's.
    """
    noise_sha256 = hashlib.sha256()
    try:
        with path.open("rb") as raw:
            _check_bytes(raw, path)
            raw.seek(0)
            with h5py.File(raw, "r") as file:
                _check_header(file, path, spec)
                for rows in _blocks(file, spec):
                    block = _block(file, spec, rows)
                    for name, values in (("noise", block.noise), ("latent", block.latent)):
                        # NumPy's test: torch's takes ten times as long in float16
                        if not np.isfinite(values.numpy()).all():
                            raise _damaged(path, f"{name} holds values that are not finite")
                    noise_sha256.update(_bytes_of(block.noise))
                    yield block
                expected = file.attrs["noise_sha256"]
    except UNREADABLE as error:
        raise _damaged(path, f"unreadable ({error})") from error
    if noise_sha256.hexdigest() != expected:
        raise _damaged(path, "its noise is not the noise the teacher saw (noise_sha256 differs)")


def _check_bytes(raw: BinaryIO, path: Path) -> None:
    """Length and sha256 of an open file against its first bytes. Raises UserError."""
    head, length = raw.read(SEAL), os.fstat(raw.fileno()).st_size
    if seal_of(head)[0] != length:
        raise _damaged(path, f"truncated or overwritten ({length} bytes)")
    if head != _seal(length, hashlib.file_digest(raw, "sha256").hexdigest()):  # type: ignore[arg-type]
        raise _damaged(path, "damaged (its bytes do not match their sha256)")


def _blocks(file: Any, spec: StoreSpec) -> Iterator[slice]:
    """Runs of rows, whole chunks, about BLOCK_BYTES of latents each; one empty run when there are no rows."""
    latent = file["latent"]
    size = max(1, BLOCK_BYTES // (prod(spec.latent_shape) * latent.dtype.itemsize * latent.chunks[0]))
    size *= latent.chunks[0]
    for start in range(0, max(1, len(latent)), size):
        yield slice(start, start + size)


def _block(file: Any, spec: StoreSpec, rows: slice) -> PairBatch:
    index = file["index"][rows].astype(np.int64)
    noise = torch.from_numpy(file["noise"][rows]) if "noise" in file else redraw(spec, index)
    latent, prompts = torch.from_numpy(file["latent"][rows]), _prompts_of(file, spec, rows)
    return PairBatch(noise=noise, latent=latent, prompts=prompts, index=torch.from_numpy(index))


def _prompts_of(file: Any, spec: StoreSpec, rows: slice) -> list[str]:
    if spec.conditioning == "text":
        return [text.decode() for text in file["prompt"][rows]]
    if spec.conditioning == "label":
        return [str(number) for number in file["label"][rows]]
    return [""] * len(file["index"][rows])


def redraw(spec: StoreSpec, index: Iterable[int]) -> Tensor:
    """The noise of these pairs, drawn again from (seed, index), in the stored dtype."""
    return seeds.noise(spec.seed, index, spec.latent_shape, spec.torch_dtype)


def _check_header(file: Any, path: Path, spec: StoreSpec) -> None:
    """Attributes and dataset shapes against `spec`. Raises UserError naming the file and the key."""
    if file.attrs["spec_sha256"] != spec.sha256:
        names = differing(spec.as_json(), json.loads(file.attrs["spec"])) or ["spec_sha256"]
        raise _damaged(path, f"made with another spec: {', '.join(names)}")
    rows = int(file.attrs["rows"])
    expected: dict[str, tuple[int, ...]] = {"latent": (rows, *spec.latent_shape), "index": (rows,)}
    if spec.conditioning != "none":
        expected["prompt" if spec.conditioning == "text" else "label"] = (rows,)
    if spec.noise == "stored":
        expected["noise"] = expected["latent"]
    for name, shape in expected.items():
        if file[name].shape != shape:
            raise _damaged(path, f"dataset {name} is {file[name].shape}, its header says {shape}")
        if name in ("noise", "latent") and file[name].dtype != np.dtype(spec.dtype):
            raise _damaged(path, f"dataset {name} is {file[name].dtype}, its header says {spec.dtype}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardMap:
    """Where a whole shard's rows lie, once its header and its index are found to be right."""

    quarantined: tuple[int, ...]
    values: dict[str, Chunks]  # "latent", and "noise" where it is stored
    column: Chunks | None  # of what the pairs are conditioned on
    column_type: np.dtype[Any]


def check_seal(path: Path) -> int:
    """The length of a file, which must be what its first 512 bytes say. Raises DamagedShard."""
    try:
        return _check_length(Descriptor(path), path)
    except OSError as error:
        raise _damaged(path, f"unreadable ({error.strerror})") from error


def _check_length(file: Descriptor, path: Path) -> int:
    length, size = seal_of(os.pread(file.number, SEAL, 0))[0], os.fstat(file.number).st_size
    if length != size:
        raise _damaged(path, f"truncated or overwritten ({size} bytes, its header says {length})")
    return size


def quarantined_in(path: Path) -> list[int]:
    """The pairs that a shard's header sets aside. Raises DamagedShard."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _aside(file)
    except UNREADABLE as error:
        raise _damaged(path, f"unreadable ({error})") from error


def _aside(file: Any) -> list[int]:
    return [int(number) for number in json.loads(file.attrs["quarantined"])]


def map_shard(descriptor: Descriptor, path: Path, spec: StoreSpec, shard: int) -> ShardMap:
    """Check the length, header and index of a shard just opened, and find its chunks. Raises DamagedShard.

    HDF5 reads through `descriptor`, so that what was checked is what will be read. `path` is for messages.
    """
    rows = spec.rows(shard)
    try:
        _check_length(descriptor, path)
        with io.FileIO(descriptor.number, closefd=False) as raw, h5py.File(raw, "r") as file:
            _check_header(file, path, spec)
            aside = _aside(file)
            expected = np.setdiff1d(np.arange(rows.start, rows.stop), aside)
            if not np.array_equal(file["index"][:].astype(np.int64), expected):
                without = f" without {len(aside)} quarantined ones" if aside else ""
                what = f"index is not {rows.start} to {rows.stop - 1}{without}, as its name says"
                raise _damaged(path, what)
            names = ["latent", *(["noise"] if spec.noise == "stored" else [])]
            column = {"text": "prompt", "label": "label", "none": None}[spec.conditioning]
            base = _base(descriptor, file["index"]) if len(expected) else 0
            return ShardMap(
                quarantined=tuple(aside),
                values={name: _chunks_of(file[name], base) for name in names},
                column=None if column is None else _chunks_of(file[column], base),
                column_type=np.dtype("i8" if column is None else file[column].dtype),
            )
    except UNREADABLE as error:
        raise _damaged(path, f"unreadable ({error})") from error


def _base(descriptor: Descriptor, dataset: Any) -> int:
    """What to add to the places HDF5 reports: before 1.14.4 it counted from the end of the user block."""
    place, stored = dataset.id.get_chunk_info(0), dataset.id.read_direct_chunk((0,))[1]
    for base in (0, SEAL):
        if os.pread(descriptor.number, place.size, place.byte_offset + base) == stored:
            return base
    raise OSError("its chunks are not where its header says")


def _chunks_of(dataset: Any, base: int) -> Chunks:
    """Where a dataset's chunks lie. Raises ValueError for one that this project's writer cannot have made."""
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(number)[0] for number in range(plist.get_nfilters())]
    deflated = filters == [h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32]
    rows, found = dataset.chunks[0], list[Any]()
    dataset.id.chunk_iter(found.append)
    found.sort(key=itemgetter(0))  # (coordinates, filters left out, place, size)
    count, size = -(-dataset.shape[0] // rows), rows * prod(dataset.shape[1:]) * dataset.dtype.itemsize + 4
    regular = [chunk[0][0] for chunk in found] == list(range(0, count * rows, rows))
    as_written = all(chunk[1] == 0 and (deflated or chunk[3] == size) for chunk in found)
    if not (regular and as_written and (deflated or filters == [h5py.h5z.FILTER_FLETCHER32])):
        raise ValueError(f"dataset {dataset.name} is not chunked and checksummed as written")
    return Chunks.of(rows, deflated, [chunk[2] + base for chunk in found], [chunk[3] for chunk in found])
