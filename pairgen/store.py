"""The pair store: (noise, latent, prompt, index) rows in sharded HDF5. The one door to h5py.

For readers outside this project the format is written down in docs/pair-format.md.
"""

import hashlib
import io
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor

from core import seeds
from core.config import differing
from core.errors import UserError
from pairgen.layout import (
    SCHEMA,
    StoreSpec,
    create_store,
    pending,
    read_spec,
    refuse_other,
    shard_path,
    shards_present,
)

__all__ = ["PairBatch", "PairReader", "StoreSpec", "create_store", "pending", "read_spec"]

SEAL = 512  # bytes of the HDF5 user block, where the length and sha256 of the rest of the file stand
CHUNK_BYTES = 1 << 16
OPEN_FILES = 64
UNREADABLE = (OSError, KeyError, ValueError, RuntimeError, TypeError)  # what h5py raises on damaged files


@dataclass(frozen=True, kw_only=True, slots=True)
class PairBatch:
    """Rows: noise and scaled latent [B, C, H, W], B prompts, index [B] int64 (the pairs' numbers).

    A class-conditional teacher's prompts are its class numbers in decimal; an unconditional one's are empty.
    """

    noise: Tensor
    latent: Tensor
    prompts: list[str]
    index: Tensor

    @property
    def labels(self) -> Tensor:
        """The class numbers [B] int64 of a class-conditional teacher's rows."""
        return torch.tensor([int(prompt) for prompt in self.prompts], dtype=torch.int64)


def _seal(image: bytes | memoryview) -> bytes:
    sha256 = hashlib.sha256(image[SEAL:]).hexdigest()
    text = json.dumps({"format": "diffusion2gan-pairs", "bytes": len(image), "sha256": sha256})
    return text.encode().ljust(SEAL - 1) + b"\n"


