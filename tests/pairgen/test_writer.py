"""PairWriter: crashes, bad rows and full disks, with real files and kills."""

import errno
import multiprocessing
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from d2g.core import seeds
from d2g.core.errors import UserError
from pairgen.repair import repair_store
from pairgen.store.hdf5 import create_store, load_rows, pending, read_spec
from pairgen.store.reader import PairReader
from pairgen.store.spec import quarantined_rows
from pairgen.store.writer import BackgroundWriter, PairWriter
from pairgen.verify import verify_store
from stores import FORKS, SPEC, make_store, rows, same, write_shard


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("shared") / "deep" / "pairs")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "pairs")


def start(job: Callable[[Path, Connection], None], folder: Path) -> tuple[BaseProcess, Connection]:
    """Run `job(folder, pipe)` in a forked process. Returns the process and the other end of the pipe."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    child = context.Process(target=job, args=(folder, sender))
    child.start()
    sender.close()
    return child, receiver


def kill(child: BaseProcess) -> None:
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL


# Crashes.


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, UserError])
def test_an_exception_keeps_every_row(tmp_path: Path, error: type[BaseException]) -> None:
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
def test_a_kill_loses_no_flushed_rows(tmp_path: Path, shared_store: Path) -> None:
    create_store(tmp_path, SPEC)
    child, pipe = start(_flush_thrice_then_wait, tmp_path)
    assert pipe.recv() == "6 rows flushed, 1 in memory"
    kill(child)
    assert not list((tmp_path / "shards").iterdir()) and pending(tmp_path, SPEC)[0] == range(8)
    with PairWriter(tmp_path, SPEC, 0) as writer:
        assert writer.missing == [6, 7]
        writer.append(*rows(SPEC, writer.missing))
        writer.commit()
    assert same(PairReader(tmp_path).read(range(8)), PairReader(shared_store).read(range(8)))
    assert not list((tmp_path / "partial").iterdir())


def _write_on_and_on(folder: Path, done: Connection) -> None:
    spec = read_spec(folder)
    for shard in range(spec.num_shards):
        write_shard(folder, spec, shard, batch=1, flush_seconds=0)
        done.send(shard)


@FORKS
@pytest.mark.parametrize("moment", [0.0, 0.017, 0.031])
def test_a_kill_at_any_time_leaves_only_complete_files(tmp_path: Path, moment: float) -> None:
    create_store(tmp_path, replace(SPEC, num_pairs=100_000))
    child, pipe = start(_write_on_and_on, tmp_path)
    assert pipe.recv() == 0
    time.sleep(moment)
    kill(child)
    report = verify_store(tmp_path)
    assert report.checked >= 8 and report.bad_shards == [] and report.duplicates == []
    assert PairReader(tmp_path).read([0]).index.tolist() == [0]


def test_leftovers_of_a_kill_during_commit_are_removed(store: Path) -> None:
    for name in ("pairs-00000.rows-0000000000.h5", "pairs-00000.lock", "pairs-00001.host-1.tmp"):
        (store / "partial" / name).write_bytes(b"left over")
    (store / "partial" / "pairs-00003.rows-0000000024.h5").write_bytes(b"somebody else's")
    create_store(store, SPEC)
    assert [p.name for p in (store / "partial").iterdir()] == ["pairs-00003.rows-0000000024.h5"]


def test_a_damaged_partial_file_is_reported_and_repaired(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    with PairWriter(tmp_path, SPEC, 0) as writer:
        writer.append(*rows(SPEC, [0, 1]))
    part = tmp_path / "partial" / "pairs-00000.rows-0000000000.h5"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"rows-0000000000.*truncated.*d2g pairs repair"):
        PairWriter(tmp_path, SPEC, 0).__enter__()
    assert repair_store(tmp_path) == ["partial/pairs-00000.rows-0000000000.h5"]
    write_shard(tmp_path, SPEC, 0)


# Invalid rows.


def test_append_refuses_invalid_rows_and_keeps_earlier_ones(tmp_path: Path) -> None:
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
        with pytest.raises(UserError, match=r"latents of pairs \[2, 3\] is \(2, 4, 8, 4\)"):
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


def test_rows_with_non_finite_latents_are_quarantined(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    noise, latent, prompts, index = rows(SPEC, list(range(8)))
    latent[2, 0, 0, 0], latent[5, 3, 7, 7] = float("nan"), 1e5  # 1e5 overflows float16
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


def test_a_shard_with_only_bad_rows(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    noise, latent, prompts, index = rows(SPEC, list(range(8)))
    with PairWriter(tmp_path, SPEC, 0) as writer:
        writer.append(noise, latent * float("inf"), prompts, index)
        writer.commit()
    assert len(load_rows(tmp_path / "shards" / "pairs-00000.h5", SPEC).index) == 0
    assert [row["index"] for row in quarantined_rows(tmp_path, SPEC)[0]] == index


def test_the_background_writer_keeps_order_and_stops_at_the_first_error() -> None:
    written: list[int] = []

    def write(number: int) -> None:
        time.sleep(0.002)
        if number == 7:
            raise OSError("no room")
        written.append(number)

    with pytest.raises(OSError, match="no room"), BackgroundWriter(depth=2) as pen:
        for number in range(100):
            pen.submit(write, number)
    assert written == list(range(7))
    with BackgroundWriter() as pen:
        pen.submit(write, 1)
        pen.finish()
        assert written[-1] == 1
        pen.submit(write, 7)
        with pytest.raises(OSError, match="no room"):
            pen.finish()


def test_seeded_stores_refuse_other_noise(tmp_path: Path) -> None:
    spec = replace(SPEC, noise="seeded")
    create_store(tmp_path, spec)
    _, latent, prompts, index = rows(spec, [0])
    other = seeds.noise(spec.seed + 1, index, spec.latent_shape, spec.torch_dtype)
    with pytest.raises(UserError, match="cannot be read back"), PairWriter(tmp_path, spec, 0) as writer:
        writer.append(other, latent, prompts, index)


# Disks and permissions.


def _write_with_little_room(folder: Path, done: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
    try:
        write_shard(folder, SPEC, 0, batch=1, flush_seconds=0)
    except UserError as error:
        done.send((str(error), error.__cause__))


@FORKS
def test_a_full_disk_loses_no_rows(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes write(2) fail above 12 kB; a flush of one row fits."""
    create_store(tmp_path, SPEC)
    child, pipe = start(_write_with_little_room, tmp_path)
    text, cause = pipe.recv()
    child.join()
    assert isinstance(cause, OSError) and cause.errno == errno.EFBIG
    says = (
        r"no room to write in .*MiB free.*0 complete shards and 8 rows of pairs-00000\.h5 are safe.*make room"
    )
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
