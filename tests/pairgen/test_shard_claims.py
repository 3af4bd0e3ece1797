"""Claims on shards: killed, suspended and racing processes, and wrong clocks, with real processes."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

import d2g.core.claims
from clocks import Clock
from d2g.core.atomic_files import write_atomically
from pairgen.shard_claims import Claims
from pairgen.store.spec import write_through_scratch
from stale import StaleHandles

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Lockless(Claims):
    """Claims on a file system without locks."""

    def _exclusive(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "claims").mkdir()
    return tmp_path


def start_process(job: Callable[..., None], *arguments: Any) -> BaseProcess:
    child = FORK.Process(target=job, args=arguments)
    child.start()
    return child


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which claims are dead here. Heartbeats, and processes forked before, have the real one."""
    clock = Clock()
    monkeypatch.setattr("d2g.core.claims.time", clock)
    return clock


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def hold_claim(folder: Path, shard: int, place: str | None, patience: float) -> None:
    """Claim a shard and create the file `held`; when the claim is lost, create the file `lost`."""
    with Claims(folder, patience) as claims:
        claims.place = place or claims.place
        assert claims.take([shard]) == shard
        (folder / "held").touch()
        while not claims.lost(shard):
            time.sleep(0.01)
        claims.release(shard)
    (folder / "lost").touch()


def write_foreign_claim(folder: Path, shard: int) -> Path:
    """Write a claim of another machine."""
    path = folder / "claims" / f"pairs-{shard:05d}.json"
    path.write_text(json.dumps({"host": "elsewhere", "place": "elsewhere", "pid": 1, "start": "1"}))
    return path


def test_a_shard_belongs_to_one_job_until_released(folder: Path) -> None:
    with Claims(folder) as first, Claims(folder) as second:
        assert [first.take([0, 1, 2]), second.take([0, 1, 2]), first.take([0, 1, 2])] == [0, 1, 2]
        assert second.take([0, 1, 2]) is None and second.undecided([0, 1, 2]) == [0, 2]
        assert second.owner(0) == f"{os.uname().nodename}, process {os.getpid()}"
        first.release(0)
        assert second.take([0, 1, 2]) == 0
        assert not first.lost(2)
    assert list((folder / "claims").glob("*.json")) == [], "leaving the block releases all"


def test_a_claim_of_a_killed_job_is_taken_over_immediately(folder: Path) -> None:
    child = start_process(hold_claim, folder, 3, None, 120.0)
    wait_until((folder / "held").exists)
    with Claims(folder) as claims:
        assert claims.take([3]) is None, "its owner is alive"
        child.kill()
        child.join()
        assert claims.take([3]) == 3


def test_a_claim_of_a_silent_remote_job_is_taken_over_after_a_timeout(folder: Path) -> None:
    write_foreign_claim(folder, 0)
    with Claims(folder, patience=0.5) as claims:
        start = time.monotonic()
        while claims.take([0]) is None:
            assert claims.undecided([0]) == [0]
            time.sleep(0.01)
        assert time.monotonic() - start >= 0.5
        assert list((folder / "claims").glob(".pairs*")) == []


def test_an_empty_claim_is_taken_over_after_a_timeout(folder: Path) -> None:
    (folder / "claims" / "pairs-00000.json").touch()
    with Claims(folder, patience=0.2) as claims:
        assert claims.take([0]) is None
        time.sleep(0.3)
        assert claims.take([0]) == 0


def test_a_remote_job_with_heartbeats_keeps_its_shard(folder: Path, request: pytest.FixtureRequest) -> None:
    child = start_process(hold_claim, folder, 0, "elsewhere", 0.4)
    wait_until((folder / "held").exists)
    clock: Clock = request.getfixturevalue("clock")
    path = folder / "claims" / "pairs-00000.json"
    with Claims(folder, patience=10.0) as claims:
        assert claims.take([0]) is None
        for _ in range(4):
            counter = path.stat().st_mtime_ns
            wait_until(lambda counter=counter: path.stat().st_mtime_ns > counter)  # type: ignore[misc]
            clock.now += 9.0
            assert claims.take([0]) is None
        assert claims.undecided([0]) == [], "a live owner is not undecided"
    child.kill()
    child.join()


def test_a_suspended_job_notices_the_loss_of_its_shard(folder: Path) -> None:
    child = start_process(hold_claim, folder, 0, "elsewhere", 0.4)
    wait_until((folder / "held").exists)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    with Claims(folder, patience=0.4) as claims:
        wait_until(lambda: claims.take([0]) == 0)
        os.kill(child.pid, signal.SIGCONT)
        wait_until((folder / "lost").exists)
        child.join()
        assert child.exitcode == 0 and not claims.lost(0), "it did not release what is no longer its own"