def _sealed_length(head: bytes) -> int:
    try:
        return int(json.loads(head)["bytes"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return -1


def _damaged(path: Path, reason: str) -> UserError:
    folder = path.parent.parent
    return UserError(f"{path}: {reason}; run `d2g pairs repair {folder}`, then `d2g pairs generate` again")


def _noise_sha256(noise: Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(noise.numpy()).data).hexdigest()


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
        file.attrs["noise_sha256"] = _noise_sha256(rows.noise)
    image = buffer.getbuffer()
    image[:SEAL] = _seal(image)
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
    """All rows of one file in the stored dtype, after every check: length, sha256 of every byte, header,
    finite values, noise hash. Raises UserError with the first reason found; index order is the caller's."""
    try:
        data = path.read_bytes()
        if _sealed_length(data[:SEAL]) != len(data):
            raise _damaged(path, f"truncated or overwritten ({len(data)} bytes)")
        if data[:SEAL] != _seal(data):
            raise _damaged(path, "damaged (its bytes do not match their sha256)")
        with h5py.File(io.BytesIO(data), "r") as file:
            _check_header(file, path, spec)
            index = file["index"][:].astype(np.int64)
            latent = torch.from_numpy(file["latent"][:])
            noise = torch.from_numpy(file["noise"][:]) if "noise" in file else redraw(spec, index)
            prompts = _prompts_of(file, spec, slice(None))
            noise_sha256 = file.attrs["noise_sha256"]
    except UNREADABLE as error:
        raise _damaged(path, f"unreadable ({error})") from error
    for name, values in (("noise", noise), ("latent", latent)):
        if not values.isfinite().all():
            raise _damaged(path, f"{name} holds values that are not finite")
    if _noise_sha256(noise) != noise_sha256:
        raise _damaged(path, "its noise is not the noise the teacher saw (noise_sha256 differs)")
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


class PairReader:
    """Random access to the rows of a store, whole or not: positions 0 to len - 1 in order of pair index.

    In a complete store a position is the pair's index. Every header is checked here; files are opened at the
    first read of each process, so a reader may cross a fork or be pickled to a worker.
    Raises UserError for a folder of another spec than `expect`, and for any shard that cannot be trusted.
    """

    def __init__(self, folder: Path, expect: StoreSpec | None = None) -> None:
        self.folder, self.spec = Path(folder), read_spec(folder)
        if expect is not None:
            refuse_other(self.folder, self.spec, expect)
        self._shards = np.array(shards_present(self.folder, self.spec), dtype=np.int64)
        self._ends = np.cumsum([len(self.spec.rows(int(shard))) for shard in self._shards])
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._process = os.getpid()
        for shard in self._shards.tolist():
            self._open(shard).close()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    @property
    def complete(self) -> bool:
        """Whether every pair of the spec is there."""
        return len(self) == self.spec.num_pairs

    def read(self, rows: Sequence[int]) -> PairBatch:
        """The rows at these positions, in this order, repeats allowed: noise and latent fp32 [B, C, H, W]."""
        position = np.asarray(rows, dtype=np.int64)
        if position.size and not (0 <= position.min() and position.max() < len(self)):
            raise IndexError(f"positions {position.min()} to {position.max()} of {len(self)} pairs")
        nth = np.searchsorted(self._ends, position, side="right")
        shard = self._shards[nth]
        row = position - np.concatenate([[0], self._ends])[nth]
        index = shard * self.spec.shard_size + row
        shape = (len(position), *self.spec.latent_shape)
        values = {"latent": np.empty(shape, self.spec.dtype), "prompt": np.empty(len(position), object)}
        if self.spec.noise == "stored":
            values["noise"] = np.empty(shape, self.spec.dtype)
        for number in np.unique(shard).tolist():
            where = np.flatnonzero(shard == number)
            self._gather(number, row[where], where, values)
        noise = values["noise"] if "noise" in values else redraw(self.spec, index).numpy()
        return PairBatch(
            noise=torch.from_numpy(noise).float(),
            latent=torch.from_numpy(values["latent"]).float(),
            prompts=[text.decode() for text in values["prompt"]],
            index=torch.from_numpy(index),
        )

    def prompts(self) -> list[str]:
        """The different prompts of the rows present, in order of first use."""
        texts: dict[bytes, None] = {}
        for shard in self._shards.tolist():
            every = np.arange(len(self.spec.rows(shard)))
            column = {"prompt": np.empty(len(every), object)}
            self._gather(shard, every, every, column)
            texts.update(dict.fromkeys(column["prompt"].tolist()))
        return [text.decode() for text in texts]

    def _gather(self, shard: int, row: np.ndarray, where: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Copy rows of a shard to `values[name][where]`, a whole chunk at a time, as HDF5 decodes them."""
        try:
            file = self._file(shard)
            for name, out in values.items():
                dataset = file[name]
                size = dataset.chunks[0]
                for chunk in np.unique(row // size).tolist():
                    inside = row // size == chunk
                    block = dataset[chunk * size : (chunk + 1) * size]
                    out[where[inside]] = block[row[inside] - chunk * size]
        except UNREADABLE as error:
            raise _damaged(shard_path(self.folder, shard), f"unreadable ({error})") from error

    def _file(self, shard: int) -> Any:
        if self._process != os.getpid():  # HDF5 handles do not survive a fork
            self._files, self._process = OrderedDict(), os.getpid()
        if shard not in self._files:
            self._files[shard] = self._open(shard)
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return self._files[shard]

    def _open(self, shard: int) -> Any:
        path, rows = shard_path(self.folder, shard), self.spec.rows(shard)
        try:
            with path.open("rb") as raw:
                length, size = _sealed_length(raw.read(SEAL)), path.stat().st_size
            if length != size:
                raise _damaged(path, f"truncated or overwritten ({size} bytes, its header says {length})")
            file = h5py.File(path, "r")
            _check_header(file, path, self.spec)
            if not np.array_equal(file["index"][:], np.arange(rows.start, rows.stop, dtype=np.uint64)):
                raise _damaged(path, f"index is not {rows.start} to {rows.stop - 1}, as its name says")
        except UNREADABLE as error:
            raise _damaged(path, f"unreadable ({error})") from error
        return file
