"""`pairs generate --out s3://`: kills, races, lost uploads and errors, against a local S3 server.

The jobs are forked from a fresh process: obstore, which this one may have used, does not survive a fork.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from d2g.core.errors import UserError
from jobs import Ended
from pairgen.object_place import ObjectPlace
from pairgen.prompts import PromptList, prompt_list_sha256
from pairgen.store.reader import PairReader
from pairgen.verify import verify_store
from s3_server import BUCKET, S3Server, s3_server
from stores import PROMPTS, put_shard, spec_of

PAIRS = 96

SERVE = """
import sys
from pathlib import Path
from fork_server import ForkServer
server = ForkServer(Path(sys.argv[1]))
sys.stdin.read()
server.stop()
"""
JOB = """
import sys
import d2g.core.object_store as object_store
object_store.RETRY_SECONDS = (0.05,) * 4
object_store.QUICK_RETRIES = {"max_retries": 0}
from d2g_cli.main import main
main(sys.argv[1:])
"""


class Running:
    """`d2g ARGUMENTS` in a process that tries a network that fails again quickly."""

    python = ""  # set by the fixture `python`

    def __init__(self, arguments: list[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("stdout*")))
        self.out, self.err = folder / f"stdout{number}", folder / f"stderr{number}"
        with self.out.open("w") as out, self.err.open("w") as err:
            command = [self.python, "-c", JOB, *arguments]
            self.process = subprocess.Popen(command, stdout=out, stderr=err)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.err.read_text()
            time.sleep(0.005)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> Ended:
        try:
            code = self.process.wait(240)
        finally:
            self.process.kill()
            self.process.wait()
        return Ended(code, self.out.read_text(), self.err.read_text())


def run_d2g(arguments: list[str], folder: Path) -> Ended:
    return Running(arguments, folder).wait()


@pytest.fixture(scope="module", autouse=True)
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("fresh")
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SERVE, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
        end = time.monotonic() + 60
        while not (folder / "socket").exists():
            assert process.poll() is None and time.monotonic() < end, "the fork server does not start"
            time.sleep(0.05)
        Running.python = str(folder / "python")
        yield
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(autouse=True)
def network(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The server works, and the caches are the test's own."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    server.fault = lambda method, name: None


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return f"{tmp_path.name}/pairs"


def command(teacher: Path, prompts: str, out: str, *sets: str) -> list[str]:
    chosen = [f"num_pairs={PAIRS}", "steps=8", "guidance=3", "shard_size=16", "batch_size=2", *sets]
    options = ["--teacher", str(teacher), "--prompts", prompts, "--out", out, "--json"]
    return ["pairs", "generate", *options, *(part for s in chosen for part in ("--set", s))]


@pytest.fixture(scope="module")
def expected(teacher: Path, prompts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store in a folder, generated in one go."""
    folder = tmp_path_factory.mktemp("expected")
    done = run_d2g(command(teacher, prompts, str(folder / "pairs"), "batch_size=32"), folder / "log")
    assert done.code == 0, done.stderr
    return folder / "pairs"


def url(prefix: str) -> str:
    return f"s3://{BUCKET}/{prefix}"


def assert_complete(server: S3Server, prefix: str, expected: Path, folder: Path) -> None:
    """A copy of the bucket is an intact store with the rows of `expected`; nothing is left over."""
    copy = server.copy_to(prefix, folder / "copy")
    report = verify_store(copy)
    assert report.ok and report.checked == PAIRS and report.prompts_checked, report
    a, b = (PairReader(store).read(range(PAIRS)) for store in (copy, expected))
    assert torch.equal(a.noise, b.noise) and torch.equal(a.index, b.index) and a.prompts == b.prompts
    torch.testing.assert_close(a.latents, b.latents, rtol=2e-3, atol=2e-3)
    assert server.names(f"{prefix}/claims/") == server.names(f"{prefix}/partial/") == []
    assert not list((folder / "cache").rglob("*.h5")), "the scratch folder is empty"


def shards(server: S3Server, prefix: str) -> list[str]:
    return server.names(f"{prefix}/shards/")


def test_a_store_in_a_bucket_is_that_of_a_folder(
    server: S3Server, teacher: Path, prompts: str, prefix: str, expected: Path, tmp_path: Path
) -> None:
    done = run_d2g(command(teacher, prompts, url(prefix), "batch_size=32"), tmp_path / "log")
    assert done.json["complete"] and done.json["out"] == url(prefix) and done.json["new_pairs"] == PAIRS
    for path in sorted(expected.rglob("*")):
        name = f"{prefix}/{path.relative_to(expected)}"
        if path.is_file() and path.parent.name != "claims":
            assert server.get(name) == path.read_bytes(), name
    assert_complete(server, prefix, expected, tmp_path)
    again = run_d2g(command(teacher, prompts, url(prefix)), tmp_path / "log")
    assert again.json["new_pairs"] == 0 and again.json["pairs"] == PAIRS
    other = run_d2g(command(teacher, prompts, url(prefix), "steps=9"), tmp_path / "log")
    assert (
        other.code == 1
        and f"{url(prefix)} holds pairs of another spec; differing: steps (8 -> 9)" in other.error
    )


