"""What an HDF5 file must be to be a shard, decided before any of its data is read.

HDF5 can hold far more than the pair format needs: datasets that lie in other files, links, types of variable
length, filters from plugins. Some of it crashes the HDF5 library when a file is damaged or hostile.
"""

import os
import struct
from collections.abc import Iterator
from math import prod
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
from h5py import h5a, h5d, h5o, h5t, h5z

from pairgen.store.spec import StoreSpec

DEFLATE_RATIO = 1032  # the most that deflate can expand
CHUNK_OVERHEAD = 1 << 12  # bytes that filters may add to a chunk
_FILTERS = {h5z.FILTER_FLETCHER32, h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE}


def check_structure(file: Any, spec: StoreSpec) -> None:
    """Raise ValueError unless an open HDF5 file holds what the pair format allows, and nothing else.

    That is one plain, chunked, checksummed dataset per column of `spec`, of its type and shape, whose chunks
    are all in this file. Reads no values. Memory for a dataset never exceeds what the file's bytes can hold.
    """
    rows = int(attribute(file, "rows"))
    if not 0 <= rows <= spec.shard_size:
        raise ValueError(f"its header says {rows} rows, expected at most {spec.shard_size}")
    columns: dict[str, tuple[int, ...]] = {"index": (rows,)}
    columns |= {name: (rows, *shape) for name, shape in spec.row_shapes.items()}
    if spec.conditioning != "none":
        columns["prompt" if spec.conditioning == "text" else "label"] = (rows,)
    names = set(file)  # of links too; none is followed here
    for name in columns:
        if name not in names or not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"dataset {name} is not in the file itself")
        if h5o.get_info(file.id, name.encode()).type != h5o.TYPE_DATASET:
            raise ValueError(f"{name} is not a dataset")
    if extra := sorted(names - set(columns)):
        raise ValueError(f"it holds {extra[0]!r}, which is no column of this store")
    for name, shape in columns.items():
        dataset = file[name].id
        _check_type(name, dataset, spec)
        if dataset.shape != shape:
            raise ValueError(f"dataset {name} is {dataset.shape}, its header says {shape}")
        _check_storage(name, dataset, file.id.get_filesize())


def attribute(file: Any, name: str) -> Any:
    """The file's attribute `name`, one number or one string. Raises KeyError and ValueError."""
    value = h5a.open(file.id, name.encode())
    if value.get_space().get_simple_extent_npoints() != 1:
        raise ValueError(f"attribute {name} is no single value")
    kind = value.get_type()
    if kind.get_class() not in (h5t.INTEGER, h5t.STRING) or kind.get_size() > file.id.get_filesize():
        raise ValueError(f"attribute {name} is neither a number nor a text")
    return file.attrs[name]


def _check_type(name: str, dataset: Any, spec: StoreSpec) -> None:
    kind = dataset.get_type()
    if name in spec.row_shapes:
        if kind.get_class() != h5t.FLOAT or kind.dtype != np.dtype(spec.dtype):
            raise ValueError(f"dataset {name} is {kind.dtype}, its header says {spec.dtype}")
    elif name == "prompt":
        if kind.get_class() != h5t.STRING or kind.is_variable_str():
            raise ValueError("dataset prompt does not hold strings of a fixed length")
    elif kind.get_class() != h5t.INTEGER:
        raise ValueError(f"dataset {name} does not hold whole numbers")


