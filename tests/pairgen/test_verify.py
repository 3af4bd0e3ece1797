"""`verify` finds exactly the planted faults, and `repair` quarantines them."""

import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Semaphore

import h5py
import pytest
import torch

from d2g.core.errors import UserError
from damaged_stores import (
    LISTS,
    RECORD,
    S0,
    S1,
    S2,
    SPEC,
    bad_files,
    file_contents,
    load_shard,
    make_store,
    rows,
    select_rows,
    spec_of,
    swap_prompt,
    truncate,
    with_flipped_bit,
    write_record,
    write_rows,
    write_shard,
)
from pairgen.repair import repair_store
from pairgen.store.reader import PairReader
from pairgen.store.spec import encode_record, prompts_path, quarantined_rows, read_spec, shard_path
from pairgen.store.writer import PairWriter
from pairgen.verify import in_threads, store_info, verify_store

KINDS = [(kind, noise) for kind in LISTS for noise in ("stored", "seeded")]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "pairs")


# Intact stores.


@pytest.mark.parametrize(("kind", "noise"), KINDS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_intact_store_passes(tmp_path: Path, kind: str, noise: str, dtype: str) -> None:
    spec, events = spec_of(kind, noise, dtype=dtype), list[tuple[str, int, int]]()
    report = verify_store(make_store(tmp_path, spec), lambda *event: events.append(event))
    assert report.ok and report.checked == 22 and report.prompts_checked and events[-1] == ("verify", 3, 3)
    assert (report.bad_shards, report.missing, report.duplicates, report.quarantined) == ([], [], [], [])
    before = file_contents(tmp_path)
    assert repair_store(tmp_path) == [] and file_contents(tmp_path) == before


@pytest.mark.parametrize(("kind", "noise"), KINDS)
def test_quarantined_rows_are_not_damage(tmp_path: Path, kind: str, noise: str) -> None:
    bad = (9, 15, *range(16, 22))  # two rows of shard 1, all of shard 2
    report = verify_store(make_store(tmp_path, spec_of(kind, noise), bad))
    assert not report.ok and report.quarantined == list(bad) and report.checked == 14
    assert (report.bad_shards, report.missing, report.duplicates) == ([], [], [])
    assert repair_store(tmp_path) == []
    info = store_info(tmp_path)
    assert info["complete"] == PairReader(tmp_path).complete, "one meaning"
    assert (info["pairs"], info["quarantined"], info["complete"], info["shards"]) == (14, 8, True, 3)
    for shard in (1, 2):
        write_shard(tmp_path, spec_of(kind, noise), shard)
    assert verify_store(tmp_path).ok and store_info(tmp_path)["complete"]


def test_an_unfinished_store_only_lacks_shards(tmp_path: Path) -> None:
    make_store(tmp_path, shards=(0,))
    with PairWriter(tmp_path, SPEC, 1) as writer:
        writer.append(*rows(SPEC, [8, 10], bad=(10,)))
    (tmp_path / "partial" / "pairs-00002.host-1.tmp").write_bytes(b"half a file")
    (tmp_path / "claims" / "pairs-00001.json").write_text("{}")
    (tmp_path / "quarantine").mkdir(exist_ok=True)
    (tmp_path / "quarantine" / "pairs-00000.h5").write_bytes(b"moved away by a repair")
    record = encode_record(1, [{"index": 10, "prompt": LISTS["text"][3], "reason": "nan"}])
    (tmp_path / RECORD).write_bytes(record)  # as while the shard is being written
    report = verify_store(tmp_path)
    assert report.missing == [S1, S2] and report.checked == 8 and not report.ok
    assert (report.bad_shards, report.duplicates, report.quarantined) == ([], [], [])


def test_info_counts_the_pairs_of_unfinished_shards_by_themselves(tmp_path: Path) -> None:
    make_store(tmp_path, shards=(0,))
    assert store_info(tmp_path)["unfinished_pairs"] == 0
    for numbers in ([8, 10], [11]):
        with PairWriter(tmp_path, SPEC, 1) as writer:
            writer.append(*rows(SPEC, numbers))
    # A writer that was killed between its shard and its partial files left these.
    shutil.copy(tmp_path / S0, tmp_path / "partial" / "pairs-00000.rows-0000000000.h5")
    info = store_info(tmp_path)
    assert (info["pairs"], info["unfinished_pairs"], info["complete"]) == (8, 3, False)
    assert len(PairReader(tmp_path)) == 8
    # A store at a URL would have to download the files.
    assert store_info(f"file://{tmp_path}")["unfinished_pairs"] is None


def test_info_names_a_damaged_unfinished_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_store(tmp_path, shards=(0,))
    with PairWriter(tmp_path, SPEC, 1) as writer:
        writer.append(*rows(SPEC, [8, 10]))
    (part,) = (tmp_path / "partial").glob("*.h5")
    part.write_bytes(part.read_bytes()[:-1])
    assert store_info(tmp_path)["unfinished_pairs"] == 0
    (message,) = caplog.messages
    assert "pairs-00001.rows-0000000008.h5" in message and "d2g pairs repair" in message


def test_a_store_without_its_prompt_list(store: Path) -> None:
    prompts_path(store).unlink()
    report = verify_store(store)
    assert report.ok and not report.prompts_checked


@pytest.mark.parametrize("workers", [1, 3])
def test_the_report_does_not_depend_on_workers(tmp_path: Path, workers: int) -> None:
    make_store(tmp_path, bad=(3,))
    shard_path(tmp_path, 2).write_bytes(b"?")
    shutil.copy(shard_path(tmp_path, 0), tmp_path / "shards" / "copy.h5")
    assert verify_store(tmp_path, workers=workers) == verify_store(tmp_path, workers=2)


# Planted faults.


@pytest.mark.parametrize(("kind", "noise"), KINDS)
def test_a_flipped_bit_in_every_512_bytes_is_found(tmp_path: Path, kind: str, noise: str) -> None:
    make_store(tmp_path, spec_of(kind, noise), shards=(2,))
    path, draw = shard_path(tmp_path, 2), random.Random(kind + noise)
    good = path.read_bytes()
    places = [start + draw.randrange(min(512, len(good) - start)) for start in range(0, len(good), 512)]
    with h5py.File(path) as file:  # also flip a bit in every dataset
        for name in file:
            chunk = file[name].id.get_chunk_info(0)
            start = good.index(file[name].id.read_direct_chunk(chunk.chunk_offset)[1])
            places += [start, start + draw.randrange(chunk.size), start + chunk.size - 1]
    for place in places:
        path.write_bytes(with_flipped_bit(good, place, draw.randrange(8)))
        assert bad_files(tmp_path) == [S2], place
    path.write_bytes(good)
    assert bad_files(tmp_path) == []


def _empty(folder: Path) -> None:
    shard_path(folder, 1).write_bytes(b"")


def _append(folder: Path) -> None:
    with shard_path(folder, 1).open("ab") as file:
        file.write(b"\0")


def _swap(folder: Path) -> None:
    first, second = shard_path(folder, 0), shard_path(folder, 1)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def _copy_over(folder: Path) -> None:
    shutil.copy(shard_path(folder, 0), shard_path(folder, 1))


def _other_spec(folder: Path) -> None:
    other = make_store(folder.parent / "other", replace(read_spec(folder), steps=20), shards=(1,))
    shutil.copy(shard_path(other, 1), shard_path(folder, 1))


def _repeated_row(folder: Path) -> None:
    write_rows(folder, 1, select_rows(load_shard(folder, 1), [0, 1, 2, 2, 4, 5, 6, 7]))


def _lost_row(folder: Path) -> None:
    write_rows(folder, 1, select_rows(load_shard(folder, 1), [0, 1, 2, 4, 5, 6, 7]))


def _disorder(folder: Path) -> None:
    write_rows(folder, 1, select_rows(load_shard(folder, 1), [0, 1, 2, 4, 3, 5, 6, 7]))


def _foreign_row(folder: Path) -> None:
    batch = load_shard(folder, 1)
    batch.index[7] = 2**62
    write_rows(folder, 1, batch)


def _not_a_number(folder: Path) -> None:
    batch = load_shard(folder, 1)
    batch.latents[7, 3, 3, 3] = float("nan")
    write_rows(folder, 1, batch)


def _infinite(folder: Path) -> None:
    batch = load_shard(folder, 1)
    batch.latents[0, 0, 0, 0] = float("-inf")
    write_rows(folder, 1, batch)


def _other_noise(folder: Path) -> None:
    batch = load_shard(folder, 1)
    write_rows(folder, 1, replace(batch, noise=batch.noise[[1, 0, *range(2, 8)]]))


def _noise_off_by_one_bit(folder: Path) -> None:
    batch = load_shard(folder, 1)
    batch.noise[5].view(torch.int16)[2, 1, 3] ^= 1
    write_rows(folder, 1, batch)


def _aside_unrecorded(folder: Path) -> None:
    write_rows(folder, 1, select_rows(load_shard(folder, 1), [0, 1, 2, 4, 5, 6, 7]), quarantined=(12,))


def _folder(folder: Path) -> None:
    shard_path(folder, 1).unlink()
    shard_path(folder, 1).mkdir()


FAULTS: dict[Callable[[Path], None], tuple[list[str], str]] = {
    truncate: ([S1], "truncated"),
    _empty: ([S1], "truncated or overwritten (0 bytes"),
    _append: ([S1], "truncated or overwritten"),
    _swap: ([S0, S1], "holds pairs 8 to 15 (8 rows), its name says 0 to 7"),
    _copy_over: ([S1], "holds pairs 0 to 7 (8 rows), its name says 8 to 15"),
    _other_spec: ([S1], "another spec: steps (50 -> 20)"),
    _repeated_row: ([S1], "holds pairs 8 to 15 (8 rows)"),
    _lost_row: ([S1], "holds pairs 8 to 15 (7 rows)"),
    _disorder: ([S1], "not in order"),
    _foreign_row: ([S1], ""),
    _not_a_number: ([S1], "latent holds values that are not finite"),
    _infinite: ([S1], "latent holds values that are not finite"),
    _other_noise: ([S1], "noise"),
    _noise_off_by_one_bit: ([S1], "noise"),
    _aside_unrecorded: ([S1], "holds pairs 8 to 15 (7 rows) and quarantines 1, its name says"),
    _folder: ([S1], "Is a directory"),
}


@pytest.mark.parametrize(("kind", "noise"), [KINDS[0], KINDS[3], KINDS[4]])
@pytest.mark.parametrize("plant", FAULTS)
def test_planted_faults_are_found_and_repaired(
    tmp_path: Path, kind: str, noise: str, plant: Callable[[Path], None]
) -> None:
    spec = spec_of(kind, noise)
    store = make_store(tmp_path / "pairs", spec)
    before = file_contents(store)
    plant(store)
    names, reason = FAULTS[plant]
    report = verify_store(store)
    assert [bad["shard"] for bad in report.bad_shards] == names and not report.ok
    assert reason in report.bad_shards[0]["reason"] and report.missing == report.quarantined == []
    assert report.checked == sum(
        len(spec.rows(s)) for s in range(3) if f"shards/pairs-0000{s}.h5" not in names
    )
    duplicates = {_repeated_row: [10], _copy_over: list(range(8))}
    assert report.duplicates == duplicates.get(plant, [])
    assert repair_store(store) == names and verify_store(store).missing == names
    make_store(store, spec)
    assert verify_store(store).ok
    quarantined = {name for name in file_contents(store) if name.startswith("quarantine")}
    assert {name: data for name, data in file_contents(store).items() if name not in quarantined} == before


@pytest.mark.parametrize("kind", ["text", "label"])
def test_a_row_of_another_prompt_is_found(tmp_path: Path, kind: str) -> None:
    make_store(tmp_path, spec_of(kind))
    swap_prompt(tmp_path)
    report = verify_store(tmp_path)
    assert [bad["shard"] for bad in report.bad_shards] == [S1] and report.duplicates == []
    assert report.bad_shards[0]["reason"].startswith("pair 12 has prompt ")


def test_a_missing_shard(store: Path) -> None:
    shard_path(store, 1).unlink()
    report = verify_store(store)
    assert (report.missing, report.bad_shards, report.checked, report.ok) == ([S1], [], 14, False)


@pytest.mark.parametrize("name", ["notes.txt", "pairs-00003.h5", "pairs-0.h5", ".pairs-00000.h5", "folder"])
def test_a_file_that_is_not_a_shard(store: Path, name: str) -> None:
    path = store / "shards" / name
    path.mkdir() if name == "folder" else path.write_text("?")
    report = verify_store(store)
    assert report.bad_shards == [
        {"shard": f"shards/{name}", "reason": "not a shard of this store; move it away"}
    ]
    assert report.checked == 22 and report.duplicates == [] and not report.ok
    assert repair_store(store) == [f"shards/{name}"] and verify_store(store).ok


def test_copies_of_shards_are_duplicates(store: Path) -> None:
    shutil.copy(shard_path(store, 2), store / "shards" / "pairs-00002 (1).h5")
    shutil.copy(shard_path(store, 0), store / "shards" / "pairs-00003.h5")
    report = verify_store(store)
    assert len(report.bad_shards) == 2 and report.duplicates == [*range(8), *range(16, 22)]
    assert repair_store(store) == ["shards/pairs-00002 (1).h5", "shards/pairs-00003.h5"]
    assert verify_store(store).ok


def test_every_flip_in_store_json_is_found(store: Path) -> None:
    path = store / "store.json"
    good, draw = path.read_bytes(), random.Random(1)
    for place in range(len(good) - 1):  # the last is the newline
        path.write_bytes(with_flipped_bit(good, place, draw.randrange(8)))
        with pytest.raises(UserError, match=r"store\.json"):
            verify_store(store)


def test_every_flip_in_the_prompt_list_is_found(tmp_path: Path) -> None:
    store = make_store(tmp_path, shards=(1,))
    path, draw = prompts_path(store), random.Random(2)
    good = path.read_bytes()
    changed = [with_flipped_bit(good, place, draw.randrange(8)) for place in range(len(good))]
    for bad in (*changed, b"", good[:-1], good + b"\n", good + b'"x"\n', good.split(b"\n")[0] + b"\n"):
        path.write_bytes(bad)
        report = verify_store(store)
        assert [shard_report["shard"] for shard_report in report.bad_shards] == ["prompts.jsonl"], bad
        assert report.checked == 8 and not report.prompts_checked
    assert repair_store(store) == ["prompts.jsonl"] and bad_files(store) == []


def test_every_flip_in_a_quarantine_record_is_found(tmp_path: Path) -> None:
    make_store(tmp_path, bad=(12,), shards=(1,))
    path, draw = tmp_path / RECORD, random.Random(3)
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(with_flipped_bit(good, place, draw.randrange(8)))
        assert bad_files(tmp_path) == [RECORD], place
    assert repair_store(tmp_path) == [RECORD]
    report = verify_store(tmp_path)
    assert report.bad_shards == [] and report.quarantined == [12]
    assert [row["prompt"] for row in quarantined_rows(tmp_path, SPEC)[1]] == ["a cat"]


@pytest.mark.parametrize(
    ("pairs", "prompt", "says"),
    [
        ((), "x" * 90, "names pairs none, its shard quarantines 9"),
        ((9, 10), "x" * 90, "names pairs 9, 10, its shard quarantines 9"),
        ((10,), "x" * 90, "names pairs 10, its shard quarantines 9"),
        ((9,), "a cat", "has other prompts than the store's list"),
    ],
)
def test_a_record_that_disagrees_with_its_shard(
    tmp_path: Path, pairs: tuple[int, ...], prompt: str, says: str
) -> None:
    make_store(tmp_path, bad=(9,))
    write_record(tmp_path, 1, *({"index": i, "prompt": prompt, "reason": "nan"} for i in pairs))
    report = verify_store(tmp_path)
    assert report.bad_shards == [{"shard": RECORD, "reason": says}] and report.quarantined == [9]
    assert repair_store(tmp_path) == [RECORD] and bad_files(tmp_path) == []


def test_missing_outdated_and_foreign_records(tmp_path: Path) -> None:
    make_store(tmp_path, bad=(9,))
    record = (tmp_path / RECORD).read_bytes()
    (tmp_path / RECORD).unlink()
    report = verify_store(tmp_path)
    assert report.bad_shards == [{"shard": RECORD, "reason": "is missing; its shard quarantines 1 pairs"}]
    assert repair_store(tmp_path) == [] and bad_files(tmp_path) == []
    write_shard(tmp_path, SPEC, 1)  # completes the row and removes its record
    (tmp_path / RECORD).write_bytes(record)
    assert (
        bad_files(tmp_path) == [RECORD] and repair_store(tmp_path) == [RECORD] and verify_store(tmp_path).ok
    )
    for row in (
        {"index": 30, "prompt": "a cat"},
        {"index": 9},
        {"prompt": "a cat"},
        {"index": "9", "prompt": 1},
    ):
        write_record(tmp_path, 3, row)
        assert bad_files(tmp_path) == ["quarantine/pairs-00003.rows.json"]
    assert len(repair_store(tmp_path)) == 1 and verify_store(tmp_path).ok


def test_damaged_partial_shards_are_found(tmp_path: Path) -> None:
    make_store(tmp_path, shards=(0, 2))
    with PairWriter(tmp_path, SPEC, 1) as writer:
        writer.append(*rows(SPEC, [8, 9]))
    part = tmp_path / "partial" / "pairs-00001.rows-0000000008.h5"
    good = part.read_bytes()
    assert bad_files(tmp_path) == []
    for bad in (
        good[:-9],
        with_flipped_bit(good, len(good) // 2, 3),
        shard_path(tmp_path, 0).read_bytes(),
        b"",
    ):
        part.write_bytes(bad)
        assert bad_files(tmp_path) == [f"partial/{part.name}"]
    assert repair_store(tmp_path) == [f"partial/{part.name}"]
    write_shard(tmp_path, SPEC, 1)
    assert verify_store(tmp_path).ok


def test_quarantine_deletes_nothing(store: Path) -> None:
    for content in (b"first", b"second", b"third"):
        shard_path(store, 0).write_bytes(content)
        assert repair_store(store) == [S0]
    assert {p.read_bytes() for p in (store / "quarantine").iterdir()} == {b"first", b"second", b"third"}


def test_a_store_that_cannot_be_repaired_is_reported(store: Path) -> None:
    shard_path(store, 0).write_bytes(b"")
    (store / "quarantine").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot write .*quarantine.*no shard was deleted"):
        repair_store(store)


def test_threads_keep_order_and_stop_at_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    started, dropped, cancel = list[int](), Semaphore(0), Future.cancel

    def cancel_and_tell(future: Future[int]) -> bool:
        cancelled = cancel(future)
        dropped.release()
        return cancelled

    def call(number: int) -> int:
        started.append(number)
        # What starts beside the error ends after the caller has dropped the two calls behind it.
        for _ in range(2 if number > 20 else 0):
            dropped.acquire(timeout=60)
        time.sleep(0.001 * (number % 3))
        if number == 20:
            raise ValueError("twenty")
        return number * number

    assert list(in_threads(call, range(20), 3)) == [n * n for n in range(20)]
    started.clear()
    monkeypatch.setattr(Future, "cancel", cancel_and_tell)
    with pytest.raises(ValueError, match="twenty"):
        list(in_threads(call, range(10_000), 1))
    assert started in ([*range(21)], [*range(22)])  # item 22 was still queued and is dropped
