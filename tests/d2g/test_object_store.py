"""Objects and claims in a local S3 server: conditions, lost answers, lost uploads, races, errors."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import d2g.core.object_store
from clocks import Clock, wait_until
from d2g.core.errors import UserError
from d2g.core.object_claims import ObjectClaims
from d2g.core.object_store import MissingObject, ObjectStore
from s3_server import BUCKET, S3Server, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def url(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A URL with nothing below it, and a network that is tried again quickly."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(d2g.core.object_store, "RETRY_SECONDS", (0.01,) * 4)
    monkeypatch.setattr(d2g.core.object_store, "QUICK_RETRIES", {"max_retries": 0})
    yield f"s3://{BUCKET}/{tmp_path.name}"
    server.fault = lambda method, name: None


@pytest.fixture
def store(url: str) -> ObjectStore:
    return ObjectStore(url)


def fail(server: S3Server, kind: str, times: int, only: str = "PUT") -> None:
    """The next requests of this method fail."""
    left = [kind] * times
    server.fault = lambda method, name: left.pop() if left and method == only else None


# Objects.


def test_objects_are_written_read_listed_and_removed(store: ObjectStore, tmp_path: Path) -> None:
    assert store.read("a/one") is None and store.size("a/one") is None and store.list("a") == {}
    store.write("a/one", b"first")
    (tmp_path / "file").write_bytes(bytes(range(256)) * 4)
    store.write("a/two", tmp_path / "file")
    store.write("a/b/three", b"deeper")
    assert {name: entry.size for name, entry in store.list("a").items()} == {"one": 5, "two": 1024}
    content = store.read("a/one")
    assert content is not None and content[0] == b"first" and store.size("a/two") == 1024
    store.download("a/two", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "file").read_bytes()
    store.rename("a/two", "c")
    assert store.size("c") == 1024 and list(store.list("a")) == ["one"]
    store.remove("c")
    store.remove("c")
    with pytest.raises(MissingObject, match="/c does not exist"):
        store.download("c", tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "file"]


def test_a_file_larger_than_a_part_is_uploaded_whole(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(d2g.core.object_store, "PART_BYTES", 5 << 20)
    (tmp_path / "file").write_bytes(b"x" * (11 << 20))
    store.write("large", tmp_path / "file")
    assert store.size("large") == 11 << 20


def test_conditions_of_writes(store: ObjectStore) -> None:
    first = store.create("claim", b"1")
    assert first is not None and store.create("claim", b"2") is None
    second = store.replace("claim", b"3", first)
    assert second is not None and store.replace("claim", b"4", first) is None
    content = store.read("claim")
    assert content is not None and content == (b"3", second)
    store.remove("claim")
    assert store.replace("claim", b"5", second) is None and store.read("claim") is None


@pytest.mark.parametrize("kind", ["busy", "lost answer"])
def test_a_write_is_repeated_and_recognizes_itself(kind: str, server: S3Server, store: ObjectStore) -> None:
    fail(server, kind, 2)
    first = store.create("claim", b"1")
    assert first is not None, "the second attempt meets what the first has written"
    fail(server, kind, 2)
    assert store.replace("claim", b"2", first) is not None
    content = store.read("claim")
    assert content is not None and content[0] == b"2"


def test_a_lost_upload_is_noticed_and_repeated(server: S3Server, store: ObjectStore) -> None:
    fail(server, "lost upload", 2)
    store.write("shard", b"rows")
    content = store.read("shard")
    assert content is not None and content[0] == b"rows"
    fail(server, "lost upload", 100)
    with pytest.raises(UserError, match=r"4 of 9 bytes arrived, tried 5 times; check the network"):
        store.write("shard", b"more rows")


def test_a_conflict_with_another_request_passes(server: S3Server, store: ObjectStore) -> None:
    """409, which real stores answer now and then to writes without a condition, too."""
    fail(server, "conflict", 2)
    store.write("shard", b"rows")
    assert store.size("shard") == 4
    fail(server, "conflict", 100)
    with pytest.raises(UserError, match=r"shard: OperationAborted: .*, tried 5 times; check the network"):
        store.write("shard", b"more rows")


def test_one_of_many_writers_creates_an_object(store: ObjectStore) -> None:
    versions: dict[int, object] = {}

    def create(number: int) -> None:
        versions[number] = store.create("claim", b"%d" % number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (number for number, version in versions.items() if version is not None)
    content = store.read("claim")
    assert content is not None and content[0] == b"%d" % winner and len(versions) == 8


# Errors.


def test_errors_are_one_line(server: S3Server, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: tuple[Callable[[ObjectStore], object], ...] = (
        lambda there: there.read("x"),
        lambda there: there.write("x", b""),
        lambda there: there.create("x", b""),
        lambda there: there.list("x"),
    )
    for request in requests:
        with pytest.raises(
            UserError, match="s3://no-such-bucket/p: the bucket no-such-bucket does not exist"
        ):
            request(ObjectStore("s3://no-such-bucket/p"))
        server.fault = lambda method, name: "denied"
        with pytest.raises(UserError, match=r"/x: access denied \(.*\); check the credentials") as denied:
            request(store)
        server.fault = lambda method, name: "busy"
        with pytest.raises(UserError, match=r"SlowDown: Please reduce.*tried 5 times; check the network"):
            request(store)
        server.fault = lambda method, name: None
        assert "\n" not in str(denied.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"HTTP error.*tried 5 times; check the network and the endpoint"):
        ObjectStore("s3://bucket/p").read("x")


def test_urls_at_which_nothing_can_be_written(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"hf://a/b: pairs cannot be written there; give a folder, or a URL of"
    ):
        ObjectStore("hf://a/b")
    with pytest.raises(UserError, match="s3:///pairs names no bucket"):
        ObjectStore("s3:///pairs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="no credentials found; set AWS_ACCESS_KEY_ID"):
        ObjectStore(url)
    monkeypatch.setenv("AWS_PROFILE", "mispelt")
    with pytest.raises(UserError, match=r"profile \(mispelt\) could not be found; check AWS_PROFILE"):
        ObjectStore(url)


def test_credentials_come_from_the_files_of_aws(
    url: str, server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    ObjectStore(url).write("x", b"1")
    assert server.get(f"{url.rpartition('/')[2]}/x") == b"1"


# Claims.


class Elsewhere(ObjectClaims):
    """Claims of another machine."""

    def __init__(self, store: ObjectStore, patience: float = 120.0) -> None:
        super().__init__(store, "claims", "pairs", patience)
        self.place = "elsewhere"


def claims_of(store: ObjectStore, patience: float = 120.0) -> ObjectClaims:
    return ObjectClaims(store, "claims", "pairs", patience)


def write_dead_claim(store: ObjectStore, number: int, **facts: object) -> None:
    claim = {"host": "elsewhere", "place": "elsewhere", "pid": 1, "start": "1", **facts}
    store.write(f"claims/pairs-{number:05d}.json", json.dumps(claim).encode())


def test_a_number_belongs_to_one_job_until_released(store: ObjectStore) -> None:
    with claims_of(store) as first, claims_of(store) as second:
        assert [first.take([0, 1, 2]), second.take([0, 1, 2]), first.take([0, 1, 2])] == [0, 1, 2]
        assert second.take([0, 1, 2]) is None and second.undecided([0, 1, 2]) == [0, 2]
        assert "process" in second.owner(0)
        first.release(0)
        assert second.take([0, 1, 2]) == 0 and not first.lost(2)
    assert store.list("claims") == {}, "leaving the block releases all"


def test_a_claim_of_a_dead_process_of_this_machine_is_taken_over_at_once(store: ObjectStore) -> None:
    with claims_of(store) as claims:
        write_dead_claim(store, 3, place=claims.place, pid=2**22 + 1)
        assert claims.take([3]) == 3 and not claims.lost(3)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which claims are dead. Their heartbeats have the real one."""
    clock = Clock()
    monkeypatch.setattr("d2g.core.claims.time", clock)
    return clock