def _check_storage(name: str, dataset: Any, file_bytes: int) -> None:
    """Raise ValueError unless every chunk of a dataset is in the file, with a checksum."""
    # Chunked, checksummed, and no filter from a plugin.
    properties = dataset.get_create_plist()
    if properties.get_layout() != h5d.CHUNKED or properties.get_external_count():
        raise ValueError(f"dataset {name} has no checksums, or its data lies elsewhere (it is not chunked)")
    filters = {properties.get_filter(number)[0] for number in range(properties.get_nfilters())}
    if h5z.FILTER_FLETCHER32 not in filters:
        raise ValueError(f"dataset {name} has no checksums")
    if foreign := sorted(filters - _FILTERS):
        raise ValueError(f"dataset {name} needs filter {foreign[0]}, which the format does not have")
    # Compare the chunks that the shape needs with those that are stored.
    chunk = properties.get_chunk()
    count = prod(-(-size // rows) for size, rows in zip(dataset.shape, chunk, strict=True))
    chunk_bytes, stored = prod(chunk) * dataset.get_type().get_size(), dataset.get_storage_size()
    if dataset.get_num_chunks() != count or stored > file_bytes:
        raise ValueError(f"dataset {name} lacks a part of its rows")
    if h5z.FILTER_DEFLATE not in filters:
        if stored < count * chunk_bytes:
            raise ValueError(f"dataset {name} lacks a part of its rows")
        return
    # Compressed chunks: together no larger than deflate can make them, each about its plain size at most.
    largest = 0

    def measure(info: Any) -> None:
        nonlocal largest
        largest = max(largest, info.size)

    dataset.chunk_iter(measure)
    if count * chunk_bytes > DEFLATE_RATIO * stored or largest > chunk_bytes + CHUNK_OVERHEAD:
        raise ValueError(f"dataset {name} does not have the size that its chunks say")


# Texts of attributes. HDF5 keeps them in its global heap, which has no checksum: a wrong size there makes the
# library loop forever, with all threads of the process waiting.

HEADER_BYTES = 1 << 20  # more than the headers of a shard's root group
_ATTRIBUTE, _CONTINUATION, _VARIABLE_LENGTH = 12, 16, 9  # types of messages, and a class of types


def check_texts(descriptor: int, file: Any) -> None:
    """Raise ValueError unless the texts of an open file's attributes lie in sound heaps.

    Reads the header of the root group and the heaps that its attributes name, as the HDF5 file format
    specification (version 3.0, IV.A.1.b and III.E) describes them.
    """
    base = file.userblock_size
    for body in _messages(descriptor, base, h5o.get_info(file.id).addr):
        # Version, flags, sizes of name, type and space, encoding; then these three; then the value.
        if len(body) < 9 or body[0] != 3:
            raise ValueError("an attribute is of another version of HDF5")
        name, kind, space = struct.unpack_from("<HHH", body, 2)
        if len(body) < 9 + name + kind + space or not kind or body[1]:
            raise ValueError("an attribute is shared or damaged")
        if body[9 + name] & 15 == _VARIABLE_LENGTH:
            _, heap, _ = struct.unpack_from("<IQI", body, 9 + name + kind + space)
            _check_heap(descriptor, base + heap)


def _messages(descriptor: int, base: int, address: int) -> Iterator[bytes]:
    """The attribute messages of an object with a header of version 2."""
    head = os.pread(descriptor, 34, base + address)
    if head[:4] != b"OHDR" or head[4] != 2:
        raise ValueError("its header is not of HDF5 1.10")
    flags, width = head[5], 1 << (head[5] & 3)
    start = 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
    size = int.from_bytes(head[start : start + width], "little")
    blocks, total = [(base + address + start + width, size)], 0
    for position, length in blocks:
        if (total := total + length) > HEADER_BYTES:
            raise ValueError("its header is too large")
        data, place = os.pread(descriptor, length, position), 0
        while place + 4 <= len(data):
            kind, size = data[place], int.from_bytes(data[place + 1 : place + 3], "little")
            place += 4 + 2 * bool(flags & 4)
            body, place = data[place : place + size], place + size
            if kind == _CONTINUATION and len(body) >= 16:
                # A continuation has a signature before its messages and a checksum behind them.
                following, extent = struct.unpack_from("<QQ", body)
                blocks.append((base + following + 4, max(0, extent - 8)))
            elif kind == _ATTRIBUTE:
                yield body


def _check_heap(descriptor: int, address: int) -> None:
    """Raise ValueError unless the objects of a global heap collection fill it exactly."""
    head = os.pread(descriptor, 16, address)
    size = int.from_bytes(head[8:16], "little")
    if head[:4] != b"GCOL" or not 16 <= size <= os.fstat(descriptor).st_size:
        raise ValueError("the heap of its attributes is damaged")
    data, place = os.pread(descriptor, size, address), 16
    while place + 16 <= len(data):
        number, length = int.from_bytes(data[place : place + 2], "little"), data[place + 8 : place + 16]
        # Object 0 is the free space, header included. Others are padded to 8 bytes.
        step = int.from_bytes(length, "little")
        step = step if number == 0 else 16 + (step + 7) // 8 * 8
        if step < 16 or place + step > size:
            raise ValueError("the heap of its attributes is damaged")
        place += step
