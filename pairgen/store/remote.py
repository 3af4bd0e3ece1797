"""Pair stores at URLs of any file system that fsspec knows, behind a local cache of complete shards.

A copy is renamed to its final name only when its length and sha256 equal those in the first 512 bytes.
The name contains the sha256, so an outdated copy is never taken for the current shard. Credentials and
endpoints are configured as the file system's own package documents (environment variables, ~/.config/fsspec).
Several processes may fill one cache: file locks order them.
"""

import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from d2g.core.atomic_files import DISK_FULL_ERRNOS
from d2g.core.config import digest
from d2g.core.errors import SettingError, UserError
from d2g.core.file_lock import lock_file
from pairgen.store.hdf5 import USER_BLOCK_BYTES, DamagedShard, OpenShard, damage_error, parse_user_block
from pairgen.store.spec import parse_spec, shard_numbers, writing

T = TypeVar("T")

WAITS = (0.2, 1.0, 5.0, 15.0)  # seconds before each new try
THREADS = 16
DOWNLOADS = 4  # simultaneous downloads of shards that are needed soon
LOCK_SECONDS = 900.0  # to wait for the download of another process
CLOCK_TOLERANCE_NS = 600 * 10**9  # between the clocks of machines that share a cache
SAFE = "the store itself is untouched"


class _MissingFile(UserError):
    """A file that the store does not have."""


def is_url(folder: Path | str) -> bool:
    """Whether `folder` is an fsspec URL. A Path is never one, because it merges the two slashes."""
    return isinstance(folder, str) and ("://" in folder or "::" in folder)


