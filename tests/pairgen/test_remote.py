"""pairgen.store.remote: rows from URLs equal rows from folders, or an error names the file."""

import json
import multiprocessing
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

from d2g.core.errors import SettingError, UserError
from d2g_cli import main as cli
from pairgen.store.dataset import PairSampler, pair_loader
from pairgen.store.hdf5 import DamagedShard
from pairgen.store.reader import PairReader
from pairgen.store.remote import default_cache, is_url
from pairgen.store.spec import quarantine_path, shard_path
from pairgen.verify import store_info
from servers import PlainFileSystem, Server
from stores import SPEC, flip_bit, put_shard, put_store, rows_of, same, spec_of

EVERY = range(22)


@pytest.fixture(autouse=True)
def short_retry_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pairgen.store.remote.WAITS", (0.0, 0.0, 0.01))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return put_store(tmp_path / "store", quarantined=[3])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def memory(store: Path) -> Iterator[str]:
    """The store at a memory:// URL."""
    fs = fsspec.filesystem("memory")
    fs.put(str(store), "/bucket/pairs", recursive=True)
    yield "memory://bucket/pairs"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def copies(cache: Path) -> list[int]:
    """Numbers of the shards with a copy in the cache."""
    return sorted(int(path.name.split("-")[1]) for path in cache.glob("*/pairs-*-*.h5"))


def leftovers(cache: Path) -> list[Path]:
    return list(cache.rglob("*.tmp"))


@pytest.fixture
def server(store: Path) -> Iterator[Server]:
    fsspec.register_implementation("plain", PlainFileSystem, clobber=True)
    running = Server(store)
    threading.Thread(target=running.serve_forever, daemon=True, args=(0.01,)).start()
    yield running
    running.shutdown()
    running.server_close()


# Reading.


@pytest.mark.parametrize("kind", ["memory", "file", "server"])
def test_a_url_reads_like_the_folder(
    kind: str, store: Path, memory: str, server: Server, cache: Path
) -> None:
    url = {"memory": memory, "file": f"file://{store}", "server": server.url}[kind]
    local, remote = PairReader(store), PairReader(url + "/", cache=cache, expect=SPEC)
    assert len(remote) == 21 and remote.complete and remote.quarantined == [3] and remote.gib == local.gib
    assert copies(cache) == [], "opening brings no shard"
    assert same(remote.read([0, 20]), local.read([0, 20])) and copies(cache) == [0, 2]
    assert same(remote.read(range(21)), local.read(range(21))) and remote.prompts() == local.prompts()
    assert copies(cache) == [0, 1, 2] and not leftovers(cache)


def test_is_url() -> None:
    assert is_url("s3://bucket/pairs") and is_url("simplecache::s3://bucket/pairs")
    assert not is_url("pairs") and not is_url(Path("s3://bucket/pairs")) and not is_url("/a/b:c")


def test_copies_are_downloaded_once_and_reused(server: Server, cache: Path) -> None:
    shard_urls = [f"/pairs/shards/pairs-0000{k}.h5" for k in range(3)]
    before = PairReader(server.url, cache=cache).read(range(21))
    assert sorted(ask for ask in server.requests if ask in shard_urls) == shard_urls
    server.requests.clear()
    second = PairReader(server.url, cache=cache)
    assert same(second.read(range(21)), before) and not set(shard_urls) & set(server.requests)
    assert sum(ask.endswith("511") for ask in server.requests) == 3, "the second reader compares the headers"


