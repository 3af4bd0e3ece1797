"""The pair store: round trips, crashes, damage, full disks. All files, kills and errors are real."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from core import seeds
from core.errors import SettingError, UserError
from core.latents import LatentSpace
from pairgen.layout import quarantined_rows
from pairgen.reader import PairReader
from pairgen.repair import repair_store
from pairgen.store import PairBatch, StoreSpec, create_store, load_rows, pending, read_spec
from pairgen.verify import store_info, verify_store
from pairgen.writer import PairWriter, Pen

ROOT = Path(__file__).parents[1]
SPEC = StoreSpec(
    teacher="tiny",
    teacher_sha256="0" * 64,
    prompts_sha256="1" * 64,
    num_pairs=22,
    num_prompts=4,
    per_prompt=3,
    solver="ddim",
    steps=50,
    spacing="leading",
    final_alpha_one=True,
    guidance=8.0,
    seed=5,
    latent_shape=(4, 8, 8),
    latent_space=LatentSpace(channels=4, downscale=8, scale=0.18215),
    shard_size=8,
)
PROMPTS = ["a cat", "ein Bär ☃", "", 'a "sign", red']


def rows(spec: StoreSpec, index: list[int]) -> tuple[Tensor, Tensor, list[str], list[int]]:
    """What a generator would append for these pairs: noise, latent, prompts, index."""
    noise = seeds.noise(spec.seed, index, spec.latent_shape, spec.torch_dtype)
    return noise, noise.float() * 0.5 + 1, [PROMPTS[spec.prompt_of(i)] for i in index], index


def write_shard(folder: Path, spec: StoreSpec, shard: int, batch: int = 3, flush_seconds: float = 60) -> None:
    with PairWriter(folder, spec, shard, flush_seconds=flush_seconds) as writer:
        while writer.missing:
            writer.append(*rows(spec, writer.missing[:batch]))
        writer.commit()


def make_store(folder: Path, spec: StoreSpec = SPEC) -> Path:
    create_store(folder, spec)
    for work in pending(folder, spec):
        write_shard(folder, spec, work.start // spec.shard_size)
    return folder


def same(a: PairBatch, b: PairBatch) -> bool:
    tensors = ((a.noise, b.noise), (a.latent, b.latent), (a.index, b.index))
    return a.prompts == b.prompts and all(torch.equal(x, y) for x, y in tensors)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("whole") / "deep" / "pairs")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "pairs")


FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns of threads


def start(job: Callable[[Path, Connection], None], folder: Path) -> tuple[BaseProcess, Connection]:
    """`job(folder, pipe)` in a forked process, and the pipe's other end."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=job, args=(folder, theirs))
    child.start()
    theirs.close()
    return child, ours


def kill(child: BaseProcess) -> None:
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL


# What goes in comes out.


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("noise", ["stored", "seeded"])
def test_round_trip(tmp_path: Path, dtype: str, noise: str) -> None:
    spec = replace(SPEC, dtype=dtype, noise=noise)
    reader = PairReader(make_store(tmp_path, spec), expect=spec)
    assert len(reader) == 22 and reader.complete and reader.spec == spec and read_spec(tmp_path) == spec
    order = [21, 0, 8, 7, 0, 15]
    found, (expected_noise, latent, prompts, _) = reader.read(order), rows(spec, order)
    assert found.noise.dtype == found.latent.dtype == torch.float32 and found.index.tolist() == order
    assert torch.equal(found.noise, expected_noise.float()) and found.prompts == prompts
    assert torch.equal(found.latent, latent.to(spec.torch_dtype).float())
    assert reader.prompts() == PROMPTS
    with h5py.File(tmp_path / "shards" / "pairs-00000.h5") as file:
        assert ("noise" in file) == (noise == "stored")
        assert all(file[name].fletcher32 for name in file)


def test_rows_do_not_depend_on_batches_flushes_or_order(tmp_path: Path, whole: Path) -> None:
    create_store(tmp_path, SPEC)
    for shard in (2, 0, 1):
        with PairWriter(tmp_path, SPEC, shard, flush_seconds=0) as writer:
            for index in reversed(writer.missing):
                writer.append(*rows(SPEC, [index]))
            writer.commit()
    every = list(range(22))
    assert same(PairReader(tmp_path).read(every), PairReader(whole).read(every))
    assert not list((tmp_path / "partial").iterdir())