class RemoteShards:
    """The shards of the store at `url`, each copied to a folder inside `cache` when it is first needed.

    cache_gib: limits the size of `cache`; the least recently used copies are deleted. 0: no limit. Processes
    may share `cache`.
    """

    def __init__(self, url: str, cache: Path | str | None = None, cache_gib: float = 0.0) -> None:
        if cache_gib < 0:
            raise SettingError(f"cache_gib is {cache_gib}; expected GiB for copies, or 0 for no limit")
        self.url, self.root = url.rstrip("/"), Path(cache or default_cache())
        self.limit = int(cache_gib * 2**30)
        # The spec identifies the store: a store with another spec gets another cache folder.
        try:
            content = self._retry("store.json", _read_file)
        except _MissingFile as error:
            raise UserError(f"{url} is not a pair store: it has no store.json; check the URL") from error
        self.spec = parse_spec(content, f"{self.url}/store.json")
        self.folder = self.root / f"{cache_label(self.url)}-{digest([self.url, self.spec.sha256])[:16]}"
        self.remedy = f"repair the store there; if it is intact, remove its copy {self.folder}"
        # List the shards once; a cache must hold at least one of them.
        sizes = self._list("shards")
        self.shards = shard_numbers(self.spec, sizes)
        self.sizes = {shard: sizes[PurePosixPath(self._file(shard)).name] for shard in self.shards}
        self.size = sum(self.sizes.values())
        if self.limit and (largest := max(self.sizes.values(), default=0)) > self.limit:
            raise SettingError(
                f"cache_gib is {cache_gib}, one shard of {url} has {largest / 2**30:.3f}; give more"
            )
        self.bounded = 0 < self.limit < self.size
        # State that grows with use: first bytes of shards, and downloads of this process.
        self._user_blocks: dict[int, tuple[int, str]] = {}
        self._downloads: tuple[int, set[int]] = (0, set())
        self._copy_records()

    def holds(self, file: str) -> bool:
        """Whether the store has a file of this name in the folder of store.json."""
        return file in self._list("")

    def parts(self) -> list[Path]:
        """Names of the files in the folder of unfinished shards."""
        return [Path(name) for name in self._list("partial")]

    def name(self, shard: int) -> str:
        return f"{self.url}/{self._file(shard)}"

    def check(self) -> dict[int, str]:
        """Compare the local copies with the store and delete outdated ones. Returns shard -> damage."""
        copies: dict[int, list[Path]] = {}
        for path in self.folder.glob("pairs-*-*.h5"):
            copies.setdefault(int(path.name.split("-")[1]), []).append(path)
        with ThreadPoolExecutor(THREADS) as pool:
            damage = dict(pool.map(self._check_copy, sorted(copies.keys() & set(self.shards))))
        # Delete copies of shards that are gone, and copies with another sha256 than the store's.
        for shard, paths in copies.items():
            for path in paths:
                if shard not in self.sizes or (not damage[shard] and path != self._path(shard)):
                    path.unlink(missing_ok=True)
        return {shard: reason for shard, reason in damage.items() if reason}

    def quarantined(self, shard: int, recorded: list[int]) -> list[int]:
        return recorded

    def open(self, shard: int) -> OpenShard:
        path = self._path(shard)
        for _ in range(10):
            try:
                _mark_used(path)
                return OpenShard(path)
            except FileNotFoundError:  # not downloaded yet, or another process has just made room
                self._download(shard, path)
        raise UserError(f"{self.root}: copies vanish before they are read; raise cache_gib")

    def request(self, shard: int) -> bool:
        if shard in self._user_blocks and self._path(shard).exists():
            return True
        if self._downloads[0] != os.getpid():  # threads do not cross a fork
            self._downloads = os.getpid(), set()
        downloading = self._downloads[1]
        if shard not in downloading and len(downloading) < DOWNLOADS:
            downloading.add(shard)
            threading.Thread(target=self._download_quietly, args=(shard, downloading), daemon=True).start()
        return False

    def _download_quietly(self, shard: int, downloading: set[int]) -> None:
        try:
            self._download(shard, self._path(shard))
        except UserError:
            pass  # reading a row of the shard raises the same error
        finally:
            downloading.discard(shard)

    def _file(self, shard: int) -> str:
        return f"shards/pairs-{shard:05d}.h5"

    def _path(self, shard: int) -> Path:
        return self.folder / f"pairs-{shard:05d}-{self._user_block(shard)[1][:16]}.h5"

    def _user_block(self, shard: int) -> tuple[int, str]:
        """Length and sha256 according to the shard's first bytes, which are read once."""
        if shard not in self._user_blocks:
            file = self._file(shard)
            head = self._retry(
                file,
                lambda fs, path: bytes(fs.cat_file(path, start=0, end=USER_BLOCK_BYTES))[:USER_BLOCK_BYTES],
            )
            length, sha256 = parse_user_block(head)
            if length != (self.sizes[shard] or length) or not re.fullmatch("[0-9a-f]{64}", sha256):
                reason = f"truncated or overwritten ({self.sizes[shard]} bytes, its header says {length})"
                raise damage_error(self.name(shard), reason, self.remedy)
            self._user_blocks[shard] = length, sha256
        return self._user_blocks[shard]

    def _check_copy(self, shard: int) -> tuple[int, str]:
        try:
            self._user_block(shard)
        except DamagedShard as error:
            return shard, error.reason
        return shard, ""

    def _download(self, shard: int, path: Path) -> None:
        """Download a shard to `path`, completely or not at all. One process does it, and the others wait."""
        length, sha256 = self._user_block(shard)
        with writing(self.root, SAFE), _file_lock(self.folder, f"pairs-{shard:05d}") as locked:
            if path.exists():
                return
            if locked:  # remove what a killed download has left
                for leftover in self.folder.glob(f"pairs-{shard:05d}-*.tmp"):
                    leftover.unlink(missing_ok=True)
            # Reserve room, download under a temporary name, and rename the verified copy.
            temporary = _temporary_path(path, length)
            try:
                _make_room(self.root, self.limit, temporary)
                for _ in range(2):  # a network error may damage a file once
                    self._retry(self._file(shard), lambda fs, remote: fs.get_file(remote, str(temporary)))
                    if _verify_copy(temporary, length, sha256):
                        temporary.replace(path)
                        return
            finally:
                temporary.unlink(missing_ok=True)
        reason = "its bytes do not match their sha256, or changed while it was read"
        raise damage_error(self.name(shard), reason, self.remedy)

    def _copy_records(self) -> None:
        """Copy the current quarantine records to the cache folder, and delete outdated ones."""
        # Fetch all records in parallel before the folder changes.
        names = [name for name in self._list("quarantine") if name.endswith(".rows.json")]
        with ThreadPoolExecutor(THREADS) as pool:
            files = [f"quarantine/{name}" for name in names]
            contents = list(pool.map(lambda file: self._retry(file, _read_file), files))
        folder = self.folder / "quarantine"
        with writing(self.root, SAFE):
            folder.mkdir(parents=True, exist_ok=True)
            # Replace each record in one step: another process may be reading it.
            for name, content in zip(names, contents, strict=True):
                temporary = folder / f"{name}.{os.getpid()}.tmp"
                temporary.write_bytes(content)
                temporary.replace(folder / name)
            for path in folder.glob("*.rows.json"):
                if path.name not in names:
                    path.unlink(missing_ok=True)

    def _list(self, folder: str) -> dict[str, int]:
        """Sizes of the files in a folder of the store, by name; empty if there is no such folder."""

        def listed(fs: Any, path: str) -> list[dict[str, Any]]:
            fs.invalidate_cache()
            return list(fs.ls(path, detail=True))

        try:
            entries = self._retry(folder, listed)
        except _MissingFile:
            return {}
        return {PurePosixPath(entry["name"]).name: int(entry["size"] or 0) for entry in entries}

    def _retry(self, file: str, call: Callable[[Any, str], T]) -> T:
        """Call `call(file system, path)` and retry network errors. Raises UserError, or its _MissingFile."""
        fs, root = _file_system(self.url)
        # Missing files and denied access are final; other errors may be the network's.
        for wait in (*WAITS, None):
            try:
                return call(fs, f"{root.rstrip('/')}/{file}".rstrip("/"))
            except (FileNotFoundError, NotADirectoryError) as error:
                raise _MissingFile(
                    f"{self.url}/{file} does not exist; check the URL and the store"
                ) from error
            except PermissionError as error:
                text = f"{self.url}/{file}: access denied ({_line(error)})"
                raise UserError(f"{text}; give credentials as this protocol's package takes them") from error
            except Exception as error:  # each protocol has its own
                # A full disk of this machine does not improve by waiting.
                if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
                    raise
                if wait is None:
                    what = f"{type(error).__name__} ({_line(error)}), tried {len(WAITS) + 1} times"
                    text = f"{self.url}/{file}: {what}; check the network and the URL"
                    raise UserError(f"{text}, then run the same command again") from error
                time.sleep(wait)
        raise AssertionError("unreachable")


