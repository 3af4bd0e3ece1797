"""Encoding and decoding shards: (noise, latents, prompt, index) rows in HDF5.

docs/pair-format.md documents the format for readers outside this project. `hdf5_structure` decides what
a shard may hold. Only these two files import h5py.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import h5py  # type: ignore[import-untyped]
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2g.core import seeds
from d2g.core.config import digest
from d2g.core.errors import UserError
from d2g.core.machine_errors import raise_machine_error
from d2g.core.regular_files import open_regular, require_regular
from pairgen.store.hdf5_structure import attribute, check_structure, check_texts
from pairgen.store.spec import SCHEMA, StoreSpec, create_store, differing_from_earlier, pending, read_spec

__all__ = ["PairBatch", "StoreSpec", "create_store", "pending", "read_spec"]

USER_BLOCK_BYTES = 512
"""Size of the HDF5 user block, which holds the file's length and the sha256 of the rest."""
CHUNK_BYTES = 1 << 15  # one row of SD 1.5: reading a random row reads a whole chunk
BLOCK_BYTES = 1 << 24  # latents per block of `read_blocks`
CACHE_BYTES = 4 * CHUNK_BYTES  # of HDF5's chunk cache, per dataset
HINT_BYTES = 1 << 17  # Linux reads ahead at most its window, 128 KiB unless set otherwise, per call
UNREADABLE = (
    *(OSError, KeyError, ValueError, RuntimeError, TypeError),
    *(MemoryError, OverflowError, AttributeError),
)  # what h5py, or reading what it returns, raises on damaged files

IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairBatch:
    """B pairs: noise and scaled latents [B, C, H, W], B prompts, and pair indices [B] int64.

    The prompts of a class-conditional teacher are class labels in decimal, those of an unconditional one are
    empty. `skipped`: damaged file -> reason, for files whose rows a reader with `skip_bad` replaced here.
    """

    noise: Tensor
    latents: Tensor
    prompts: list[str]
    index: Tensor
    skipped: Mapping[str, str] = field(default_factory=dict)
    condition: Tensor | None = None
    """Latents [B, C', h', w'] of the stage before that the rows are conditioned on; None: no such stage."""

    @property
    def labels(self) -> Tensor:
        """Class labels [B] int64 of a class-conditional teacher's rows."""
        return torch.tensor([int(prompt) for prompt in self.prompts], dtype=torch.int64)

    def pin_memory(self) -> "PairBatch":
        """The same rows in page-locked memory, for copies to a GPU that overlap with its work."""
        noise, latents, index = self.noise.pin_memory(), self.latents.pin_memory(), self.index.pin_memory()
        condition = None if self.condition is None else self.condition.pin_memory()
        return replace(self, noise=noise, latents=latents, index=index, condition=condition)


class DamagedShard(UserError):
    """A damaged file of a store. `reason`: what is wrong, without the file's name and the remedy."""

    reason: str


def _user_block(length: int, sha256: str) -> bytes:
    text = json.dumps({"format": "diffusion2gan-pairs", "bytes": length, "sha256": sha256})
    return text.encode().ljust(USER_BLOCK_BYTES - 1) + b"\n"