def test_default_cache_folder(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    PairReader(f"file://{store}").read([0])
    assert copies(tmp_path / "xdg" / "diffusion2gan" / "pairs") == [0]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "diffusion2gan" / "pairs"


@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_come_from_a_url(server: Server, store: Path, cache: Path, workers: int) -> None:
    sampler = PairSampler(21, 4, 0, block=8, window=1)
    reader = PairReader(server.url, cache=cache, cache_gib=40_000 / 2**30)
    batches = pair_loader(reader, sampler, workers=workers)
    for rows, batch in islice(zip(sampler, batches, strict=False), 12):
        assert same(batch, PairReader(store).read(rows))
    batches.close()  # type: ignore[attr-defined]


def test_prefetch_downloads_in_the_background(server: Server, cache: Path) -> None:
    reader = PairReader(server.url, cache=cache)
    reader.prefetch([0, 20], block=1)
    for _ in range(1000):
        if copies(cache) == [0, 2]:
            break
        threading.Event().wait(0.01)
    assert copies(cache) == [0, 2]
    server.requests.clear()
    assert same(reader.read([0, 20]), rows_of(SPEC, [0, 21])) and server.requests == []


# Stores that change.


def test_another_store_at_the_same_url_is_not_read_from_the_cache(store: Path, cache: Path) -> None:
    url = f"file://{store}"
    PairReader(url, cache=cache).read(range(21))
    shutil.rmtree(store)
    other = spec_of(seed=6)
    put_store(store, other)
    reader = PairReader(url, cache=cache)
    assert len(reader) == 22 and same(reader.read(EVERY), rows_of(other, EVERY))
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_a_replaced_shard_is_downloaded_again(store: Path, cache: Path) -> None:
    url = f"file://{store}"
    PairReader(url, cache=cache).read(range(21))
    put_shard(store, SPEC, 0, quarantined=[1, 2])  # the same spec with other quarantined rows
    reader = PairReader(url, cache=cache)
    assert reader.quarantined == [1, 2] and copies(cache) == [1, 2], "the old copy is deleted"
    available = [i for i in EVERY if i not in (1, 2)]
    assert same(reader.read(range(20)), rows_of(SPEC, available))
    quarantine_path(store, 0).unlink()
    put_shard(store, SPEC, 0)
    assert same(PairReader(url, cache=cache).read(EVERY), rows_of(SPEC, EVERY)), "a record may vanish too"


def test_a_shard_that_changes_or_disappears_while_it_is_read(store: Path, cache: Path) -> None:
    reader = PairReader(f"file://{store}", cache=cache)
    reader._source.check()
    reader._source._user_block(1)  # type: ignore[attr-defined]  # reads the current header
    put_shard(store, SPEC, 1, quarantined=[9])
    with pytest.raises(DamagedShard, match="or changed while it was read"):
        reader.read([8])
    shard_path(store, 2).unlink()
    with pytest.raises(UserError, match=r"pairs-00002\.h5 does not exist; check the URL"):
        reader.read([20])
    assert copies(cache) == [] and not leftovers(cache)


# Damage and network errors.


def test_a_corrupt_download_is_not_cached(store: Path, server: Server, cache: Path) -> None:
    flip_bit(shard_path(store, 1), 5000)
    with pytest.raises(DamagedShard) as caught:
        PairReader(server.url, cache=cache).read([0, 8])
    says = (
        rf"{re.escape(server.url)}/shards/pairs-00001\.h5: its bytes do not match .*; repair the store there"
    )
    assert re.match(says, str(caught.value)) and "\n" not in str(caught.value)
    assert server.requests.count("/pairs/shards/pairs-00001.h5") == 2, (
        "a second download, because the network may have damaged the first"
    )
    assert copies(cache) == [0] and not leftovers(cache)
    batch = PairReader(server.url, cache=cache, skip_bad=True).read([7, 14, 0])
    assert batch.index.tolist() == [16, 17, 0]
    assert list(batch.skipped) == [f"{server.url}/shards/pairs-00001.h5"]


def test_a_truncated_shard_is_refused_before_the_download(store: Path, server: Server, cache: Path) -> None:
    path = shard_path(store, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedShard, match=r"pairs-00001\.h5: truncated or overwritten"):
        PairReader(server.url, cache=cache).read([8])
    assert "/pairs/shards/pairs-00001.h5" not in server.requests
    batch = PairReader(server.url, cache=cache, skip_bad=True).read([7, 8])
    assert batch.index.tolist() == [16, 17]


@pytest.mark.parametrize("cut", [0, 1, 511, 4000])
def test_an_interrupted_download_is_retried(server: Server, cache: Path, cut: int) -> None:
    faults_left = [2]

    def fault(path: str) -> int | None:
        if "/shards/" not in path or not faults_left[0]:
            return None
        faults_left[0] -= 1
        return cut

    server.fault = fault
    reader = PairReader(server.url, cache=cache)
    assert same(reader.read([0]), rows_of(SPEC, [0])) and faults_left == [0]
    assert copies(cache) == [0] and not leftovers(cache)


def test_a_network_failure_is_a_one_line_error(server: Server, cache: Path) -> None:
    server.fault = lambda path: 100 if "/shards/" in path else None
    for skip in (False, True):  # network errors are not damage: no row is skipped
        with pytest.raises(UserError, match=r"pairs-00000\.h5: IncompleteRead .*, tried 4 times") as caught:
            PairReader(server.url, cache=cache, skip_bad=skip).read([0])
        assert "\n" not in str(caught.value) and not isinstance(caught.value, DamagedShard)
    assert copies(cache) == [] and not leftovers(cache)


def test_leftovers_of_a_killed_download_are_not_read(server: Server, store: Path, cache: Path) -> None:
    reader = PairReader(server.url, cache=cache)
    folder = reader._source.folder
    name = f"pairs-00000-{'0' * 16}.host-1-2.99999.tmp"
    (folder / name).write_bytes(shard_path(store, 0).read_bytes()[:700])
    assert same(reader.read([0]), rows_of(SPEC, [0])) and not leftovers(cache)


def test_a_damaged_copy_is_found(store: Path, cache: Path) -> None:
    PairReader(f"file://{store}", cache=cache).read([0])
    (copy,) = cache.glob("*/pairs-00000-*.h5")
    data = bytearray(copy.read_bytes())
    latent = rows_of(SPEC, [0]).latents.numpy().tobytes()
    data[bytes(data).index(latent) + 3] ^= 1
    copy.write_bytes(data)
    says = rf"latent of row 0 does not match its checksum\); .*remove its copy {re.escape(str(copy.parent))}"
    with pytest.raises(DamagedShard, match=says):
        PairReader(f"file://{store}", cache=cache).read([0])


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("memory://nothing/here", "memory://nothing/here is not a pair store: it has no store.json"),
        ("file:///no/such/folder", "is not a pair store"),
        ("nope://bucket/pairs", "Protocol not known: nope; give a folder, or a URL such as s3://"),
        ("dropbox://pairs", "dropbox:// needs another package: .*dropboxdrivefs"),
    ],
)
def test_invalid_urls_are_refused(url: str, says: str, cache: Path) -> None:
    with pytest.raises(UserError, match=says) as caught:
        PairReader(url, cache=cache)
    assert "\n" not in str(caught.value)


