"""pairgen.store.reader: reading rows in any order, checks, skipping of damage, processes and threads."""

import hashlib
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2g.core.errors import UserError
from pairgen.store.hdf5 import DamagedShard, OpenShard, _user_block
from pairgen.store.reader import PairReader
from pairgen.store.spec import quarantine_path, shard_path
from stores import PROMPTS, SPEC, flip_bit, put_shard, put_store, rows_of, same, spec_of

ASIDE = [0, 7, 8, 9, 21]


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_store(tmp_path_factory.mktemp("reader") / "pairs")


@pytest.fixture
def store(shared_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_store, tmp_path / "pairs"))


def byte_offset(path: Path, name: str, row: int) -> int:
    """The file offset of the bytes of one row of a dataset."""
    with h5py.File(path) as file:
        dataset = file[name]
        size = dataset.chunks[0]
        index = [dataset.id.get_chunk_info(k) for k in range(dataset.id.get_num_chunks())]
        (chunk,) = (c for c in index if c.chunk_offset[0] == row - row % size)
        return int(chunk.byte_offset + row % size * dataset[0].nbytes)


# Rows.


@pytest.mark.parametrize("conditioning", ["text", "label", "none"])
@pytest.mark.parametrize("noise", ["stored", "seeded"])
@pytest.mark.parametrize(
    ("dtype", "shape"), [("float16", (4, 8, 8)), ("float32", (3, 5, 5)), ("float16", (1, 1, 1))]
)
def test_rows_equal_the_written_ones(
    tmp_path: Path, conditioning: str, noise: str, dtype: str, shape: tuple[int, int, int]
) -> None:
    spec = spec_of(conditioning=conditioning, noise=noise, dtype=dtype, latent_shape=shape)
    reader = PairReader(put_store(tmp_path, spec, quarantined=ASIDE), expect=spec)
    pairs = [i for i in range(22) if i not in ASIDE]
    assert len(reader) == 17 and reader.complete and reader.quarantined == ASIDE and reader.shards == 3
    order = [16, 3, 0, 0, 9, 12, 5, 1, 8]
    batch, expected = reader.read(order), rows_of(spec, [pairs[i] for i in order])
    assert same(batch, expected) and batch.noise.dtype == batch.latents.dtype == torch.float32
    stored = reader.read(order, None)
    assert same(stored, expected) and stored.noise.dtype == stored.latents.dtype == spec.torch_dtype
    if conditioning == "label":
        assert batch.labels.tolist() == [int(text) for text in expected.prompts]
    assert reader.prompts() == list(dict.fromkeys(rows_of(spec, pairs).prompts))