def parse_user_block(head: bytes) -> tuple[int, str]:
    """Parse a file's first 512 bytes: its length and the sha256 of the rest; (-1, "") if they are damaged."""
    try:
        facts = json.loads(head)
        return int(facts["bytes"]), str(facts["sha256"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return -1, ""


def _damaged(path: Path, reason: str) -> DamagedShard:
    folder = path.parent.parent
    return damage_error(path, reason, f"run `d2g pairs repair {folder}`, then `d2g pairs generate` again")


def damage_error(file: Path | str, reason: str, remedy: str) -> DamagedShard:
    """Build the error: one line with file, reason and remedy."""
    error = DamagedShard(f"{file}: {reason}; {remedy}")
    error.reason = reason
    return error


def _bytes_of(values: Tensor) -> memoryview:
    return np.ascontiguousarray(values.numpy()).data


def encode_rows(spec: StoreSpec, rows: PairBatch, quarantined: Sequence[int] = ()) -> memoryview:
    """Encode rows as the bytes of one HDF5 file. In memory, so that a full disk cannot leave half a file.

    `quarantined`: the pairs of this shard that `rows` lacks because their latents are not finite.
    """
    # A chunk holds as many rows as fit CHUNK_BYTES, so that a random row costs one small read.
    row_bytes = prod(spec.latent_shape) * np.dtype(spec.dtype).itemsize
    chunks = (max(1, min(len(rows.index), CHUNK_BYTES // row_bytes)), *spec.latent_shape)
    buffer = io.BytesIO()
    # The 1.10 format has checksums for its metadata; in older formats a flipped bit can change what is read.
    with h5py.File(buffer, "w", userblock_size=USER_BLOCK_BYTES, libver=("v110", "v110")) as file:
        if spec.noise == "stored":
            _write_values(file, "noise", rows.noise, chunks)
        _write_values(file, "latent", rows.latents, chunks)
        if rows.condition is not None:
            _write_values(file, "condition", rows.condition, (chunks[0], *rows.condition.shape[1:]))
        if spec.conditioning == "text":
            _write_prompts(file, [prompt.encode() for prompt in rows.prompts])
        elif spec.conditioning == "label":
            file.create_dataset("label", data=rows.labels.numpy(), maxshape=(None,), fletcher32=True)
        index = rows.index.numpy().astype(np.uint64)
        file.create_dataset("index", data=index, maxshape=(None,), fletcher32=True)
        # The attributes suffice to check the file and to read it without store.json.
        file.attrs["schema"] = SCHEMA
        file.attrs["spec"] = json.dumps(spec.as_json(), sort_keys=True)
        file.attrs["spec_sha256"] = spec.sha256
        file.attrs["rows"] = len(rows.index)
        file.attrs["quarantined"] = json.dumps(list(quarantined))
        file.attrs["noise_sha256"] = hashlib.sha256(_bytes_of(rows.noise)).hexdigest()
    # The first 512 bytes hold length and sha256 of the rest.
    image = buffer.getbuffer()
    image[:USER_BLOCK_BYTES] = _user_block(len(image), hashlib.sha256(image[USER_BLOCK_BYTES:]).hexdigest())
    return image


def _write_values(file: Any, name: str, values: Tensor, chunks: tuple[int, ...]) -> None:
    # maxshape: HDF5 needs it for a dataset without rows, as in a shard whose rows are all quarantined.
    shape = (None, *chunks[1:])
    file.create_dataset(name, data=values.numpy(), chunks=chunks, maxshape=shape, fletcher32=True)


def _write_prompts(file: Any, prompts: list[bytes]) -> None:
    # Fixed length: variable-length strings live in HDF5's global heap, which no checksum covers.
    text = h5py.string_dtype("utf-8", max([1, *map(len, prompts)]))
    column = np.array(prompts, dtype=text)
    file.create_dataset("prompt", data=column, maxshape=(None,), fletcher32=True, compression="gzip")


def load_rows(path: Path, spec: StoreSpec) -> PairBatch:
    """Read all rows of one file in the stored type, with all checks of `read_blocks`."""
    blocks = list(read_blocks(path, spec))
    return PairBatch(
        noise=torch.cat([block.noise for block in blocks]),
        latents=torch.cat([block.latents for block in blocks]),
        prompts=[prompt for block in blocks for prompt in block.prompts],
        index=torch.cat([block.index for block in blocks]),
        condition=join_conditions([block.condition for block in blocks]),
    )


def join_conditions(conditions: Sequence[Tensor | None]) -> Tensor | None:
    """The conditions of several batches, one after the other; None if the batches have none."""
    present = [condition for condition in conditions if condition is not None]
    return torch.cat(present) if present else None


def read_blocks(path: Path, spec: StoreSpec) -> Iterator[PairBatch]:
    """Yield the rows of one file in the stored type, block by block; one empty block for a file without rows.

    Checks length, sha256 of all bytes and header before the first block, finite values in each block, and
    the noise hash after the last one. Raises DamagedShard with the first fault. The caller checks `index`.
    """
    noise_sha256 = hashlib.sha256()
    try:
        with open_regular(path) as raw:
            # Bytes, then header, then rows: a fault is reported by the first check that can see it.
            _check_bytes(raw, path)
            raw.seek(0)
            with h5py.File(raw, "r") as file:
                check_texts(raw.fileno(), file)
                _check_header(file, path, spec)
                for rows in _blocks(file, spec):
                    block = _block(file, spec, rows)
                    tensors = {"noise": block.noise, "latent": block.latents, "condition": block.condition}
                    for name, values in tensors.items():
                        # NumPy's isfinite: torch's takes ten times as long in float16
                        if values is not None and not np.isfinite(values.numpy()).all():
                            raise _damaged(path, f"{name} holds values that are not finite")
                    noise_sha256.update(_bytes_of(block.noise))
                    yield block
                expected = attribute(file, "noise_sha256")
    except UNREADABLE as error:
        raise_machine_error(error, path, memory=False)
        raise _damaged(path, f"unreadable ({error})") from error
    if noise_sha256.hexdigest() != expected:
        raise _damaged(path, "its noise is not the noise the teacher received (noise_sha256 differs)")


def _check_bytes(raw: BinaryIO, path: Path) -> None:
    """Compare length and sha256 of an open file with its first 512 bytes. Raises DamagedShard."""
    head, length = raw.read(USER_BLOCK_BYTES), os.fstat(raw.fileno()).st_size
    if parse_user_block(head)[0] != length:
        raise _damaged(path, f"truncated or overwritten ({length} bytes)")
    if head != _user_block(length, hashlib.file_digest(raw, "sha256").hexdigest()):  # type: ignore[arg-type]
        raise _damaged(path, "damaged (its bytes do not match their sha256)")


def _blocks(file: Any, spec: StoreSpec) -> Iterator[slice]:
    """Slices of whole chunks with about BLOCK_BYTES of latents each; one empty slice if there are no rows."""
    # Whole chunks only: a chunk that spans two blocks would be read twice.
    latent = file["latent"]
    size = max(1, BLOCK_BYTES // (prod(spec.latent_shape) * latent.dtype.itemsize * latent.chunks[0]))
    size *= latent.chunks[0]
    for start in range(0, max(1, len(latent)), size):
        yield slice(start, start + size)


def _block(file: Any, spec: StoreSpec, rows: slice) -> PairBatch:
    index = file["index"][rows].astype(np.int64)
    if len(index) and index.min() < 0:
        raise ValueError("index holds numbers of 2^63 and more")
    noise = torch.from_numpy(file["noise"][rows]) if "noise" in file else redraw_noise(spec, index)
    latents, prompts = torch.from_numpy(file["latent"][rows]), _prompts_of(file, spec, rows)
    condition = torch.from_numpy(file["condition"][rows]) if "condition" in file else None
    return PairBatch(
        noise=noise, latents=latents, prompts=prompts, index=torch.from_numpy(index), condition=condition
    )


def _prompts_of(file: Any, spec: StoreSpec, rows: slice) -> list[str]:
    if spec.conditioning == "text":
        return [text.decode() for text in file["prompt"][rows]]
    if spec.conditioning == "label":
        return [str(number) for number in file["label"][rows]]
    return [""] * len(file["index"][rows])


def redraw_noise(spec: StoreSpec, index: Iterable[int]) -> Tensor:
    """Draw the noise of these pairs again from (seed, index), in the stored type."""
    return seeds.noise(spec.seed, index, spec.latent_shape, spec.torch_dtype)


def _check_header(file: Any, path: Path, spec: StoreSpec) -> None:
    """Compare attributes and dataset shapes with `spec`. Raises DamagedShard naming file and key."""
    # The spec must be the store's; name the keys that differ.
    if (sha256 := attribute(file, "spec_sha256")) != spec.sha256:
        header = json.loads(attribute(file, "spec"))
        names = ["spec_sha256"] if digest(header) != sha256 else []
        if names := names or differing_from_earlier(spec, header):
            raise _damaged(path, f"made with another spec: {', '.join(names)}")
    # Datasets and shapes follow from the spec and the number of rows.
    try:
        check_structure(file, spec)
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def check_length(path: Path) -> int:
    """The length of a file, which must be the one in its first 512 bytes. Raises DamagedShard."""
    try:
        with open_regular(path) as raw:
            return _check_length(raw.fileno(), path)
    except OSError as error:
        raise_machine_error(error, path)
        raise _damaged(path, f"unreadable ({error.strerror})") from error


def _check_length(descriptor: int, path: Path) -> int:
    length, _ = parse_user_block(os.pread(descriptor, USER_BLOCK_BYTES, 0))
    size = os.fstat(descriptor).st_size
    if length != size:
        raise _damaged(path, f"truncated or overwritten ({size} bytes, its header says {length})")
    return size


def quarantined_in(path: Path) -> list[int]:
    """The quarantined pairs that a shard's header lists. Raises DamagedShard."""
    try:
        require_regular(path)
        with h5py.File(path, "r", locking=False) as file:
            check_texts(file.id.get_vfd_handle(), file)
            return _quarantined(file)
    except UNREADABLE as error:
        raise_machine_error(error, path, memory=False)
        raise _damaged(path, f"unreadable ({error})") from error


def row_count(path: Path) -> int:
    """The number of rows that a file's header states, without a look at the rows. Raises DamagedShard."""
    check_length(path)
    try:
        with h5py.File(path, "r", locking=False) as file:
            check_texts(file.id.get_vfd_handle(), file)
            return int(attribute(file, "rows"))
    except UNREADABLE as error:
        raise_machine_error(error, path, memory=False)
        raise _damaged(path, f"unreadable ({error})") from error


def _quarantined(file: Any) -> list[int]:
    return [int(number) for number in json.loads(attribute(file, "quarantined"))]


def read_fault(name: str, row: int, error: Exception) -> str:
    """An error of reading a row, in one line. HDF5 reports a wrong checksum as a failed filter."""
    if "filter" in str(error) or "Fletcher32" in str(error):
        return f"unreadable ({name} of row {row} does not match its checksum)"
    return f"unreadable ({name} of row {row}: {error})"


class OpenShard:
    """A complete shard, open for reading single rows. HDF5 verifies the checksum of each chunk it reads.

    Raises FileNotFoundError when the file does not exist and other OSErrors when HDF5 cannot open it.
    """

    def __init__(self, path: Path) -> None:
        require_regular(path)
        # A small chunk cache: HDF5's default takes megabytes per dataset, and hundreds of files are open.
        try:
            self._file = h5py.File(path, "r", locking=False, rdcc_nbytes=CACHE_BYTES)
        except OSError as error:
            if "locking flag values" not in str(error):
                raise
            # This process has opened the file elsewhere with locks: HDF5 needs the same flags again.
            self._file = h5py.File(path, "r", rdcc_nbytes=CACHE_BYTES)
        self.path = path
        self._descriptor: int = self._file.id.get_vfd_handle()
        self._datasets: dict[str, Any] = {}
        self._chunk_rows: dict[str, int] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        stat = os.fstat(self._descriptor)
        self.identity = stat.st_ino, stat.st_size, stat.st_mtime_ns
        """Changes when another file takes the same name."""

    def check(self, spec: StoreSpec, shard: int) -> list[int]:
        """Compare length, header and index with `spec` and the shard's number. Returns the quarantined pairs.

        Raises DamagedShard, also for datasets that the format does not allow (`check_structure`).
        """
        # The file name decides which pairs the index must hold.
        rows = spec.rows(shard)
        try:
            _check_length(self._descriptor, self.path)
            check_texts(self._descriptor, self._file)
            _check_header(self._file, self.path, spec)
            quarantined = _quarantined(self._file)
            expected = np.setdiff1d(np.arange(rows.start, rows.stop), quarantined)
            if not np.array_equal(self._file["index"][:].astype(np.int64), expected):
                without = f" without {len(quarantined)} quarantined ones" if quarantined else ""
                what = f"index is not {rows.start} to {rows.stop - 1}{without}, as its name says"
                raise _damaged(self.path, what)
            # Without a checksum, HDF5 would return damaged rows without an error.
        except UNREADABLE as error:
            raise_machine_error(error, self.path, memory=False)
            raise _damaged(self.path, f"unreadable ({error})") from error
        return quarantined

    def read_rows(self, rows: IntArray, places: IntArray, out: Mapping[str, NDArray[Any]]) -> dict[int, str]:
        """Read each row [K] of each dataset of `out` to out[name][place]. Returns place -> damage."""
        damage: dict[int, str] = {}
        for name, values in out.items():
            dataset = self._dataset(name)
            # Row by row, so that damage is known for single rows.
            for row, place in zip(rows.tolist(), places.tolist(), strict=True):
                try:
                    values[place] = dataset[row]
                except UNREADABLE as error:
                    raise_machine_error(error, self.path, memory=False)
                    damage[place] = read_fault(name, row, error)
        return damage

    def text_block(self, name: str, row: int) -> range:
        """The rows that share a chunk of a text or label dataset with `row`: cheapest to read together."""
        size = self._rows_per_chunk(name)
        return range(row - row % size, row - row % size + size)

    def read_text(self, name: str, rows: range) -> list[str]:
        """Prompts, or labels in decimal. Raises one of UNREADABLE for damage."""
        column = self._dataset(name)[rows.start : rows.stop].tolist()
        return [value.decode() if isinstance(value, bytes) else str(value) for value in column]

    def hint(self, name: str, first: int, last: int) -> None:
        """Tell the operating system that rows `first` to `last` are read soon, where it has such a call.

        The file offset is estimated: chunks are in order, nearly without gaps. A wrong hint only costs time.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        dataset, rows = self._dataset(name), self._rows_per_chunk(name)
        # Look up the offsets of the first and last chunk once per dataset.
        chunks = -(-len(dataset) // rows)
        if name not in self._spans:
            ends = [dataset.id.get_chunk_info(number) for number in (0, chunks - 1)]
            self._spans[name] = ends[0].byte_offset, ends[1].byte_offset + ends[1].size
        begin, end = self._spans[name]
        # Interpolate between them, and announce the range in pieces that the system accepts.
        start = begin + (end - begin) * (first // rows) // chunks
        stop = begin + (end - begin) * (last // rows + 1) // chunks
        for offset in range(start, stop, HINT_BYTES):
            length = min(HINT_BYTES, stop - offset)
            os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def _dataset(self, name: str) -> Any:
        if name not in self._datasets:
            self._datasets[name] = self._file[name]
        return self._datasets[name]

    def _rows_per_chunk(self, name: str) -> int:
        if name not in self._chunk_rows:
            self._chunk_rows[name] = self._dataset(name).chunks[0]
        return self._chunk_rows[name]