def test_pending_and_an_incomplete_store(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    assert pending(tmp_path, SPEC) == [range(0, 8), range(8, 16), range(16, 22)]
    assert len(PairReader(tmp_path)) == 0 and PairReader(tmp_path).prompts() == []
    for shard in (2, 0):
        write_shard(tmp_path, SPEC, shard)
    reader = PairReader(tmp_path)
    assert pending(tmp_path, SPEC) == [range(8, 16)] and not reader.complete and len(reader) == 14
    assert reader.read(range(14)).index.tolist() == [*range(8), *range(16, 22)]
    info = store_info(tmp_path)
    assert (info["pairs"], info["shards"], info["complete"]) == (14, 2, False)
    assert info["spec"] == SPEC.as_json() and info["gib"] > 0
    report = verify_store(tmp_path)
    assert not report.ok and report.missing == ["shards/pairs-00001.h5"] and report.checked == 14
    with pytest.raises(IndexError, match="14 of 14"):
        reader.read([14])


def test_a_shard_is_whole_once(store: Path) -> None:
    with pytest.raises(UserError, match="already whole"), PairWriter(store, SPEC, 0):
        pass


def test_prompt_of_wraps_around() -> None:
    assert [SPEC.prompt_of(i) for i in (0, 2, 3, 11, 12, 21)] == [0, 0, 1, 3, 0, 3]


def test_one_spec_has_one_digest_however_its_numbers_are_spelt(tmp_path: Path) -> None:
    spec = replace(SPEC, guidance=8, latent_space=LatentSpace(channels=4, downscale=8, scale=1, shift=0))
    create_store(tmp_path, spec)
    assert read_spec(tmp_path).sha256 == spec.sha256 != SPEC.sha256


@pytest.mark.parametrize(
    "wrong",
    [{"num_pairs": 0}, {"seed": -1}, {"dtype": "int8"}, {"noise": "none"}, {"latent_shape": (3, 8, 8)}],
)
def test_impossible_specs(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        replace(SPEC, **wrong)  # type: ignore[arg-type]


# Several processes.


class Rows(torch.utils.data.Dataset[int]):
    def __init__(self, reader: PairReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, str, Tensor]:
        batch = self.reader.read([row])
        return batch.noise[0], batch.latent[0], batch.prompts[0], batch.index[0]


@FORKS
def test_a_reader_crosses_a_fork(whole: Path) -> None:
    reader = PairReader(whole)
    before = reader.read(range(22))  # all files are open now
    for _ in range(2):
        loader = DataLoader(Rows(reader), batch_size=5, num_workers=2, multiprocessing_context="fork")
        parts = list(loader)
        prompts = [prompt for part in parts for prompt in part[2]]
        noise, latent, index = (torch.cat([part[i] for part in parts]) for i in (0, 1, 3))
        assert same(PairBatch(noise=noise, latent=latent, prompts=prompts, index=index), before)
        assert same(reader.read(range(22)), before)


def test_a_reader_can_be_pickled(whole: Path) -> None:
    reader = PairReader(whole)
    before = reader.read([3, 20])
    assert same(pickle.loads(pickle.dumps(reader)).read([3, 20]), before)


# Crashes.


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, UserError])
def test_leaving_early_keeps_every_row(tmp_path: Path, error: type[BaseException]) -> None:
    create_store(tmp_path, SPEC)
    with pytest.raises(error), PairWriter(tmp_path, SPEC, 1) as writer:
        writer.append(*rows(SPEC, [8, 9, 10]))
        raise error("stop")
    assert not list((tmp_path / "shards").iterdir())
    with PairWriter(tmp_path, SPEC, 1) as writer:
        assert writer.missing == [11, 12, 13, 14, 15]


def _flush_thrice_then_wait(folder: Path, done: Connection) -> None:
    with PairWriter(folder, SPEC, 0, flush_seconds=0) as writer:
        for start in (0, 2, 4):
            writer.append(*rows(SPEC, [start, start + 1]))
        writer.flush_seconds = 1e9
        writer.append(*rows(SPEC, [6]))
        (folder / "partial" / "pairs-00000.host-1.tmp").write_bytes(b"half a file")
        done.send("6 rows flushed, 1 in memory")
        signal.pause()


@FORKS
def test_kill_inside_a_shard_loses_nothing_flushed(tmp_path: Path, whole: Path) -> None:
    create_store(tmp_path, SPEC)
    child, pipe = start(_flush_thrice_then_wait, tmp_path)
    assert pipe.recv() == "6 rows flushed, 1 in memory"
    kill(child)
    assert not list((tmp_path / "shards").iterdir()) and pending(tmp_path, SPEC)[0] == range(8)
    with PairWriter(tmp_path, SPEC, 0) as writer:
        assert writer.missing == [6, 7]
        writer.append(*rows(SPEC, writer.missing))
        writer.commit()
    assert same(PairReader(tmp_path).read(range(8)), PairReader(whole).read(range(8)))
    assert not list((tmp_path / "partial").iterdir())


