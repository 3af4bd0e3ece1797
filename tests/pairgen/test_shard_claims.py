"""Claims on shards: processes that die, sleep and race, clocks that jump. Processes and signals are real."""

import ast
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
from pairgen.shard_claims import Claims

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Lockless(Claims):
    """As on a file system without locks."""

    def _exclusive(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "claims").mkdir()
    return tmp_path


def start(job: Callable[..., None], *arguments: Any) -> BaseProcess:
    child = FORK.Process(target=job, args=arguments)
    child.start()
    return child


def until(seen: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not seen():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def hold(folder: Path, shard: int, place: str | None, patience: float) -> None:
    """Claim a shard and sit on it; say so in a file; say in another when the claim is lost."""
    with Claims(folder, patience) as claims:
        claims.place = place or claims.place
        assert claims.take([shard]) == shard
        (folder / "held").touch()
        while not claims.lost(shard):
            time.sleep(0.01)
        claims.release(shard)
    (folder / "lost").touch()


def foreign(folder: Path, shard: int) -> Path:
    """A claim of a machine that is not here."""
    path = folder / "claims" / f"pairs-{shard:05d}.json"
    path.write_text(json.dumps({"host": "elsewhere", "place": "elsewhere", "pid": 1, "start": "1"}))
    return path


def test_a_shard_is_one_jobs_until_released(folder: Path) -> None:
    with Claims(folder) as first, Claims(folder) as second:
        assert [first.take([0, 1, 2]), second.take([0, 1, 2]), first.take([0, 1, 2])] == [0, 1, 2]
        assert second.take([0, 1, 2]) is None and second.undecided([0, 1, 2]) == [0, 2]
        assert second.owner(0) == f"{os.uname().nodename}, process {os.getpid()}"
        first.release(0)
        assert second.take([0, 1, 2]) == 0
        assert not first.lost(2)
    assert list((folder / "claims").glob("*.json")) == [], "leaving the block releases all"


def test_a_killed_job_is_succeeded_at_once(folder: Path) -> None:
    child = start(hold, folder, 3, None, 120.0)
    until((folder / "held").exists)
    with Claims(folder) as claims:
        assert claims.take([3]) is None, "its owner lives"
        child.kill()
        child.join()
        assert claims.take([3]) == 3


def test_a_silent_job_elsewhere_is_succeeded_after_patience(folder: Path) -> None:
    foreign(folder, 0)
    with Claims(folder, patience=0.5) as claims:
        begun = time.monotonic()
        while claims.take([0]) is None:
            assert claims.undecided([0]) == [0]
            time.sleep(0.01)
        assert time.monotonic() - begun >= 0.5
        assert list((folder / "claims").glob(".pairs*")) == []


def test_an_empty_claim_is_one_of_a_job_that_died_making_it(folder: Path) -> None:
    (folder / "claims" / "pairs-00000.json").touch()
    with Claims(folder, patience=0.2) as claims:
        assert claims.take([0]) is None
        time.sleep(0.3)
        assert claims.take([0]) == 0


def test_a_beating_job_elsewhere_keeps_its_shard(folder: Path) -> None:
    child = start(hold, folder, 0, "elsewhere", 0.8)
    until((folder / "held").exists)
    with Claims(folder, patience=0.8) as claims:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            assert claims.take([0]) is None
            time.sleep(0.02)
        assert claims.undecided([0]) == [], "it was seen to live, so nobody waits for it"
    child.kill()
    child.join()


def test_a_sleeper_finds_its_shard_taken_and_leaves_it_alone(folder: Path) -> None:
    child = start(hold, folder, 0, "elsewhere", 0.4)
    until((folder / "held").exists)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    with Claims(folder, patience=0.4) as claims:
        until(lambda: claims.take([0]) == 0)
        os.kill(child.pid, signal.SIGCONT)
        until((folder / "lost").exists)
        child.join()
        assert child.exitcode == 0 and not claims.lost(0), "it did not release what is no longer its own"


@pytest.mark.parametrize("moment", [0.0, 4102444800.0], ids=["1970", "2100"])
def test_clocks_that_jump_mean_nothing(folder: Path, moment: float) -> None:
    """A file server's clock, or this machine's, in another century: only standing still counts."""
    path = foreign(folder, 0)
    with Claims(folder, patience=0.6) as claims:
        assert claims.take([0]) is None
        for beat in range(8):
            os.utime(path, (moment + beat, moment + beat))
            time.sleep(0.1)
            assert claims.take([0]) is None, "it beats, whatever date its beats bear"
        until(lambda: claims.take([0]) == 0)
        for when in (0.0, 4102444800.0):
            os.utime(path, (when, when))
            assert not claims.lost(0)


def test_no_wall_clock_is_read() -> None:
    tree = ast.parse(Path(d2g.core.claims.__file__).read_text())
    used = {
        f"{n.value.id}.{n.attr}"
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    assert "time.monotonic" in used and not used & {"time.time", "time.time_ns", "datetime.datetime"}


def grab(folder: Path, shards: int, kind: type[Claims], number: int) -> None:
    """Take all one can get; note each; hold them until the others are through."""
    with kind(folder, patience=0.3) as claims:
        claims.place = f"machine {number}"
        end = time.monotonic() + 1.5
        got = []
        while time.monotonic() < end:
            shard = claims.take(range(shards))
            if shard is not None:
                got.append(shard)
        still_held = [shard for shard in got if not claims.lost(shard)]
        (folder / f"got-{number}.json").write_text(json.dumps(still_held))
        until(lambda: len(list(folder.glob("got-*.json"))) == 4)


@pytest.fixture(params=[Claims, Lockless])
def kind(request: pytest.FixtureRequest) -> Iterator[type[Claims]]:
    yield request.param


def test_four_jobs_race_for_the_shards_of_dead_ones(folder: Path, kind: type[Claims]) -> None:
    for shard in range(24):
        foreign(folder, shard)
    children = [start(grab, folder, 24, kind, number) for number in range(4)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    got = [json.loads(path.read_text()) for path in folder.glob("got-*.json")]
    assert sorted(shard for one in got for shard in one) == list(range(24)), "each shard is one job's"