@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 128, 128)])
def test_rows_of_the_size_of_a_chunk(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    spec = spec_of(latent_shape=shape, num_pairs=9, shard_size=5)
    reader = PairReader(put_store(tmp_path, spec, quarantined=[4]))
    with h5py.File(shard_path(tmp_path, 0)) as file:
        assert file["latent"].chunks[0] == 1
    assert same(reader.read([7, 0, 3, 4, 3]), rows_of(spec, [8, 0, 3, 5, 3]))


@given(st.lists(st.integers(0, 21), max_size=12))
def test_any_positions_in_any_order(shared_store: Path, order: list[int]) -> None:
    batch = PairReader(shared_store).read(order)
    assert batch.noise.shape == (len(order), 4, 8, 8) and batch.index.tolist() == order
    if order:
        assert same(batch, rows_of(SPEC, order))


def test_shards_without_rows(tmp_path: Path) -> None:
    spec = spec_of(num_pairs=20)
    reader = PairReader(put_store(tmp_path / "a", spec, quarantined=[*range(8, 16), 19]))
    assert len(reader) == 11 and reader.complete and reader.prompts() == PROMPTS[:3]
    assert reader.read([8, 7, 10]).index.tolist() == [16, 7, 18]
    reader.prefetch(range(11), block=4)
    nothing = PairReader(put_store(tmp_path / "b", spec, quarantined=range(20)))
    assert len(nothing) == 0 and nothing.complete and nothing.prompts() == []
    assert nothing.read([]).index.tolist() == []
    with pytest.raises(IndexError, match="positions 0 to 0 of 0"):
        nothing.read([0])


def test_records_of_unwritten_shards_are_ignored(store: Path) -> None:
    put_shard(store, SPEC, 1, quarantined=[9])
    shard_path(store, 1).unlink()
    reader = PairReader(store)
    assert len(reader) == 14 and reader.quarantined == [] and not reader.complete
    assert reader.read([8]).index.tolist() == [16]


def test_positions_outside_are_refused(shared_store: Path) -> None:
    for wrong in ([22], [0, -1]):
        with pytest.raises(IndexError, match="of 22 pairs"):
            PairReader(shared_store).read(wrong)


# Checks at opening and reading.


def test_opening_checks_lengths_and_the_first_read_checks_the_shard(store: Path) -> None:
    shard_path(store, 1).write_bytes(shard_path(store, 0).read_bytes())
    reader = PairReader(store)
    assert reader.read([0, 21]).index.tolist() == [0, 21]
    with pytest.raises(
        DamagedShard, match=r"pairs-00001\.h5: index is not 8 to 15, as its name says; run `d2g pairs"
    ):
        reader.read([0, 8])
    shard_path(store, 1).write_bytes(shard_path(store, 0).read_bytes()[:-1])
    with pytest.raises(DamagedShard, match=r"pairs-00001\.h5: truncated"):
        PairReader(store)


def test_a_shard_with_missing_pairs_but_no_record(store: Path) -> None:
    put_shard(store, SPEC, 1, quarantined=[9])
    quarantine_path(store, 1).unlink()
    reader = PairReader(store)
    with pytest.raises(
        DamagedShard, match=r"pairs-00001.h5: its header quarantines pairs \[9\], its record .* \[\]; run"
    ):
        reader.read([8])


def test_the_header_takes_precedence_over_an_outdated_record(store: Path) -> None:
    """A writer that completes a quarantined row may be killed before it removes the record."""
    put_shard(store, SPEC, 1, quarantined=[9, 11])
    record = quarantine_path(store, 1).read_bytes()
    put_shard(store, SPEC, 1, quarantined=[11])
    quarantine_path(store, 1).write_bytes(record)
    reader = PairReader(store)
    assert reader.quarantined == [11] and reader.complete and same(reader.read([9]), rows_of(SPEC, [9]))


def test_a_replaced_shard_is_checked_again(store: Path) -> None:
    reader = PairReader(store)
    before = reader.read(range(22))
    put_shard(store, SPEC, 0)  # the same rows in a new file
    assert same(pickle.loads(pickle.dumps(reader)).read(range(22)), before)
    put_shard(store, SPEC, 0, quarantined=[3])
    assert same(reader.read(range(22)), before), "open files stay as they were"
    with pytest.raises(DamagedShard, match=r"quarantines pairs \[3\]"):
        pickle.loads(pickle.dumps(reader)).read([0])


@pytest.mark.parametrize("name", ["noise", "latent", "prompt", "index"])
def test_a_flipped_bit_is_found_when_its_chunk_is_read(store: Path, name: str) -> None:
    path = shard_path(store, 2)
    flip_bit(path, byte_offset(path, name, 0) + 3)
    reader = PairReader(store)
    assert same(reader.read(range(16)), rows_of(SPEC, range(16)))
    with pytest.raises(
        DamagedShard, match=rf"{re.escape(str(path))}: unreadable .*; run `d2g pairs repair"
    ) as caught:
        reader.read([3, 21])
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("name", ["noise", "latent", "prompt"])
def test_any_changed_byte_of_a_chunk_is_refused(store: Path, name: str) -> None:
    path = shard_path(store, 1)
    good = path.read_bytes()
    with h5py.File(path) as file:
        chunk = file[name].id.get_chunk_info_by_coord((0,) * file[name].ndim)
    for position in range(chunk.byte_offset, chunk.byte_offset + chunk.size, max(1, chunk.size // 40)):
        path.write_bytes(good)
        flip_bit(path, position)
        with pytest.raises(
            DamagedShard,
            match=rf"pairs-00001\.h5: unreadable \({name} of row 3 does not match its checksum\); run",
        ):
            PairReader(store).read([11])


def test_a_dataset_without_checksums_is_refused(store: Path) -> None:
    """The file digest is valid, but without checksums of chunks damaged rows could not be detected."""
    path = shard_path(store, 1)
    with h5py.File(path, "r+") as file:
        latent = file["latent"][:]
        del file["latent"]
        file.create_dataset("latent", data=latent, chunks=(4, 4, 8, 8), maxshape=(None, 4, 8, 8))
    data = path.read_bytes()
    path.write_bytes(_user_block(len(data), hashlib.sha256(data[512:]).hexdigest()) + data[512:])
    with pytest.raises(DamagedShard, match=r"pairs-00001\.h5: dataset latent has no checksums; run"):
        PairReader(store).read([8])


def test_a_url_with_one_slash_is_refused() -> None:
    with pytest.raises(UserError, match=r"s3://bucket/pairs is a URL; this needs a folder of this machine"):
        PairReader(Path("s3://bucket/pairs"))


# Damage that may be skipped.


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path) -> None:
    path.write_bytes(path.with_name("pairs-00000.h5").read_bytes())


def flip_header(path: Path) -> None:
    flip_bit(path, 540)


def other_spec(path: Path) -> None:
    put_store(path.parents[2] / "other", spec_of(seed=6))
    path.write_bytes((path.parents[2] / "other" / "shards" / path.name).read_bytes())


@pytest.mark.parametrize("damage", [truncate, empty, swap, flip_header, other_spec])
def test_a_damaged_shard_is_replaced_by_the_next(store: Path, damage: Callable[[Path], None]) -> None:
    bad = shard_path(store, 1)
    damage(bad)
    reader = PairReader(store, skip_bad=True)
    assert len(reader) == 22 and reader.complete
    expected = [*range(8), 16, 17, 18, 19, 20, 21, 16, 17, *range(16, 22)]  # the next shard has 6 rows
    batch = reader.read(range(22))
    assert batch.index.tolist() == expected and same(batch, rows_of(SPEC, expected))
    assert list(batch.skipped) == [str(bad)] == list(reader.skipped)
    assert reader.read([0]).skipped == {}, "this batch had nothing to do with it"
    with pytest.raises(DamagedShard, match=r"pairs-00001\.h5"):
        PairReader(store).read(range(22))


def test_only_damaged_rows_are_replaced(tmp_path: Path) -> None:
    """The rows of a read do not depend on which chunks the process read before."""
    spec = spec_of(latent_shape=(4, 64, 64), num_pairs=14, shard_size=5)
    store = put_store(tmp_path, spec)
    for shard, row in ((1, 2), (2, 2)):
        path = shard_path(store, shard)
        flip_bit(path, byte_offset(path, "latent", row))
    reader = PairReader(store, skip_bad=True)
    expected = [0, 1, 2, 3, 4, 5, 6, 2, 8, 9, 10, 11, 2, 13]  # 7 -> 12, which is bad too -> 2
    batch = reader.read(range(14))
    assert batch.index.tolist() == expected and same(batch, rows_of(spec, expected))
    assert list(batch.skipped) == [str(shard_path(store, 1)), str(shard_path(store, 2))]
    for position in range(14):
        single = PairReader(store, skip_bad=True).read([position])
        assert same(single, rows_of(spec, [expected[position]]))
    assert same(pickle.loads(pickle.dumps(reader)).read([7, 12, 7]), rows_of(spec, [2, 2, 2]))


def test_replacement_wraps_around_and_skips_empty_shards(tmp_path: Path) -> None:
    store = put_store(tmp_path, SPEC, quarantined=range(8))
    truncate(shard_path(store, 2))
    reader = PairReader(store, skip_bad=True)
    assert reader.read(range(14)).index.tolist() == [*range(8, 16), *range(8, 14)]


def test_prompts_of_damaged_chunks(store: Path) -> None:
    path = shard_path(store, 0)
    flip_bit(path, byte_offset(path, "prompt", 0) + 2)
    reader = PairReader(store, skip_bad=True)
    assert reader.read([0, 1, 21]).index.tolist() == [8, 9, 21]
    assert set(reader.prompts()) == {PROMPTS[SPEC.prompt_of(i)] for i in range(8, 22)}
    with pytest.raises(
        DamagedShard, match=r"unreadable \(prompt of row 0 does not match its checksum\); run"
    ):
        PairReader(store).prompts()


def test_without_an_intact_shard_reading_fails(store: Path) -> None:
    for shard in range(3):
        truncate(shard_path(store, shard))
    reader = PairReader(store, skip_bad=True)
    with pytest.raises(UserError, match="no intact row for 2 pairs; run `d2g pairs repair"):
        reader.read([0, 21])
    assert len(reader.skipped) == 3


# Processes, threads, files.


def test_many_shards_need_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pairgen.store.shards.OPEN_FILES", 5)
    spec = spec_of(num_pairs=20, shard_size=1)
    reader = PairReader(put_store(tmp_path, spec))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert same(reader.read(range(len(reader))), rows_of(spec, range(len(reader))))
        assert len(os.listdir("/proc/self/fd")) - before <= 5
    del reader
    assert len(os.listdir("/proc/self/fd")) <= before


def test_threads_may_share_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pairgen.store.shards.OPEN_FILES", 3)
    spec = spec_of(num_pairs=20, shard_size=1)
    reader, wrong = PairReader(put_store(tmp_path, spec)), list[int]()

    def read(start: int) -> None:
        for i in range(start, start + 210, 7):
            if not same(reader.read([i % len(reader)]), rows_of(spec, [i % len(reader)])):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(start,)) for start in (0, 5, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_prefetch_does_not_change_the_rows(store: Path) -> None:
    reader = PairReader(store)
    reader.prefetch([5, 21, 0], block=1)
    reader.prefetch(np.arange(22), block=3)
    reader.prefetch([])
    assert same(reader.read(range(22)), rows_of(SPEC, range(22)))
    swap(shard_path(store, 1))
    reader = PairReader(store)
    reader.prefetch(range(22), block=5)  # `read` reports damage, not prefetch
    with pytest.raises(DamagedShard, match="pairs-00001"):
        reader.read([10])


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 64, 64)])
def test_prefetch_covers_the_chunks_of_its_rows(
    tmp_path: Path, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(latent_shape=shape, num_pairs=300, shard_size=300)
    path = shard_path(put_store(tmp_path, spec), 0)
    hints: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda number, start, length, advice: hints.append((start, length))
    )
    OpenShard(path).hint("latent", 100, 163)
    with h5py.File(path) as file:
        rows, latent = file["latent"].chunks[0], file["latent"].id
        chunks = [latent.get_chunk_info_by_coord((row // rows * rows, 0, 0, 0)) for row in range(100, 164)]
    needed = {byte for chunk in chunks for byte in range(chunk.byte_offset, chunk.byte_offset + chunk.size)}
    covered = {byte for start, length in hints for byte in range(start, start + length)}
    assert len(covered & needed) > 0.9 * len(needed) and len(covered) < 1.2 * len(needed)
    monkeypatch.delattr(os, "posix_fadvise")
    OpenShard(path).hint("latent", 0, 5)


def test_a_shard_may_be_open_in_h5py_at_the_same_time(store: Path) -> None:
    with h5py.File(shard_path(store, 0)) as file:
        assert same(PairReader(store).read(range(8)), rows_of(SPEC, range(8))) and file["index"][7] == 7


def test_batches_share_no_memory(tmp_path: Path) -> None:
    spec = spec_of(latent_shape=(4, 64, 64), num_pairs=14, shard_size=5)
    reader = PairReader(put_store(tmp_path, spec))
    orders = [[(7 * i + 3 * j) % 14 for j in range(9)] for i in range(12)]
    batches = [reader.read(order, torch.float32 if order[0] % 2 else None) for order in orders]
    for order in orders:
        reader.read(order)
    assert all(same(batch, rows_of(spec, order)) for batch, order in zip(batches, orders, strict=True))