def test_a_silent_claim_of_another_machine_is_taken_over_after_the_patience(
    store: ObjectStore, clock: Clock
) -> None:
    write_dead_claim(store, 0)
    with claims_of(store, 10.0) as claims:
        for clock.now in (0.0, 5.0, 9.0):
            assert claims.take([0]) is None and claims.undecided([0]) == [0]
        clock.now = 11.0
        assert claims.take([0]) == 0


def test_a_claim_with_heartbeats_is_kept(store: ObjectStore, clock: Clock) -> None:
    with Elsewhere(store, 0.4) as owner, claims_of(store, 10.0) as other:
        assert owner.take([0]) == 0 and other.take([0]) is None
        for _ in range(4):
            before = store.list("claims")
            wait_until(lambda before=before: store.list("claims") != before)  # type: ignore[misc]
            clock.now += 9.0
            assert other.take([0]) is None
        assert other.undecided([0]) == [], "a live owner is not undecided"
        assert not owner.lost(0)


def test_a_job_without_a_network_loses_its_claim_and_notices_it(server: S3Server, url: str) -> None:
    """The owner's requests fail for longer than the patience, as if it were suspended."""
    stopped, mine = ObjectStore(url), ObjectStore(url)
    with claims_of(mine, 0.6) as heir, Elsewhere(stopped, 0.6) as owner:
        assert owner.take([0]) == 0
        real = stopped.replace
        stopped.replace = lambda *arguments: {"e_tag": "0"}  # type: ignore[method-assign]
        wait_until(lambda: heir.take([0]) == 0)
        assert not owner.lost(0)
        stopped.replace = real  # type: ignore[method-assign]
        wait_until(lambda: owner.lost(0))
        owner.release(0)
        assert not heir.lost(0) and list(mine.list("claims")) == ["pairs-00000.json"]