def _file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and its path there. fsspec keeps one for each process and thread."""
    import fsspec  # type: ignore[import-untyped]

    protocol = url.split("::")[0].split("://")[0]
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {protocol}:// needs another package: {_line(error)}") from error
    except ValueError as error:
        text = f"{url}: {_line(error)}"
        raise UserError(f"{text}; give a folder, or a URL such as s3://bucket/pairs") from error
    return fs, str(root)


def _read_file(fs: Any, path: str) -> bytes:
    return bytes(fs.cat_file(path))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _verify_copy(path: Path, length: int, sha256: str) -> bool:
    """Whether a file has this length and sha256; if so, it is synced to the disk."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != length:
            return False
        file.seek(USER_BLOCK_BYTES)
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            return False
        os.fsync(file.fileno())
    return True


# The cache folder.


def default_cache() -> Path:
    """$XDG_CACHE_HOME/diffusion2gan/pairs, or ~/.cache/diffusion2gan/pairs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion2gan" / "pairs"


def cache_label(url: str) -> str:
    """The readable part of the name of a store's folder: the end of its URL."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", PurePosixPath(url).name)


@contextmanager
def _file_lock(folder: Path, stem: str) -> Iterator[bool]:
    """Hold FOLDER/STEM.lock against other processes and threads.

    Yields False if the disk has no locks, or if another process holds it for too long: then the work is done
    twice, and the last rename wins.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / f"{stem}.lock", os.O_CREAT | os.O_RDWR)
    try:
        yield lock_file(file, LOCK_SECONDS)
    finally:
        os.close(file)


def _temporary_path(path: Path, length: int) -> Path:
    """A unique name for an unfinished download, which contains its final length."""
    unique = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    return path.with_name(f"{path.stem}.{unique}.{length}.tmp")


def _make_room(root: Path, limit: int, temporary: Path) -> None:
    """Create `temporary`, then delete the least recently used copies below `root` until all take at most
    `limit` bytes (0: no limit)."""
    with _file_lock(root, ""):
        temporary.touch()  # counts from now on, with its final length
        if not limit:
            return
        # Unfinished downloads count too, but only complete copies are deleted, least recently used first.
        copies = {
            path: _size_and_use(path) for path in root.glob("*/pairs-*") if path.suffix in (".h5", ".tmp")
        }
        total = sum(size for size, _ in copies.values())
        for path, (size, _) in sorted(copies.items(), key=lambda item: item[1][1]):
            if total > limit and path.suffix == ".h5":
                path.unlink(missing_ok=True)
                total -= size


def _size_and_use(path: Path) -> tuple[int, int]:
    """The size of a copy in bytes, final if it is still growing, and the time of its last use.

    A time of use in the future, which a clock left that was set back since, counts as long ago.
    """
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0, 0
    used = stat.st_atime_ns if stat.st_atime_ns <= time.time_ns() + CLOCK_TOLERANCE_NS else 0
    return int(path.name.split(".")[-2]) if path.suffix == ".tmp" else stat.st_size, used


def _mark_used(path: Path) -> None:
    """Set a copy's access time. Its modification time stays: it is part of the file's identity."""
    with suppress(PermissionError):  # the copy belongs to another user
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
