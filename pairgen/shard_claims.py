"""Who makes which shard: several jobs on one shared folder, without a server, a clock or a lock that
outlives its owner.

A claim is a file in DIR/claims, made with O_EXCL. Its owner moves the file's modification time on as a
counter, never by the wall clock. Others call a claim dead when its owner's process is gone (same machine), or
when they saw the counter stand still for `patience` seconds of their own monotonic clock. A job that was only
asleep finds its claim gone and drops the shard. Should two jobs make one shard after all, they make the same
rows and the last rename wins: claims save work, correctness does not rest on them.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pairgen.store.spec import writing


class Claims:
    """The claims of one process on the shards of a store.

        with Claims(folder) as claims:
            while (shard := claims.take(unfinished())) is not None:
                ...
                claims.release(shard)

    Leaving the block releases all; a killed process leaves its claims to be taken over.
    """

    def __init__(self, folder: Path, patience: float = 120.0) -> None:
        self.folder, self.patience = Path(folder) / "claims", patience
        self.place = _place()
        self._held: dict[int, int] = {}  # shard -> open file
        self._seen: dict[int, tuple[tuple[int, int], float]] = {}  # shard -> its claim's state, since when
        self._alive: set[int] = set()  # foreign claims whose counter was seen to move
        self._stopped = threading.Event()
        self._guard = threading.Lock()
        self._beats = 0

    def __enter__(self) -> Self:
        self._heart = threading.Thread(target=self._beat, name="claims", daemon=True)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._heart.join()
        for shard in list(self._held):
            self.release(shard)

    def take(self, shards: Sequence[int]) -> int | None:
        """Claim the first of `shards` that nobody alive holds; None when there is none now."""
        for shard in shards:
            if shard not in self._held and (self._make(shard) or self._take_over(shard)):
                return shard
        return None

    def undecided(self, shards: Sequence[int]) -> list[int]:
        """Those of `shards` whose owners were neither seen alive nor found dead yet: worth waiting for."""
        return [shard for shard in shards if shard not in self._held and shard not in self._alive]

    def lost(self, shard: int) -> bool:
        """Whether another job has taken this process's claim over (this one slept too long)."""
        return _state(self._path(shard), inode_only=True) != (os.fstat(self._held[shard]).st_ino, 0)

    def release(self, shard: int) -> None:
        """Give the shard up, finished or not."""
        with self._exclusive():
            if not self.lost(shard):
                self._path(shard).unlink(missing_ok=True)
        with self._guard:
            os.close(self._held.pop(shard))

    def owner(self, shard: int) -> str:
        """`host, process N` of a claim, for messages."""
        found = _read(self._path(shard))
        return f"{found.get('host', 'an unknown host')}, process {found.get('pid', '?')}"

    def _path(self, shard: int) -> Path:
        return self.folder / f"pairs-{shard:05d}.json"

    def _make(self, shard: int) -> bool:
        with writing(self.folder.parent, "nothing was lost"):
            try:
                file = os.open(self._path(shard), os.O_CREAT | os.O_EXCL | os.O_RDWR)
            except FileExistsError:
                return False
            facts = {"host": socket.gethostname(), "place": self.place, "pid": os.getpid(), "start": _start()}
            os.write(file, json.dumps(facts).encode())
        with self._guard:
            self._held[shard] = file
        self._alive.discard(shard)
        return True

    def _take_over(self, shard: int) -> bool:
        path = self._path(shard)
        state = _state(path)
        if state is None or not self._dead(shard, state):
            return False
        with self._exclusive():
            grave = self.folder / f".{path.stem}.{uuid.uuid4().hex}"
            try:
                path.rename(grave)
            except FileNotFoundError:
                return False  # another job was quicker
            if _state(grave, inode_only=True) != (state[0], 0):
                # On a file system without locks a quicker job's fresh claim can be caught here: back with it.
                with suppress(FileExistsError):
                    os.link(grave, path)
                grave.unlink()
                return False
            grave.unlink()
            self._seen.pop(shard, None)
            return self._make(shard)

    def _dead(self, shard: int, state: tuple[int, int]) -> bool:
        found = _read(self._path(shard))
        if found.get("place") == self.place:
            return bool(_start(found["pid"]) != found["start"])
        now = time.monotonic()
        before, since = self._seen.setdefault(shard, (state, now))
        if before == state:
            return now - since >= self.patience
        if before[0] == state[0]:
            self._alive.add(shard)
        self._seen[shard] = (state, now)
        return False

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One job at a time, where the file system has locks."""
        file = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass  # none here (some Lustre mounts): the rename above decides
            yield
        finally:
            os.close(file)

    def _beat(self) -> None:
        while not self._stopped.wait(self.patience / 8):
            self._beats += 1
            with self._guard:
                for file in self._held.values():
                    moment = os.fstat(file).st_mtime_ns + 1_000_000_000
                    os.utime(file, ns=(moment, moment))


def _state(path: Path, inode_only: bool = False) -> tuple[int, int] | None:
    """(inode, counter) of a claim, None when it is gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, 0 if inode_only else found.st_mtime_ns


def _read(path: Path) -> dict[str, Any]:
    """What a claim says; empty when it is gone or its owner died before writing it."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _start(pid: int | None = None) -> str:
    """When a process started, in ticks since boot: tells it from later ones of its number. Gone: ""."""
    try:
        text = Path(f"/proc/{pid or os.getpid()}/stat").read_text()
    except OSError:
        return ""
    state, *fields = text.rpartition(")")[2].split()
    return "" if state == "Z" else fields[18]


def _place() -> str:
    """Where process numbers mean the same processes: a boot of a machine and a namespace on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # no /proc: only the counter tells