def test_access_denied(server: Server, cache: Path) -> None:
    with pytest.raises(UserError, match=r"denied/store.json: access denied .*give credentials"):
        PairReader(server.url + "/denied", cache=cache)


def test_a_damaged_store_json_is_reported_with_its_url(store: Path, server: Server, cache: Path) -> None:
    (store / "store.json").write_text("{}")
    with pytest.raises(UserError, match=r"plain://.*/store\.json is damaged"):
        PairReader(server.url, cache=cache)


def test_an_unwritable_cache_is_reported(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
        PairReader(f"file://{store}", cache=tmp_path / "file").read([0])


# A bounded cache.


def test_the_least_recently_used_copy_is_evicted(server: Server, cache: Path) -> None:
    room = 2.2 * max(PairReader(server.url, cache=cache)._source.sizes.values())  # type: ignore[attr-defined]
    bounded = dict[str, Any](cache=cache, cache_gib=room / 2**30)
    reader = PairReader(server.url, **bounded)
    assert same(reader.read([0]), rows_of(SPEC, [0])) and same(reader.read([8]), rows_of(SPEC, [9]))
    assert copies(cache) == [0, 1]
    PairReader(server.url, **bounded).read([0])  # now shard 1 is the least recently used
    assert same(reader.read([20]), rows_of(SPEC, [21])) and copies(cache) == [0, 2]
    total = sum(path.stat().st_size for path in cache.rglob("*.h5"))
    assert total <= room and same(reader.read(range(21)), PairReader(server.url, **bounded).read(range(21)))


def test_a_clock_that_was_set_back_keeps_the_copies_in_use(server: Server, cache: Path) -> None:
    """A copy that bears a time of tomorrow is evicted before those that are used now."""
    room = 2.2 * max(PairReader(server.url, cache=cache)._source.sizes.values())  # type: ignore[attr-defined]
    reader = PairReader(server.url, cache=cache, cache_gib=room / 2**30)
    reader.read([0])
    for path in cache.rglob("*.h5"):
        os.utime(path, (time.time() + 86400, path.stat().st_mtime))
    PairReader(server.url, cache=cache, cache_gib=room / 2**30).read([8])
    assert copies(cache) == [0, 1]
    reader.read([20])
    assert copies(cache) == [1, 2]


def test_copies_of_other_stores_are_evicted_too(server: Server, tmp_path: Path, cache: Path) -> None:
    other = put_store(tmp_path / "other", spec_of(seed=9))
    PairReader(f"file://{other}", cache=cache).read(EVERY)
    PairReader(server.url, cache=cache, cache_gib=40_000 / 2**30).read(range(21))
    assert sum(path.stat().st_size for path in cache.rglob("*.h5")) <= 40_000


def test_a_cache_smaller_than_one_shard(server: Server, cache: Path) -> None:
    with pytest.raises(SettingError, match=r"cache_gib is 1e-06, one shard of .* has 0\.000; give more"):
        PairReader(server.url, cache=cache, cache_gib=1e-6)
    with pytest.raises(SettingError, match="cache_gib is -1"):
        PairReader(server.url, cache=cache, cache_gib=-1)


# Several processes.


def _read_all(url: str, cache: Path, bound: float, done: Any) -> None:
    reader = PairReader(url, cache=cache, cache_gib=bound)
    done.send(
        all(same(reader.read(range(21)), rows_of(SPEC, [i for i in EVERY if i != 3])) for _ in range(5))
    )


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("bound", [0.0, 40_000 / 2**30])
def test_processes_share_a_cache(server: Server, cache: Path, bound: float) -> None:
    """Two concurrent readers download each shard once, or again after the bound evicted it."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(3)]
    children = [
        context.Process(target=_read_all, args=(server.url, cache, bound, sender)) for _, sender in pipes
    ]
    for child in children:
        child.start()
    assert all(receiver.recv() for receiver, _ in pipes)
    for child in children:
        child.join()
    assert not leftovers(cache)
    requests = [ask for ask in server.requests if ask.endswith(".h5")]
    if bound:
        assert sum(path.stat().st_size for path in cache.rglob("*.h5")) <= 40_000
    else:
        assert sorted(requests) == [f"/pairs/shards/pairs-0000{k}.h5" for k in range(3)]
    assert os.path.isdir(cache)


# The command line.


def test_commands_accept_or_refuse_urls(store: Path, memory: str, tmp_path: Path) -> None:
    runner = CliRunner(env={"XDG_CACHE_HOME": str(tmp_path / "xdg")})
    result = runner.invoke(cli.app, ["pairs", "info", f"file://{store}", "--json"])
    assert result.exit_code == 0, result.output
    remote_info, plain = json.loads(result.stdout.splitlines()[-1]), store_info(store)
    assert remote_info == json.loads(json.dumps(plain)) and remote_info["pairs"] == 21
    for words in (["verify", memory], ["repair", memory], ["merge", memory, "--out", str(tmp_path / "out")]):
        ended = runner.invoke(cli.app, ["pairs", *words])
        assert isinstance(ended.exception, UserError), ended.output
        assert str(ended.exception).startswith(
            "memory://bucket/pairs is a URL; this needs a folder of this machine"
        )
    assert not list(tmp_path.glob("memory*")) and not Path("memory:").exists()