def test_a_url_of_a_folder_is_the_folder(teacher: Path, prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "pairs of mine"
    done = run_d2g(
        command(teacher, prompts, f"file://{out}".replace(" ", "%20"), "num_pairs=4"), tmp_path / "log"
    )
    assert done.json["complete"] and verify_store(out).ok


@pytest.mark.long
@pytest.mark.slow
def test_readers_read_what_the_job_has_written(
    server: S3Server, teacher: Path, prompts: str, prefix: str, expected: Path, tmp_path: Path
) -> None:
    """Through s3fs, as training does."""
    assert run_d2g(command(teacher, prompts, url(prefix)), tmp_path / "log").code == 0
    info = run_d2g(["pairs", "info", url(prefix), "--json"], tmp_path / "log").json
    assert info["complete"] and info["pairs"] == PAIRS and info["prompts_held"]
    script = ["distill", "ode", "--teacher", str(teacher), "--pairs", url(prefix), "--preset", "miniature"]
    sets = ["train.images=8", "train.batch_size=4", "train.loader_workers=0", "train.plot=false"]
    sets += ["regression.losses=pseudo_huber", "train.precision=fp32"]
    options = [*script, "--out", str(tmp_path / "run"), *(part for s in sets for part in ("--set", s))]
    trained = run_d2g(options, tmp_path / "log")
    assert trained.code == 0, trained.stderr
    assert json.loads((tmp_path / "run" / "ended.json").read_text())["how"] == "done"


@pytest.mark.slow
def test_two_jobs_on_one_prefix_share_the_work(
    server: S3Server, teacher: Path, prompts: str, prefix: str, expected: Path, tmp_path: Path
) -> None:
    jobs = [Running(command(teacher, prompts, url(prefix)), tmp_path / f"log{number}") for number in range(2)]
    new = [job.wait().json["new_pairs"] for job in jobs]
    assert sum(new) == PAIRS and min(new) > 0, "every row once, and both had some"
    assert_complete(server, prefix, expected, tmp_path)


@pytest.mark.slow
def test_the_shard_of_a_killed_job_is_taken_over(
    server: S3Server, teacher: Path, prompts: str, prefix: str, expected: Path, tmp_path: Path
) -> None:
    victim = Running(command(teacher, prompts, url(prefix)), tmp_path / "victim")
    victim.wait_for(lambda: len(shards(server, prefix)) >= 1)
    heir = Running(command(teacher, prompts, url(prefix)), tmp_path / "heir")
    heir.wait_for(lambda: len(server.names(f"{prefix}/claims/pairs-")) >= 2)
    victim.send(signal.SIGKILL)
    victim.wait()
    assert heir.wait().json["complete"]
    assert_complete(server, prefix, expected, tmp_path)


@pytest.mark.slow
def test_the_shard_of_a_dead_machine_is_taken_over_after_the_patience(
    server: S3Server, teacher: Path, prompts: str, prefix: str, expected: Path, tmp_path: Path
) -> None:
    """Clocks do not matter: the claim is as old or as new as the server pleases."""
    claim = {"host": "spot-7", "place": "elsewhere", "pid": 9, "start": "1", "job": "x", "beat": 3}
    server.put(f"{prefix}/claims/pairs-00002.json", json.dumps(claim).encode())
    started = time.monotonic()
    done = run_d2g(command(teacher, prompts, url(prefix), "patience=3"), tmp_path / "log")
    assert done.json["complete"] and time.monotonic() - started > 3
    assert_complete(server, prefix, expected, tmp_path)


@pytest.mark.long
@pytest.mark.slow
def test_kills_in_a_row(
    server: S3Server, teacher: Path, prompts: str, prefix: str, expected: Path, tmp_path: Path
) -> None:
    """Each job has an empty scratch folder, as on a new spot machine: only what is in the bucket counts."""
    for kill in range(6):
        scratch = f"scratch={tmp_path / 'cache' / str(kill)}"
        job = Running(command(teacher, prompts, url(prefix), scratch, "batch_size=1"), tmp_path / "log")
        before = len(shards(server, prefix))
        job.wait_for(lambda before=before: len(shards(server, prefix)) > min(before, 3))  # type: ignore[misc]
        time.sleep(0.05 * kill)
        job.send(signal.SIGKILL)
        assert job.wait().code == -signal.SIGKILL, "the job finished before the kill"
    done = run_d2g(command(teacher, prompts, url(prefix)), tmp_path / "log")
    assert done.json["complete"]
    for leftover in (tmp_path / "cache").rglob("*.h5"):
        leftover.unlink()
    assert_complete(server, prefix, expected, tmp_path)


@pytest.mark.long
@pytest.mark.slow
def test_a_job_that_is_asked_to_stop_leaves_its_rows_to_the_next_machine(
    server: S3Server, teacher: Path, prompts: str, prefix: str, expected: Path, tmp_path: Path
) -> None:
    sets = ("batch_size=1", "steps=20", "shard_size=96")
    job = Running(
        command(teacher, prompts, url(prefix), *sets, f"scratch={tmp_path / 'a'}"), tmp_path / "log"
    )
    job.wait_for(lambda: "pairs: " in job.err.read_text())
    time.sleep(0.5)
    job.send(signal.SIGTERM)
    stopped = job.wait()
    assert stopped.code == 130 and "run the same command again" in stopped.error
    (rows,) = server.names(f"{prefix}/partial/")
    assert not list((tmp_path / "a").rglob("*.h5")) and server.names(f"{prefix}/claims/") == []
    done = run_d2g(command(teacher, prompts, url(prefix), *sets), tmp_path / "log")
    assert done.json["complete"] and 0 < done.json["new_pairs"] < PAIRS, f"{rows} was used"
    assert server.names(f"{prefix}/partial/") == []
    assert verify_store(server.copy_to(prefix, tmp_path / "copy")).ok


@pytest.mark.slow
def test_a_shard_that_could_not_be_uploaded_is_uploaded_by_the_next_job(
    server: S3Server, teacher: Path, prompts: str, prefix: str, expected: Path, tmp_path: Path
) -> None:
    server.fault = lambda method, name: "busy" if method == "PUT" and "shards/pairs-00002" in name else None
    failed = run_d2g(command(teacher, prompts, url(prefix)), tmp_path / "log")
    assert failed.code == 1 and "shards/pairs-00002.h5: SlowDown" in failed.error
    assert "run the same command again" in failed.error
    assert [path.name for path in (tmp_path / "cache").rglob("pairs-00002.h5")] == ["pairs-00002.h5"]
    assert server.names(f"{prefix}/claims/") == [], "released for others"
    server.fault = lambda method, name: None
    done = run_d2g(command(teacher, prompts, url(prefix)), tmp_path / "log")
    assert done.json["complete"] and done.json["new_pairs"] <= PAIRS - 3 * 16
    assert_complete(server, prefix, expected, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["busy", "lost answer", "lost upload"])
def test_a_network_that_fails_now_and_then_is_no_matter(
    kind: str, server: S3Server, teacher: Path, prompts: str, prefix: str, expected: Path, tmp_path: Path
) -> None:
    """Every third PUT fails: of the spec, of claims and of shards."""
    count = 0

    def fault(method: str, name: str) -> str | None:
        nonlocal count
        count += method == "PUT"
        lost_claim = kind == "lost upload" and ("claims" in name or "store.json" in name)
        return kind if method == "PUT" and count % 3 == 1 and not lost_claim else None

    server.fault = fault
    done = run_d2g(command(teacher, prompts, url(prefix)), tmp_path / "log")
    assert done.json["complete"] and done.json["new_pairs"] == PAIRS
    assert_complete(server, prefix, expected, tmp_path)


@pytest.mark.slow
def test_a_network_that_stays_away_ends_the_job_and_loses_nothing(
    server: S3Server, teacher: Path, prompts: str, prefix: str, expected: Path, tmp_path: Path
) -> None:
    job = Running(command(teacher, prompts, url(prefix)), tmp_path / "log")
    job.wait_for(lambda: len(shards(server, prefix)) >= 2)
    server.fault = lambda method, name: "busy"
    ended = job.wait()
    assert (
        ended.code == 1
        and "check the network and the endpoint, then run the same command again" in ended.error
    )
    server.fault = lambda method, name: None
    assert run_d2g(command(teacher, prompts, url(prefix)), tmp_path / "log").json["complete"]
    assert_complete(server, prefix, expected, tmp_path)


def refused(ended: Ended, text: str) -> None:
    assert ended.code == 1 and text in ended.error, ended.stderr


def test_errors_before_the_job_starts_are_one_line(
    server: S3Server,
    teacher: Path,
    prompts: str,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = tmp_path / "log"
    refused(
        run_d2g(command(teacher, prompts, "s3://nobody-has-this/pairs"), log), "does not exist (NoSuchBucket"
    )
    server.fault = lambda method, name: "denied"
    refused(run_d2g(command(teacher, prompts, url(prefix)), log), "store.json: access denied (AccessDenied")
    server.fault = lambda method, name: "denied" if method == "PUT" else None
    refused(
        run_d2g(command(teacher, prompts, url(prefix)), log), "access denied (AccessDenied: Access Denied)"
    )
    server.fault = lambda method, name: None
    assert server.names(f"{prefix}/") == []
    refused(
        run_d2g(command(teacher, prompts, "hf://org/data/pairs"), log), "give a folder, or a URL of s3://"
    )
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    refused(
        run_d2g(command(teacher, prompts, url(prefix)), log), "no credentials found; set AWS_ACCESS_KEY_ID"
    )


@pytest.mark.slow
def test_a_store_grows_in_a_bucket(
    server: S3Server, teacher: Path, prompts: str, prefix: str, expected: Path, tmp_path: Path
) -> None:
    """From a short last shard, whose rows are kept."""
    small = run_d2g(command(teacher, prompts, url(prefix), "num_pairs=40"), tmp_path / "log")
    assert small.json["shards"] == 3
    # A machine that is gone has claimed the last shard.
    claim = {"host": "spot-7", "place": "elsewhere", "pid": 9, "start": "1", "job": "x", "beat": 3}
    server.put(f"{prefix}/claims/pairs-00002.json", json.dumps(claim).encode())
    grown = run_d2g(command(teacher, prompts, url(prefix), "patience=2"), tmp_path / "log")
    assert grown.json["complete"] and grown.json["new_pairs"] == PAIRS - 40
    assert "grows from 40 to 96 pairs" in grown.stderr
    assert_complete(server, prefix, expected, tmp_path)


# What another job does between two requests of this one.


SPEC = spec_of(num_pairs=22, shard_size=8)


def place_of(prefix: str, scratch: Path, num_pairs: int = 22) -> ObjectPlace:
    """A job that has created or opened the store of SPEC at a prefix."""
    place = ObjectPlace(url(prefix), scratch)
    place.create(replace(SPEC, num_pairs=num_pairs), PromptList.of(PROMPTS))
    return place


def interrupt(server: S3Server, request: str, other: Callable[[], object]) -> None:
    """Call `other` once, before the first request whose "METHOD name" begins with `request`."""

    def fault(method: str, name: str) -> None:
        if f"{method} {name}".startswith(request):
            server.fault = lambda method, name: None
            other()

    server.fault = fault


def test_the_record_of_a_shard_survives_a_job_that_starts_meanwhile(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    """It removes the local files of shards that are in place, while their upload is being checked."""
    place = place_of(prefix, tmp_path)
    put_shard(place.folder, SPEC, 0, quarantined=[3])
    interrupt(server, f"HEAD {prefix}/shards", lambda: place_of(prefix, tmp_path))
    place.publish(0)
    assert not list(place.folder.glob("*/pairs-00000*")), "the other job came between"
    assert [row["index"] for row in place.quarantined_rows(SPEC)[0]] == [3]
    # A second owner, whose shard another job has published and whose files it has removed.
    place.publish(0)
    assert [row["index"] for row in place.quarantined_rows(SPEC)[0]] == [3]


def test_rows_that_vanish_because_their_shard_is_complete(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    place, owner = place_of(prefix, tmp_path / "a"), place_of(prefix, tmp_path / "b")
    server.put(f"{prefix}/partial/pairs-00000.rows-0000000000.h5", b"rows")
    put_shard(owner.folder, SPEC, 0)
    interrupt(server, f"GET {prefix}/partial/pairs", lambda: owner.publish(0))
    assert not place.prepare(0) and place.shards_present(SPEC) == [0]
    assert not list((tmp_path / "a").rglob("*.h5"))


def test_two_jobs_make_a_store_grow_at_once(server: S3Server, prefix: str, tmp_path: Path) -> None:
    """Each has read the spec before the other writes it: to one size that is fine, to two it is refused."""
    first, second, third = (place_of(prefix, tmp_path / name) for name in "abc")
    assert first.read_spec() == second.read_spec() == third.read_spec() == SPEC
    more = [*PROMPTS, "more"]
    large = replace(SPEC, num_pairs=60, num_prompts=5, prompts_sha256=prompt_list_sha256(more))
    first.write_grown(large, PromptList.of(more))
    second.write_grown(large, PromptList.of(more))
    with pytest.raises(UserError, match="was changed by another job meanwhile"):
        third.write_grown(replace(large, num_pairs=30), PromptList.of([*PROMPTS, "others"]))
    assert third.read_spec() == large and b"others" not in server.get(f"{prefix}/prompts.jsonl")
