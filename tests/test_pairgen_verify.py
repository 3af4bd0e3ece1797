"""verify finds every planted fault and nothing else; repair mends it; merge joins what was made apart."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch
from torch import Tensor

from core import seeds
from core.errors import UserError
from core.latents import LatentSpace
from jobs import Ended, Running, d2g, make_pairs
from pairgen.layout import (
    StoreSpec,
    create_store,
    encode_record,
    pending,
    prompts_path,
    publish,
    quarantine_path,
    quarantined_rows,
    read_spec,
    shard_path,
    shards_present,
)
from pairgen.merge import merge_stores
from pairgen.prompts import PromptList, label_list, prompts_sha256
from pairgen.repair import repair_store
from pairgen.store import PairBatch, encode_rows, load_rows
from pairgen.verify import in_threads, store_info, verify_store
from pairgen.writer import PairWriter

LISTS = {
    "text": PromptList.of(["a cat", "ein Bär ☃", 'a "sign", red', "x" * 90]),
    "label": label_list(4),
    "none": PromptList.of([""]),
}
KINDS = [(kind, noise) for kind in LISTS for noise in ("stored", "seeded")]


def spec_of(kind: str = "text", noise: str = "stored", **changes: object) -> StoreSpec:
    """22 pairs in shards of 8, 8 and 6."""
    spec = StoreSpec(
        teacher="tiny",
        teacher_sha256="0" * 64,
        conditioning=kind,  # type: ignore[arg-type]
        prompts_sha256=prompts_sha256(LISTS[kind]),
        num_pairs=22,
        num_prompts=len(LISTS[kind]),
        per_prompt=3,
        solver="ddim",
        steps=50,
        spacing="leading",
        final_alpha_one=True,
        guidance=8.0,
        seed=5,
        latent_shape=(4, 4, 4),
        latent_space=LatentSpace(channels=4, downscale=8, scale=0.18215),
        noise=noise,  # type: ignore[arg-type]
        shard_size=8,
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


SPEC = spec_of()
Row = tuple[Tensor, Tensor, list[str], list[int]]


def rows(spec: StoreSpec, index: list[int], bad: tuple[int, ...] = ()) -> Row:
    """What a generator would append for these pairs: noise, latent (NaN for `bad`), prompts, index."""
    noise = seeds.noise(spec.seed, index, spec.latent_shape, spec.torch_dtype)
    latent = noise.float() * 0.5 + 1
    latent[[pair in bad for pair in index], 0, 0, 0] = float("nan")
    prompts = LISTS[spec.conditioning]
    return noise, latent, [prompts[spec.prompt_of(i)] for i in index], index


def write_shard(folder: Path, spec: StoreSpec, shard: int, bad: tuple[int, ...] = ()) -> None:
    with PairWriter(folder, spec, shard, retry=shard in shards_present(folder, spec)) as writer:
        if writer.missing:
            writer.append(*rows(spec, writer.missing, bad))
        writer.commit()


def make_store(
    folder: Path, spec: StoreSpec = SPEC, bad: tuple[int, ...] = (), shards: tuple[int, ...] = (0, 1, 2)
) -> Path:
    create_store(folder, spec)
    LISTS[spec.conditioning].save(prompts_path(folder))
    for shard in shards:
        if shard not in shards_present(folder, spec):
            write_shard(folder, spec, shard, bad)
    return folder


def pack(folder: Path, shard: int, batch: PairBatch, aside: tuple[int, ...] = ()) -> None:
    """Put rows under a shard's name with right checksums, whatever the rows are."""
    spec = read_spec(folder)
    publish(encode_rows(spec, batch, aside), shard_path(folder, shard), folder / "partial")


def taken(folder: Path, shard: int) -> PairBatch:
    return load_rows(shard_path(folder, shard), read_spec(folder))