def _write_on_and_on(folder: Path, done: Connection) -> None:
    spec = read_spec(folder)
    for shard in range(spec.num_shards):
        write_shard(folder, spec, shard, batch=1, flush_seconds=0)
        done.send(shard)


@FORKS
@pytest.mark.parametrize("moment", [0.0, 0.017, 0.031])
def test_kill_at_any_moment_shows_only_whole_files(tmp_path: Path, moment: float) -> None:
    create_store(tmp_path, replace(SPEC, num_pairs=100_000))
    child, pipe = start(_write_on_and_on, tmp_path)
    assert pipe.recv() == 0
    time.sleep(moment)
    kill(child)
    report = verify_store(tmp_path)
    assert report.checked >= 8 and report.bad_shards == [] and report.duplicates == []
    assert PairReader(tmp_path).read([0]).index.tolist() == [0]


def test_leftovers_of_a_kill_during_commit_are_swept(store: Path) -> None:
    for name in ("pairs-00000.rows-0000000000.h5", "pairs-00000.lock", "pairs-00001.host-1.tmp"):
        (store / "partial" / name).write_bytes(b"left over")
    (store / "partial" / "pairs-00003.rows-0000000024.h5").write_bytes(b"somebody else's")
    create_store(store, SPEC)
    assert [p.name for p in (store / "partial").iterdir()] == ["pairs-00003.rows-0000000024.h5"]


def test_damaged_partial_file_is_named_and_repaired(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    with PairWriter(tmp_path, SPEC, 0) as writer:
        writer.append(*rows(SPEC, [0, 1]))
    part = tmp_path / "partial" / "pairs-00000.rows-0000000000.h5"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"rows-0000000000.*truncated.*d2g pairs repair"):
        PairWriter(tmp_path, SPEC, 0).__enter__()
    assert repair_store(tmp_path) == ["partial/pairs-00000.rows-0000000000.h5"]
    write_shard(tmp_path, SPEC, 0)


# Rows that must not get in.


