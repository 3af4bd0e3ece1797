"""pairgen.store.hdf5_chunks: HDF5's own checksums and places, judged by h5py and by the definition."""

import os
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairgen.store.hdf5_chunks import Chunks, Descriptor, fletcher32, hint, read_chunk, read_chunks


def by_definition(data: bytes) -> int:
    """Fletcher-32 over big-endian 16-bit words, sums folded so that only zeros give 0."""
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2").astype(np.uint64)
    low, high = int(words.sum()), int(words.cumsum().sum())
    folded = [(total - 1) % 65535 + 1 if total else 0 for total in (low, high)]
    return folded[1] << 16 | folded[0]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of several datasets that grew in turns, so that no dataset's chunks stand together."""
    path = tmp_path_factory.mktemp("chunks") / "file.h5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w", userblock_size=512, libver=("v110", "v110")) as out:
        for name, width, rows in (("a", 37, 3), ("b", 1024, 1), ("c", 5000, 2), ("zeros", 64, 4)):
            out.create_dataset(
                name, (0, width), "f2", maxshape=(None, width), chunks=(rows, width), fletcher32=True
            )
        for step in range(1, 5):
            for dataset in out.values():
                dataset.resize(4 * step, axis=0)
                values = rng.standard_normal((4, dataset.shape[1]))
                dataset[4 * step - 4 :] = values * (dataset.name != "/zeros")
        text = np.array([f"row {i} " * (i % 7) for i in range(300)], "S60")
        out.create_dataset("text", data=text, chunks=(41,), fletcher32=True, compression="gzip")
    return path


def chunks_of(path: Path, name: str) -> tuple[Chunks, np.ndarray]:
    with h5py.File(path) as opened:
        dataset = opened[name]
        infos = [dataset.id.get_chunk_info(k) for k in range(dataset.id.get_num_chunks())]
        infos.sort(key=lambda info: info.chunk_offset)
        offsets, sizes = [info.byte_offset for info in infos], [info.size for info in infos]
        return Chunks.of(dataset.chunks[0], bool(dataset.compression), offsets, sizes), dataset[:]


@given(st.binary(max_size=700), st.integers(1, 5))
def test_the_checksum_is_the_one_of_the_definition(data: bytes, copies: int) -> None:
    rows = np.frombuffer(data * copies, np.uint8).reshape(copies, -1)
    assert fletcher32(rows).tolist() == [by_definition(data)] * copies


@pytest.mark.parametrize("fill", [0, 1, 255])
@pytest.mark.parametrize("size", [2, 2048, 2050, 65_536, 300_000, 2_000_001])
def test_sums_neither_overflow_nor_confuse_zero(size: int, fill: int) -> None:
    data = np.full((2, size), fill, np.uint8)
    data[1, -1] ^= 7
    assert fletcher32(data).tolist() == [by_definition(row.tobytes()) for row in data]


def test_many_rows_are_checked_in_parts() -> None:
    data = np.random.default_rng(1).integers(0, 256, (50, 40_000), np.uint8)
    expected = [by_definition(row.tobytes()) for row in data[::7]]
    assert fletcher32(data)[::7].tolist() == expected
    assert fletcher32(data[:0]).tolist() == [] and fletcher32(data[::7]).tolist() == expected


@pytest.mark.parametrize("name", ["a", "b", "c", "zeros"])
@pytest.mark.parametrize("vectored", [True, False])
def test_chunks_come_out_as_hdf5_wrote_them(
    file: Path, name: str, vectored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not vectored:
        monkeypatch.delattr(os, "preadv")  # as on systems that have none
    chunks, values = chunks_of(file, name)
    count = -(-len(values) // chunks.rows)
    order = np.random.default_rng(2).permutation(count)
    data = np.empty((count, chunks.rows * values.shape[1] * 2), np.uint8)
    sums = np.empty(count, np.uint32)
    assert read_chunks(Descriptor(file), chunks.place(order)[0], order, data, sums) == []
    assert fletcher32(data).tolist() == sums.tolist()
    found = data.view(np.float16).reshape(-1, values.shape[1])[: len(values)]
    assert np.array_equal(found, values)


def test_a_compressed_column_is_inflated_after_its_check(file: Path) -> None:
    chunks, values = chunks_of(file, "text")
    opened = Descriptor(file)
    parts = [np.frombuffer(read_chunk(opened, chunks, k), "S60") for k in range(-(-300 // 41))]
    assert np.array_equal(np.concatenate(parts)[:300], values)


def test_runs_stand_for_all_chunks() -> None:
    offset = [100, 150, 200, 400, 450, 380, 900, 960]
    size = [50, 50, 50, 50, 50, 20, 60, 10]
    chunks = Chunks.of(1, False, offset, size)
    assert len(chunks.first) == 5 and chunks.first.tolist() == [0, 3, 5, 6, 7]
    found = chunks.place(np.arange(8))
    assert found[0].tolist() == offset and found[1].tolist() == size
    assert Chunks.of(1, False, [], []).place(np.empty(0, np.int64))[0].tolist() == []


def test_the_chunk_that_cannot_be_read_is_named_alone(file: Path, tmp_path: Path) -> None:
    chunks, _ = chunks_of(file, "c")
    place, size = chunks.place(np.arange(8))
    cut = tmp_path / "cut"
    cut.write_bytes(file.read_bytes()[: int(np.sort(place)[6] + size[0] - 1)])
    last = set(np.argsort(place)[6:].tolist())
    data, sums = np.zeros((8, int(size[0]) - 4), np.uint8), np.zeros(8, np.uint32)
    assert set(read_chunks(Descriptor(cut), place, np.arange(8), data, sums)) == last
    sound = np.array(sorted(set(range(8)) - last))
    assert np.array_equal(fletcher32(data[sound]), sums[sound])


def test_any_changed_byte_of_a_column_is_refused(file: Path, tmp_path: Path) -> None:
    chunks, _ = chunks_of(file, "text")
    (place,), (size,) = chunks.place(np.array([3]))
    good, bad = file.read_bytes(), tmp_path / "bad"
    for position in range(int(place), int(place + size), 5):
        data = bytearray(good)
        data[position] ^= 1
        bad.write_bytes(data)
        with pytest.raises((OSError, zlib.error)):
            read_chunk(Descriptor(bad), chunks, 3)
    bad.write_bytes(good[: int(place) + 10])
    with pytest.raises(OSError, match="checksum"):
        read_chunk(Descriptor(bad), chunks, 3)


def test_a_descriptor_closes_when_nobody_holds_it(file: Path) -> None:
    opened = Descriptor(file)
    number, alias = opened.number, opened
    del opened
    os.fstat(number)
    del alias
    with pytest.raises(OSError):
        os.fstat(number)
    with pytest.raises(FileNotFoundError):
        Descriptor(file.with_name("none"))


def test_hints_are_only_hints(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, _ = chunks_of(file, "a")
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda number, start, length, advice: asked.append((start, length))
    )
    hint(Descriptor(file), chunks, 1, 4)
    place, size = chunks.place(np.arange(6))
    covered = {byte for start, length in asked for byte in range(start, start + length)}
    wanted = {byte for k in range(1, 5) for byte in range(int(place[k]), int(place[k] + size[k]))}
    assert covered == wanted
    monkeypatch.delattr(os, "posix_fadvise")
    hint(Descriptor(file), chunks, 0, 5)