def chosen(batch: PairBatch, keep: list[int]) -> PairBatch:
    prompts = [batch.prompts[row] for row in keep]
    return PairBatch(
        noise=batch.noise[keep], latent=batch.latent[keep], prompts=prompts, index=batch.index[keep]
    )


def flipped(data: bytes, position: int, bit: int) -> bytes:
    bad = bytearray(data)
    bad[position] ^= 1 << bit
    return bytes(bad)


def bad_files(folder: Path) -> list[str]:
    return [bad["shard"] for bad in verify_store(folder).bad_shards]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a store but scratch."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and "claims" not in p.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "pairs")


S0, S1, S2 = (f"shards/pairs-0000{shard}.h5" for shard in range(3))
RECORD = "quarantine/pairs-00001.rows.json"


# Sound stores raise no alarm.


@pytest.mark.parametrize(("kind", "noise"), KINDS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_sound_store_verifies(tmp_path: Path, kind: str, noise: str, dtype: str) -> None:
    spec, seen = spec_of(kind, noise, dtype=dtype), list[tuple[str, int, int]]()
    report = verify_store(make_store(tmp_path, spec), lambda *event: seen.append(event))
    assert report.ok and report.checked == 22 and report.prompts_checked and seen[-1] == ("verify", 3, 3)
    assert (report.bad_shards, report.missing, report.duplicates, report.quarantined) == ([], [], [], [])
    before = tree(tmp_path)
    assert repair_store(tmp_path) == [] and tree(tmp_path) == before


@pytest.mark.parametrize(("kind", "noise"), KINDS)
def test_quarantined_rows_are_no_damage(tmp_path: Path, kind: str, noise: str) -> None:
    bad = (9, 15, *range(16, 22))  # two rows of shard 1, all of shard 2
    report = verify_store(make_store(tmp_path, spec_of(kind, noise), bad))
    assert not report.ok and report.quarantined == list(bad) and report.checked == 14
    assert (report.bad_shards, report.missing, report.duplicates) == ([], [], [])
    assert repair_store(tmp_path) == []
    info = store_info(tmp_path)
    assert (info["pairs"], info["quarantined"], info["complete"], info["shards"]) == (14, 8, False, 3)
    for shard in (1, 2):
        write_shard(tmp_path, spec_of(kind, noise), shard)
    assert verify_store(tmp_path).ok and store_info(tmp_path)["complete"]


def test_an_unfinished_store_lacks_shards_and_nothing_else(tmp_path: Path) -> None:
    make_store(tmp_path, shards=(0,))
    with PairWriter(tmp_path, SPEC, 1) as writer:
        writer.append(*rows(SPEC, [8, 10], bad=(10,)))
    (tmp_path / "partial" / "pairs-00002.host-1.tmp").write_bytes(b"half a file")
    (tmp_path / "claims" / "pairs-00001.json").write_text("{}")
    (tmp_path / "quarantine").mkdir(exist_ok=True)
    (tmp_path / "quarantine" / "pairs-00000.h5").write_bytes(b"moved away by a repair")
    record = encode_record(1, [{"index": 10, "prompt": LISTS["text"][3], "reason": "nan"}])
    (tmp_path / RECORD).write_bytes(record)  # as while the shard is made
    report = verify_store(tmp_path)
    assert report.missing == [S1, S2] and report.checked == 8 and not report.ok
    assert (report.bad_shards, report.duplicates, report.quarantined) == ([], [], [])


def test_a_store_without_its_prompt_list_is_checked_otherwise(store: Path) -> None:
    prompts_path(store).unlink()
    report = verify_store(store)
    assert report.ok and not report.prompts_checked


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
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
    with h5py.File(path) as file:  # and in every dataset
        for name in file:
            chunk = file[name].id.get_chunk_info(0)
            start = good.index(file[name].id.read_direct_chunk(chunk.chunk_offset)[1])
            places += [start, start + draw.randrange(chunk.size), start + chunk.size - 1]
    for place in places:
        path.write_bytes(flipped(good, place, draw.randrange(8)))
        assert bad_files(tmp_path) == [S2], place
    path.write_bytes(good)
    assert bad_files(tmp_path) == []


def _truncate(folder: Path) -> None:
    path = shard_path(folder, 1)
    path.write_bytes(path.read_bytes()[:-1])


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
    pack(folder, 1, chosen(taken(folder, 1), [0, 1, 2, 2, 4, 5, 6, 7]))


def _lost_row(folder: Path) -> None:
    pack(folder, 1, chosen(taken(folder, 1), [0, 1, 2, 4, 5, 6, 7]))


def _disorder(folder: Path) -> None:
    pack(folder, 1, chosen(taken(folder, 1), [0, 1, 2, 4, 3, 5, 6, 7]))


def _foreign_row(folder: Path) -> None:
    batch = taken(folder, 1)
    batch.index[7] = 2**62
    pack(folder, 1, batch)


def _not_a_number(folder: Path) -> None:
    batch = taken(folder, 1)
    batch.latent[7, 3, 3, 3] = float("nan")
    pack(folder, 1, batch)


def _infinite(folder: Path) -> None:
    batch = taken(folder, 1)
    batch.latent[0, 0, 0, 0] = float("-inf")
    pack(folder, 1, batch)


def _other_noise(folder: Path) -> None:
    batch = taken(folder, 1)
    pack(folder, 1, replace(batch, noise=batch.noise[[1, 0, *range(2, 8)]]))


def _noise_off_by_one_bit(folder: Path) -> None:
    batch = taken(folder, 1)
    batch.noise[5].view(torch.int16)[2, 1, 3] ^= 1
    pack(folder, 1, batch)


def _other_prompt(folder: Path) -> None:
    batch = taken(folder, 1)
    prompts = list(LISTS[read_spec(folder).conditioning])
    wrong = prompts[(prompts.index(batch.prompts[4]) + 1) % len(prompts)]
    pack(folder, 1, replace(batch, prompts=[*batch.prompts[:4], wrong, *batch.prompts[5:]]))


def _aside_unrecorded(folder: Path) -> None:
    pack(folder, 1, chosen(taken(folder, 1), [0, 1, 2, 4, 5, 6, 7]), aside=(12,))


def _folder(folder: Path) -> None:
    shard_path(folder, 1).unlink()
    shard_path(folder, 1).mkdir()


FAULTS: dict[Callable[[Path], None], tuple[list[str], str]] = {
    _truncate: ([S1], "truncated"),
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
    _aside_unrecorded: ([S1], "holds pairs 8 to 15 (7 rows) and sets aside 1, its name says"),
    _folder: ([S1], "Is a directory"),
}


@pytest.mark.parametrize(("kind", "noise"), [KINDS[0], KINDS[3], KINDS[4]])
@pytest.mark.parametrize("plant", FAULTS)
def test_planted_faults_are_found_and_mended(
    tmp_path: Path, kind: str, noise: str, plant: Callable[[Path], None]
) -> None:
    spec = spec_of(kind, noise)
    store = make_store(tmp_path / "pairs", spec)
    before = tree(store)
    plant(store)
    names, reason = FAULTS[plant]
    report = verify_store(store)
    assert [bad["shard"] for bad in report.bad_shards] == names and not report.ok
    assert reason in report.bad_shards[0]["reason"] and report.missing == report.quarantined == []
    assert report.checked == sum(
        len(spec.rows(s)) for s in range(3) if f"shards/pairs-0000{s}.h5" not in names
    )
    again = {_repeated_row: [10], _copy_over: list(range(8))}
    assert report.duplicates == again.get(plant, [])
    assert repair_store(store) == names and verify_store(store).missing == names
    make_store(store, spec)
    assert verify_store(store).ok
    quarantined = {name for name in tree(store) if name.startswith("quarantine")}
    assert {name: data for name, data in tree(store).items() if name not in quarantined} == before


@pytest.mark.parametrize("kind", ["text", "label"])
def test_a_row_of_another_prompt_is_found(tmp_path: Path, kind: str) -> None:
    make_store(tmp_path, spec_of(kind))
    _other_prompt(tmp_path)
    report = verify_store(tmp_path)
    assert [bad["shard"] for bad in report.bad_shards] == [S1] and report.duplicates == []
    assert report.bad_shards[0]["reason"].startswith("pair 12 has prompt ")


def test_a_missing_shard(store: Path) -> None:
    shard_path(store, 1).unlink()
    report = verify_store(store)
    assert (report.missing, report.bad_shards, report.checked, report.ok) == ([S1], [], 14, False)


@pytest.mark.parametrize("name", ["notes.txt", "pairs-00003.h5", "pairs-0.h5", ".pairs-00000.h5", "folder"])
def test_a_file_that_is_no_shard(store: Path, name: str) -> None:
    path = store / "shards" / name
    path.mkdir() if name == "folder" else path.write_text("?")
    report = verify_store(store)
    assert report.bad_shards == [
        {"shard": f"shards/{name}", "reason": "no shard of this store; move it away"}
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
        path.write_bytes(flipped(good, place, draw.randrange(8)))
        with pytest.raises(UserError, match=r"store\.json"):
            verify_store(store)


def test_every_flip_in_the_prompt_list_is_found(tmp_path: Path) -> None:
    store = make_store(tmp_path, shards=(1,))
    path, draw = prompts_path(store), random.Random(2)
    good = path.read_bytes()
    changed = [flipped(good, place, draw.randrange(8)) for place in range(len(good))]
    for bad in (*changed, b"", good[:-1], good + b"\n", good + b'"x"\n', good.split(b"\n")[0] + b"\n"):
        path.write_bytes(bad)
        report = verify_store(store)
        assert [found["shard"] for found in report.bad_shards] == ["prompts.jsonl"], bad
        assert report.checked == 8 and not report.prompts_checked
    assert repair_store(store) == ["prompts.jsonl"] and bad_files(store) == []


def test_every_flip_in_a_quarantine_record_is_found(tmp_path: Path) -> None:
    make_store(tmp_path, bad=(12,), shards=(1,))
    path, draw = tmp_path / RECORD, random.Random(3)
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(flipped(good, place, draw.randrange(8)))
        assert bad_files(tmp_path) == [RECORD], place
    assert repair_store(tmp_path) == [RECORD]
    report = verify_store(tmp_path)
    assert report.bad_shards == [] and report.quarantined == [12]
    assert [row["prompt"] for row in quarantined_rows(tmp_path, SPEC)[1]] == ["a cat"]


def _write_record(folder: Path, shard: int, *rows: dict[str, object]) -> None:
    quarantine_path(folder, shard).parent.mkdir(exist_ok=True)
    quarantine_path(folder, shard).write_bytes(encode_record(shard, rows))


@pytest.mark.parametrize(
    ("pairs", "prompt", "says"),
    [
        ((), "x" * 90, "names pairs none, its shard sets aside 9"),
        ((9, 10), "x" * 90, "names pairs 9, 10, its shard sets aside 9"),
        ((10,), "x" * 90, "names pairs 10, its shard sets aside 9"),
        ((9,), "a cat", "names other prompts than the store's list"),
    ],
)
def test_a_record_that_disagrees_with_its_shard(
    tmp_path: Path, pairs: tuple[int, ...], prompt: str, says: str
) -> None:
    make_store(tmp_path, bad=(9,))
    _write_record(tmp_path, 1, *({"index": i, "prompt": prompt, "reason": "nan"} for i in pairs))
    report = verify_store(tmp_path)
    assert report.bad_shards == [{"shard": RECORD, "reason": says}] and report.quarantined == [9]
    assert repair_store(tmp_path) == [RECORD] and bad_files(tmp_path) == []


def test_a_lost_a_stale_and_a_strange_record(tmp_path: Path) -> None:
    make_store(tmp_path, bad=(9,))
    kept = (tmp_path / RECORD).read_bytes()
    (tmp_path / RECORD).unlink()
    report = verify_store(tmp_path)
    assert report.bad_shards == [{"shard": RECORD, "reason": "is not there; its shard sets aside 1 pairs"}]
    assert repair_store(tmp_path) == [] and bad_files(tmp_path) == []
    write_shard(tmp_path, SPEC, 1)  # now the row is there, and its record gone
    (tmp_path / RECORD).write_bytes(kept)
    assert (
        bad_files(tmp_path) == [RECORD] and repair_store(tmp_path) == [RECORD] and verify_store(tmp_path).ok
    )
    for row in (
        {"index": 30, "prompt": "a cat"},
        {"index": 9},
        {"prompt": "a cat"},
        {"index": "9", "prompt": 1},
    ):
        _write_record(tmp_path, 3, row)
        assert bad_files(tmp_path) == ["quarantine/pairs-00003.rows.json"]
    assert len(repair_store(tmp_path)) == 1 and verify_store(tmp_path).ok


def test_damaged_unfinished_work_is_found(tmp_path: Path) -> None:
    make_store(tmp_path, shards=(0, 2))
    with PairWriter(tmp_path, SPEC, 1) as writer:
        writer.append(*rows(SPEC, [8, 9]))
    part = tmp_path / "partial" / "pairs-00001.rows-0000000008.h5"
    good = part.read_bytes()
    assert bad_files(tmp_path) == []
    for bad in (good[:-9], flipped(good, len(good) // 2, 3), shard_path(tmp_path, 0).read_bytes(), b""):
        part.write_bytes(bad)
        assert bad_files(tmp_path) == [f"partial/{part.name}"]
    assert repair_store(tmp_path) == [f"partial/{part.name}"]
    write_shard(tmp_path, SPEC, 1)
    assert verify_store(tmp_path).ok


def test_quarantine_keeps_everything(store: Path) -> None:
    for content in (b"first", b"second", b"third"):
        shard_path(store, 0).write_bytes(content)
        assert repair_store(store) == [S0]
    assert {p.read_bytes() for p in (store / "quarantine").iterdir()} == {b"first", b"second", b"third"}


def test_a_store_that_cannot_be_mended_says_so(store: Path) -> None:
    shard_path(store, 0).write_bytes(b"")
    (store / "quarantine").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot write .*quarantine.*no shard was deleted"):
        repair_store(store)


def test_threads_keep_order_and_stop_at_an_error() -> None:
    begun = list[int]()

    def call(number: int) -> int:
        begun.append(number)
        time.sleep(0.5 if number > 20 else 0.001 * (number % 3))
        if number == 20:
            raise ValueError("twenty")
        return number * number

    assert list(in_threads(call, range(20), 3)) == [n * n for n in range(20)]
    begun.clear()
    with pytest.raises(ValueError, match="twenty"):
        list(in_threads(call, range(10_000), 1))
    assert begun in ([*range(21)], [*range(22)])  # 22 waited in the queue and was dropped


# Repair with a teacher.


@pytest.fixture(scope="module")
def job(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prompts.txt and pairs/ of a tiny teacher. Read only."""
    folder = tmp_path_factory.mktemp("job")
    make_pairs(teacher, folder)
    return folder


@pytest.fixture
def pairs(job: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(job / "pairs", tmp_path / "pairs"))


def close(found: PairBatch, expected: PairBatch) -> bool:
    """The same rows; latents but for the rounding of another batch size."""
    same = torch.equal(found.noise, expected.noise) and torch.equal(found.index, expected.index)
    apart = (found.latent - expected.latent).abs().max()
    return same and found.prompts == expected.prompts and float(apart) < 1e-4


def last_json(ended: Ended) -> dict[str, object]:
    found: dict[str, object] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_repair_needs_nothing_but_the_store(job: Path, pairs: Path, tmp_path: Path) -> None:
    path = shard_path(pairs, 1)
    path.write_bytes(flipped(path.read_bytes(), 3000, 1))
    plan = d2g(["pairs", "repair", str(pairs), "--dry-run", "--json"], tmp_path / "log")
    assert last_json(plan)["rows_to_make"] == 5 and plan.code == 0 and not (pairs / "quarantine").exists()
    ended = d2g(["pairs", "repair", str(pairs), "--json"], tmp_path / "log")
    assert ended.code == 0 and last_json(ended) == {"quarantined": [S1], "regenerated": 5}, ended.stderr
    assert verify_store(pairs).ok and close(taken(pairs, 1), taken(job / "pairs", 1))


def test_repair_tries_quarantined_rows_again(job: Path, pairs: Path, tmp_path: Path) -> None:
    batch, spec = taken(pairs, 1), read_spec(pairs)
    pack(pairs, 1, chosen(batch, [0, 1, 3, 4]), aside=(7,))
    _write_record(pairs, 1, {"index": 7, "prompt": batch.prompts[2], "reason": "its latent was not finite"})
    verified = d2g(["pairs", "verify", str(pairs), "--json"], tmp_path / "log")
    assert verified.code == 1 and last_json(verified)["quarantined"] == [7]
    assert "not ok: 1 pairs without a finite latent; `d2g pairs repair" in verified.error
    only_moved = d2g(["pairs", "repair", str(pairs), "--no-regenerate", "--json"], tmp_path / "log")
    assert last_json(only_moved) == {"quarantined": [], "regenerated": 0} and only_moved.code == 0
    assert verify_store(pairs).quarantined == [7]
    ended = d2g(["pairs", "repair", str(pairs), "--json"], tmp_path / "log")
    assert ended.code == 0 and last_json(ended) == {"quarantined": [], "regenerated": 1}, ended.stderr
    assert verify_store(pairs).ok and quarantined_rows(pairs, spec) == {}
    assert close(taken(pairs, 1), taken(job / "pairs", 1))


def test_repair_without_a_prompt_list_asks_for_it(job: Path, pairs: Path, tmp_path: Path) -> None:
    prompts_path(pairs).write_text("?")
    shard_path(pairs, 2).unlink()
    words = ["pairs", "repair", str(pairs), "--json"]
    ended = d2g(words, tmp_path / "log")
    assert ended.code == 1 and "holds no prompt list to make them from; give --prompts FILE" in ended.error
    assert "moved 1 files to" in ended.stderr and (pairs / "quarantine" / "prompts.jsonl").exists()
    ended = d2g([*words, "--prompts", str(job / "prompts.txt")], tmp_path / "log")
    assert ended.code == 0 and last_json(ended)["regenerated"] == 2, ended.stderr
    assert verify_store(pairs).ok and verify_store(pairs).prompts_checked


def test_verify_and_info_for_people(pairs: Path, tmp_path: Path) -> None:
    _truncate(pairs)
    shard_path(pairs, 0).unlink()
    ended = d2g(["pairs", "verify", str(pairs), "--workers", "1"], tmp_path / "log")
    assert (
        ended.code == 1
        and "1 files that cannot be trusted, 1 shards missing; `d2g pairs repair" in ended.error
    )
    assert "truncated" in ended.stdout and S1 in ended.stdout
    shown = d2g(["pairs", "info", str(pairs)], tmp_path / "log")
    assert shown.code == 0 and "spec.guidance" in shown.stdout and "4, 4, 4" in shown.stdout


# Merging.


def test_merge_joins_shards_made_apart(tmp_path: Path, store: Path) -> None:
    a = make_store(tmp_path / "a", shards=(0, 2))
    b = make_store(tmp_path / "b", shards=(1, 2))
    before = tree(a), tree(b)
    for copied in (3, 0):  # again is no clash
        report = merge_stores([a, b], tmp_path / "out")
        assert (report.pairs, report.shards, report.copied, report.differing) == (22, 3, copied, [])
        assert tree(tmp_path / "out") == tree(store) and verify_store(tmp_path / "out").ok
    assert (tree(a), tree(b)) == before
    merge_stores([b], a)  # into one of them
    assert tree(a) == tree(store)
    merge_stores([a, a], a)
    assert tree(a) == tree(store)


def test_merge_by_links(tmp_path: Path, store: Path) -> None:
    report = merge_stores([store], tmp_path / "out", link=True)
    assert report.copied == 3 and verify_store(tmp_path / "out").ok
    assert shard_path(tmp_path / "out", 1).samefile(shard_path(store, 1))
    assert merge_stores([store], tmp_path / "out", link=True).copied == 0
    assert not list((tmp_path / "out" / "partial").iterdir())


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or os.stat("/dev/shm").st_dev == os.stat("/tmp").st_dev, reason="one disk"
)
def test_links_across_disks_are_refused(store: Path, tmp_path: Path) -> None:
    out = Path("/dev/shm") / f"d2g-{os.getpid()}-{tmp_path.name}"
    try:
        with pytest.raises(UserError, match=r"hard link of .*pairs-0000\d\.h5.*leave out --link"):
            merge_stores([store], out, link=True)
        assert not list((out / "partial").iterdir())
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _other_rounding(folder: Path, by: float, shards: tuple[int, ...] = (1,)) -> Path:
    make_store(folder, shards=shards)
    for shard in shards:
        batch = taken(folder, shard)
        batch.latent[3, 2, 1, 0] += by
        pack(folder, shard, batch)
    return folder


def test_merge_keeps_the_first_of_shards_that_rounding_tells_apart(tmp_path: Path, store: Path) -> None:
    other = _other_rounding(tmp_path / "other", 0.01)
    report = merge_stores([store, other], tmp_path / "out")
    assert [(d["shard"], d["kept"], d["left_out"]) for d in report.differing] == [
        ("pairs-00001.h5", str(shard_path(store, 1)), str(shard_path(other, 1)))
    ]
    assert 0.005 < report.differing[0]["max_abs_err"] < 0.02 and tree(tmp_path / "out") == tree(store)
    report = merge_stores([other, store], tmp_path / "out")  # what is there comes first
    assert report.copied == 0 and len(report.differing) == 1 and tree(tmp_path / "out") == tree(store)
    assert taken(merged(tmp_path / "b", other, store), 1).latent.equal(taken(other, 1).latent)
    with pytest.raises(
        UserError, match=r"pairs/shards/pairs-00001.*other/shards/pairs-00001.*apart, tolerance 0\.001"
    ):
        merge_stores([store, other], tmp_path / "c", tolerance=0.001)


def merged(out: Path, *folders: Path) -> Path:
    merge_stores(folders, out)
    return out


def test_merge_refuses_clashes_damage_and_other_specs(tmp_path: Path, store: Path) -> None:
    other = make_store(tmp_path / "other", replace(SPEC, seed=6))
    with pytest.raises(UserError, match=r"seed \(6 -> 5\)"):
        merge_stores([store, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="nothing to merge"):
        merge_stores([], tmp_path / "out")
    clash = _other_rounding(tmp_path / "clash", 1.0)
    with pytest.raises(
        UserError, match=r"pairs-00001\.h5 and .*clash.* hold different rows.*latents up to 1 apart"
    ):
        merge_stores([store, clash], tmp_path / "out")
    _truncate(store)
    with pytest.raises(UserError, match=r"pairs-00001\.h5: truncated.*d2g pairs repair .*pairs`, then merge"):
        merge_stores([store], tmp_path / "out2")
    prompts_path(clash).write_bytes(b'"a"\n')
    with pytest.raises(UserError, match=r"clash/prompts\.jsonl: not the prompts.*d2g pairs repair"):
        merge_stores([clash], tmp_path / "out3")


def test_merge_of_stores_without_lists_compares_their_prompts(tmp_path: Path, store: Path) -> None:
    other = make_store(tmp_path / "other")
    for folder in (store, other):
        prompts_path(folder).unlink()
    merge_stores([store, other], tmp_path / "out")
    assert not prompts_path(tmp_path / "out").exists()
    _other_prompt(other)
    with pytest.raises(UserError, match=r"hold different rows for the same pairs \(other noise or prompts\)"):
        merge_stores([store, other], tmp_path / "out")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_merge_keeps_the_shard_with_the_most_rows(
    tmp_path: Path, store: Path, order: tuple[int, int]
) -> None:
    few = make_store(tmp_path / "few", bad=(9, 10, 17))
    folders = [[store, few][number] for number in order]
    assert tree(merged(tmp_path / "out", *folders)) == tree(store)
    fewer = make_store(tmp_path / "fewer", bad=(9, 17))
    report = merge_stores([few, fewer], tmp_path / "both")
    assert report.pairs == 20 and tree(tmp_path / "both") == tree(fewer)
    report = merge_stores([store], tmp_path / "both")  # the missing rows arrive later
    assert report.pairs == 22 and report.copied == 2
    assert tree(tmp_path / "both") == tree(store) and verify_store(tmp_path / "both").ok


def test_merge_refuses_a_shard_whose_record_is_lost(tmp_path: Path) -> None:
    few = make_store(tmp_path / "few", bad=(9,))
    (few / RECORD).unlink()
    with pytest.raises(UserError, match=r"rows\.json.*d2g pairs repair .*few"):
        merge_stores([few], tmp_path / "out")


def test_a_merge_killed_anywhere_is_finished_by_the_same_command(tmp_path: Path) -> None:
    spec = replace(SPEC, num_pairs=96)
    whole = make_store(tmp_path / "whole", spec, bad=(3, 70), shards=tuple(range(12)))
    few = make_store(tmp_path / "few", spec, bad=(3, 50, 70), shards=(0, 3, 6, 8, 9))
    words = ["pairs", "merge", str(few), str(whole), "--out", str(tmp_path / "out"), "--json"]
    moments, unfinished = random.Random(4), 0
    for _ in range(5):
        running = Running(words, tmp_path / "log")
        time.sleep(moments.uniform(0.02, 0.15))
        running.send(9)
        unfinished += running.wait().code == -9
        if (tmp_path / "out" / "store.json").exists():
            assert verify_store(tmp_path / "out").bad_shards == []
    assert unfinished > 0
    ended = d2g(words, tmp_path / "log")
    assert ended.code == 0 and last_json(ended)["pairs"] == 94, ended.stderr
    scratch = {name for name in tree(tmp_path / "out") if name.startswith("partial")}
    assert {n: d for n, d in tree(tmp_path / "out").items() if n not in scratch} == tree(whole)


def test_merge_on_the_command_line(pairs: Path, tmp_path: Path) -> None:
    words = ["pairs", "merge", str(pairs), "--out", str(tmp_path / "out")]
    plan = d2g([*words, "--dry-run", "--json"], tmp_path / "log")
    assert last_json(plan)["shards"] == {str(pairs): 3} and not (tmp_path / "out").exists()
    ended = d2g([*words, "--link", "--json"], tmp_path / "log")
    assert last_json(ended)["pairs"] == 12 and last_json(ended)["copied"] == 3, ended.stderr
    assert verify_store(tmp_path / "out").ok and pending(tmp_path / "out", read_spec(pairs)) == []