def test_append_refuses_wrong_rows_and_keeps_the_earlier(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    noise, latent, prompts, index = rows(SPEC, [2, 3])
    broken, unrounded = latent.clone(), noise.float() + 1e-4
    broken[1, 0, 0, 0] = float("nan")
    with PairWriter(tmp_path, SPEC, 0) as writer:
        writer.append(*rows(SPEC, [0, 1]))
        with pytest.raises(UserError, match=r"noise of pairs \[2, 3\] cannot"):
            writer.append(broken, latent, prompts, index)
        with pytest.raises(UserError, match=r"noise of pairs \[2, 3\] cannot be read back"):
            writer.append(unrounded, latent, prompts, index)
        with pytest.raises(UserError, match=r"latent of pairs \[2, 3\] is \(2, 4, 8, 4\)"):
            writer.append(noise, latent[..., :4], prompts, index)
        with pytest.raises(UserError, match=r"torch\.int32"):
            writer.append(noise, latent.int(), prompts, index)
        with pytest.raises(UserError, match="expected 2 prompts"):
            writer.append(noise, latent, prompts[:1], index)
        with pytest.raises(UserError, match="NUL"):
            writer.append(noise, latent, ["a", "b\0"], index)
        for wrong in ([1, 2], [2, 2], [7, 8], []):
            with pytest.raises(UserError, match=re.escape(f"got pairs {wrong}")):
                writer.append(noise, latent, prompts, wrong)
        assert writer.missing == [2, 3, 4, 5, 6, 7]
        with pytest.raises(AssertionError, match="6 rows missing"):
            writer.commit()
        writer.append(*rows(SPEC, [*range(2, 8)]))
        writer.commit()
    assert PairReader(tmp_path).read([0, 3]).index.tolist() == [0, 3]


def test_rows_without_a_finite_latent_are_set_aside(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    noise, latent, prompts, index = rows(SPEC, list(range(8)))
    latent[2, 0, 0, 0], latent[5, 3, 7, 7] = float("nan"), 1e5  # 1e5 is no float16
    with PairWriter(tmp_path, SPEC, 0) as writer:
        writer.append(noise, latent, prompts, index)
        assert sorted(writer.quarantined) == [2, 5] and writer.missing == []
        writer.commit()
    for shard in (1, 2):
        write_shard(tmp_path, SPEC, shard)
    reason = "its latent is not finite in float16"
    expected = [{"index": pair, "prompt": prompts[pair], "reason": reason} for pair in (2, 5)]
    assert quarantined_rows(tmp_path, SPEC) == {0: expected}
    assert load_rows(tmp_path / "shards" / "pairs-00000.h5", SPEC).index.tolist() == [0, 1, 3, 4, 6, 7]

    with PairWriter(tmp_path, SPEC, 0, retry=True) as writer:
        assert writer.missing == [2, 5]
        again = rows(SPEC, [2, 5])
        writer.append(*again)
        writer.commit()
    assert quarantined_rows(tmp_path, SPEC) == {} and verify_store(tmp_path).ok
    assert same(PairReader(tmp_path).read(range(22)), PairReader(make_store(tmp_path / "b")).read(range(22)))


def test_a_shard_of_nothing_but_bad_rows(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    noise, latent, prompts, index = rows(SPEC, list(range(8)))
    with PairWriter(tmp_path, SPEC, 0) as writer:
        writer.append(noise, latent * float("inf"), prompts, index)
        writer.commit()
    assert len(load_rows(tmp_path / "shards" / "pairs-00000.h5", SPEC).index) == 0
    assert [row["index"] for row in quarantined_rows(tmp_path, SPEC)[0]] == index


def test_the_pen_keeps_order_and_stops_at_the_first_error() -> None:
    seen: list[int] = []

    def write(number: int) -> None:
        time.sleep(0.002)
        if number == 7:
            raise OSError("no room")
        seen.append(number)

    with pytest.raises(OSError, match="no room"), Pen(depth=2) as pen:
        for number in range(100):
            pen.put(write, number)
    assert seen == list(range(7))
    with Pen() as pen:
        pen.put(write, 1)
        pen.finish()
        assert seen[-1] == 1
        pen.put(write, 7)
        with pytest.raises(OSError, match="no room"):
            pen.finish()


def test_seeded_stores_refuse_other_noise(tmp_path: Path) -> None:
    spec = replace(SPEC, noise="seeded")
    create_store(tmp_path, spec)
    _, latent, prompts, index = rows(spec, [0])
    other = seeds.noise(spec.seed + 1, index, spec.latent_shape, spec.torch_dtype)
    with pytest.raises(UserError, match="cannot be read back"), PairWriter(tmp_path, spec, 0) as writer:
        writer.append(other, latent, prompts, index)


# Other specs.


def test_another_spec_is_refused_naming_the_keys(store: Path) -> None:
    other = replace(SPEC, guidance=3.0, latent_space=LatentSpace(channels=4, downscale=8, scale=0.13025))
    says = r"differing: guidance \(8\.0 -> 3\.0\), latent_space\.scale \(0\.18215 -> 0\.13025\)"
    with pytest.raises(UserError, match=says):
        create_store(store, other)
    with pytest.raises(UserError, match=says):
        PairReader(store, expect=other)
    create_store(store, SPEC)
    assert pending(store, SPEC) == []


def test_a_shard_of_another_store_is_refused(store: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", replace(SPEC, steps=20))
    name = "shards/pairs-00001.h5"
    (store / name).write_bytes((other / name).read_bytes())
    with pytest.raises(UserError, match=r"pairs-00001\.h5: made with another spec: steps \(50 -> 20\)"):
        PairReader(store).read([8])
    assert [bad["shard"] for bad in verify_store(store).bad_shards] == [name]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[1]",
        b'{"schema": 2, "sha256": "", "spec": []}',
        b'{"schema": 2, "sha256": "", "spec": {}}',
    ],
)
def test_damaged_store_json(store: Path, content: bytes) -> None:
    (store / "store.json").write_bytes(content)
    with pytest.raises(UserError, match=r"store\.json is damaged"):
        PairReader(store)


def test_edited_newer_or_absent_store_json(store: Path) -> None:
    content = json.loads((store / "store.json").read_text())
    content["spec"]["guidance"] = 7.5
    (store / "store.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="sha256 does not match"):
        read_spec(store)
    for schema, todo in ((3, "upgrade"), (1, "read it with the version that made it")):
        (store / "store.json").write_text(json.dumps({**content, "schema": schema}))
        with pytest.raises(UserError, match=f"reads schema 2; {todo}"):
            read_spec(store)
    with pytest.raises(UserError, match="is no pair store"):
        PairReader(store / "shards")


# Damage.


def test_every_flipped_bit_is_found(store: Path) -> None:
    """Verification finds a flip anywhere; reading never returns a row that differs, nor crashes."""
    path = store / "shards" / "pairs-00002.h5"
    good, truth = path.read_bytes(), PairReader(store).read(range(22))
    refused = 0
    positions = sorted({*range(0, 512, 37), *range(512, len(good), 211), len(good) - 1})
    for number, position in enumerate(positions):
        bad = bytearray(good)
        bad[position] ^= 1 << number % 8
        path.write_bytes(bad)
        report = verify_store(store)
        assert [b["shard"] for b in report.bad_shards] == ["shards/pairs-00002.h5"], position
        try:
            found = PairReader(store).read(range(22))
        except UserError as error:
            assert "pairs-00002.h5" in str(error)
            refused += 1
        else:
            assert same(found, truth), position
    path.write_bytes(good)
    assert verify_store(store).ok and refused > len(positions) // 4


def test_a_flip_in_each_dataset_is_refused_when_read(store: Path) -> None:
    path = store / "shards" / "pairs-00000.h5"
    good = path.read_bytes()
    with h5py.File(path) as file:
        places = {name: file[name].id.get_chunk_info(0) for name in file}
    assert sorted(places) == ["index", "latent", "noise", "prompt"]
    for chunk in places.values():
        for offset in (0, chunk.size // 2, chunk.size - 1):
            bad = bytearray(good)
            bad[chunk.byte_offset + offset] ^= 16
            path.write_bytes(bad)
            with pytest.raises(UserError, match=r"pairs-00000\.h5: unreadable"):
                PairReader(store).read([0])


# Disks and permissions.


def _write_with_little_room(folder: Path, done: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
    try:
        write_shard(folder, SPEC, 0, batch=1, flush_seconds=0)
    except UserError as error:
        done.send((str(error), error.__cause__))


@FORKS
def test_disk_full_says_what_is_safe_and_loses_nothing(tmp_path: Path) -> None:
    """A real refusal of write(2): the process may not write files above 12 kB, a flush of one row fits."""
    create_store(tmp_path, SPEC)
    child, pipe = start(_write_with_little_room, tmp_path)
    text, cause = pipe.recv()
    child.join()
    assert isinstance(cause, OSError) and cause.errno == errno.EFBIG
    says = r"no room to write in .*MiB free.*0 whole shards and 8 rows of pairs-00000\.h5 are safe.*make room"
    assert re.search(says, text) and str(tmp_path) in text and "\n" not in text
    assert not list(tmp_path.rglob("*.tmp")) and not list((tmp_path / "shards").iterdir())
    with PairWriter(tmp_path, SPEC, 0) as writer:
        assert writer.missing == []
        writer.commit()
    assert verify_store(tmp_path).checked == 8


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write .*file.*Not a directory.*another output folder"):
        create_store(tmp_path / "file" / "pairs", SPEC)
    with pytest.raises(UserError, match="Not a directory"):
        create_store(tmp_path / "file", SPEC)
    create_store(tmp_path / "pairs", SPEC)
    os.rmdir(tmp_path / "pairs" / "shards")
    (tmp_path / "pairs" / "shards").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write .*pairs-00000.*Not a directory.*8 rows"):
        write_shard(tmp_path / "pairs", SPEC, 0, flush_seconds=0)


# The document.


def test_the_documented_example_reads_a_store(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "pair-format.md").read_text()
    monkeypatch.chdir(whole)
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 22 and lines[3].startswith("3 ein Bär ☃ ")
    assert all(f"`{key}`" in text for key in SPEC.as_json() if key != "schema")
    with h5py.File(whole / "shards" / "pairs-00000.h5") as file:
        assert all(f"`{name}`" in text for name in [*file, *file.attrs])


def test_the_documented_seal_and_digest(whole: Path) -> None:
    data = (whole / "shards" / "pairs-00000.h5").read_bytes()
    head = json.loads(data[:512])
    assert head["bytes"] == len(data) and head["sha256"] == hashlib.sha256(data[512:]).hexdigest()
    content = json.loads((whole / "store.json").read_text())
    compact = json.dumps(content["spec"], sort_keys=True, separators=(",", ":"))
    assert content["sha256"] == hashlib.sha256(compact.encode()).hexdigest()
    with h5py.File(whole / "shards" / "pairs-00000.h5") as file:
        assert file.attrs["noise_sha256"] == hashlib.sha256(np.asarray(file["noise"]).tobytes()).hexdigest()
        assert file.attrs["spec_sha256"] == content["sha256"] and file.attrs["rows"] == 8