@pytest.mark.parametrize("moment", [0.0, 4102444800.0], ids=["1970", "2100"])
def test_file_times_have_no_effect(folder: Path, moment: float, clock: Clock) -> None:
    """Clocks of file server and machine may be wrong: only heartbeats that stop count."""
    path = write_foreign_claim(folder, 0)
    with Claims(folder, patience=10.0) as claims:
        assert claims.take([0]) is None
        for beat in range(8):
            os.utime(path, (moment + beat, moment + beat))
            clock.now += 9.0
            assert claims.take([0]) is None, "it beats, whatever date its beats bear"
        clock.now += 11.0
        assert claims.take([0]) == 0
        for when in (0.0, 4102444800.0):
            os.utime(path, (when, when))
            assert not claims.lost(0)


def claim_all(folder: Path, shards: int, kind: type[Claims], number: int) -> None:
    """Claim as many shards as possible, record each, and hold them until the other processes finish."""

    def wait_for_all(step: str, content: list[int]) -> None:
        write_atomically(folder / f"{step}-{number}.json", json.dumps(content))
        wait_until(lambda: len(list(folder.glob(f"{step}-*.json"))) == 4)

    clock = d2g.core.claims.time = Clock()  # type: ignore[assignment]  # of this process
    with kind(folder, patience=60.0) as claims:
        claims.place = f"machine {number}"
        # All find the abandoned claims at once, after none of them has increased for so long.
        assert claims.take(range(shards)) is None
        wait_for_all("ready", [])
        clock.now += 61.0
        got = []
        while not all(claims._read(shard).get("place", "").startswith("machine") for shard in range(shards)):
            shard = claims.take(range(shards))
            if shard is not None:
                got.append(shard)
        wait_for_all("taken", got)
        wait_for_all("got", [shard for shard in got if not claims.lost(shard)])


@pytest.fixture(params=[Claims, Lockless])
def kind(request: pytest.FixtureRequest) -> Iterator[type[Claims]]:
    yield request.param


def test_four_jobs_race_for_abandoned_shards(folder: Path, kind: type[Claims]) -> None:
    for shard in range(24):
        write_foreign_claim(folder, shard)
    children = [start_process(claim_all, folder, 24, kind, number) for number in range(4)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    got = [json.loads(path.read_text()) for path in folder.glob("got-*.json")]
    assert sorted(shard for one in got for shard in one) == list(range(24)), "each shard is one job's"


# Stale NFS handles.


@pytest.mark.parametrize("call", ["open", "write", "stat", "fstat", "utime", "unlink"])
def test_stale_handles_do_not_end_a_claim(call: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = StaleHandles(monkeypatch)
    with Claims(folder, patience=0.08) as claims:
        if call in ("open", "write"):
            stale.fail(call)
        assert claims.take([3]) == 3
        path = folder / "claims" / "pairs-00003.json"
        counter = path.stat().st_mtime_ns
        if call in ("fstat", "utime"):
            stale.fail(call, 1)  # by the heartbeat, or by `lost`
        wait_until(lambda: path.stat().st_mtime_ns > counter + 5 * 10**9)
        if call == "stat":
            stale.fail(call)
        assert not claims.lost(3)
        if call == "unlink":
            stale.fail(call)
        claims.release(3)
        assert not path.exists() and stale.raised
        assert claims._heartbeat.is_alive()


def test_a_dead_claim_is_taken_over_across_stale_handles(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stale = folder / "claims" / "pairs-00000.json", StaleHandles(monkeypatch)
    child = start_process(hold_claim, folder, 0, None, 120.0)
    wait_until((folder / "held").exists)
    child.kill()
    child.join()
    for call in ("stat", "open", "rename"):
        stale.fail(call)
    with Claims(folder) as claims:
        assert claims.take([0]) == 0 and json.loads(path.read_text())["pid"] == os.getpid()
    assert stale.raised == 6


def test_a_stale_handle_of_a_replaced_claim_means_that_it_is_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stale = folder / "claims" / "pairs-00000.json", StaleHandles(monkeypatch)
    with Claims(folder) as claims:
        assert claims.take([0]) == 0
        for content in ({"place": "elsewhere", "pid": 7}, None):
            path.unlink()
            if content:
                path.write_text(json.dumps(content))
            stale.fail("fstat", 1)
            assert claims.lost(0)
        assert stale.raised == 2


def test_a_shard_is_published_across_stale_handles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = StaleHandles(monkeypatch)
    shard = tmp_path / "shards" / "pairs-00000.h5"
    for name in ("shards", "partial"):
        (tmp_path / name).mkdir()
    for call in ("replace", "fsync"):
        stale.fail(call)
    write_through_scratch(b"rows", shard, tmp_path / "partial")
    assert shard.read_bytes() == b"rows" and stale.raised == 4
    assert not list((tmp_path / "partial").iterdir())