def test_heartbeats_survive_a_lost_network(
    server: S3Server, store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    with claims_of(store, 0.4) as claims:
        assert claims.take([0]) == 0
        server.fault = lambda method, name: "busy"
        wait_until(lambda: "is not renewed" in caplog.text)
        server.fault = lambda method, name: None
        before = store.list("claims")
        wait_until(lambda: store.list("claims") != before)
        assert not claims.lost(0)


def test_leaving_without_a_network_logs_the_claims_that_stay(
    server: S3Server, store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    with claims_of(store) as claims:
        claims.take([0])
        server.fault = lambda method, name: "busy"
    assert "claims are not released" in caplog.text and "after 120 seconds" in caplog.text


@pytest.mark.parametrize("abandoned", [False, True], ids=["free", "abandoned"])
def test_jobs_race_for_numbers(abandoned: bool, store: ObjectStore, url: str, clock: Clock) -> None:
    if abandoned:
        for number in range(12):
            write_dead_claim(store, number)
    taken: dict[int, list[int]] = {job: [] for job in range(4)}
    end = time.monotonic() + 120

    def patience_is_over() -> None:
        clock.now = 61.0

    everybody = threading.Barrier(4, patience_is_over, timeout=120)

    def work(job: int) -> None:
        with claims_of(ObjectStore(url), 60.0) as claims:
            claims.place = f"machine {job}"
            # All find the abandoned claims at once, after none of them has increased for so long.
            if abandoned:
                assert claims.take(range(12)) is None
            everybody.wait()
            while len({number for numbers in taken.values() for number in numbers}) < 12:
                assert time.monotonic() < end, taken
                if (number := claims.take(range(12))) is not None:
                    taken[job].append(number)
                time.sleep(0.01)
            everybody.wait()

    threads = [threading.Thread(target=work, args=(job,)) for job in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for numbers in taken.values() for number in numbers) == list(range(12))
