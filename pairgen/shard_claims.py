"""Dividing the shards of one store among jobs that share its folder, without a server or a common clock.

A claim is a file in DIR/claims, created with O_EXCL. Its owner increments the file's modification time as a
heartbeat counter, independent of the wall clock. Other jobs consider a claim dead when the owner's process
has ended (same machine), or when they saw no increment for `patience` seconds of their own monotonic clock. A
job that was only suspended finds its claim gone and drops the shard. If two jobs do generate one shard, they
compute the same rows and the last rename wins: claims save work, but correctness does not depend on them.
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

    Leaving the block releases all claims. Claims of a killed process are taken over by other jobs.
    """

    def __init__(self, folder: Path, patience: float = 120.0) -> None:
        self.folder, self.patience = Path(folder) / "claims", patience
        self.place = _place()
        self._held: dict[int, int] = {}  # shard -> open file
        self._observed: dict[int, tuple[tuple[int, int], float]] = {}  # shard -> claim state, when first seen
        self._alive: set[int] = set()  # claims of other jobs whose counter was seen to increase
        self._stopped = threading.Event()
        self._guard = threading.Lock()
        self._beats = 0

    def __enter__(self) -> Self:
        self._heartbeat = threading.Thread(target=self._beat, name="claims", daemon=True)
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._heartbeat.join()
        for shard in list(self._held):
            self.release(shard)

    def take(self, shards: Sequence[int]) -> int | None:
        """Claim the first of `shards` that no live job holds; None if there is none now."""
        for shard in shards:
            if shard not in self._held and (self._create(shard) or self._take_over(shard)):
                return shard
        return None

    def undecided(self, shards: Sequence[int]) -> list[int]:
        """The shards whose owners may be alive or dead: a caller should wait until that is known."""
        return [shard for shard in shards if shard not in self._held and shard not in self._alive]

    def lost(self, shard: int) -> bool:
        """Whether another job has taken over this process's claim because it was suspended too long."""
        return _state(self._path(shard), inode_only=True) != (os.fstat(self._held[shard]).st_ino, 0)

    def release(self, shard: int) -> None:
        """Release the claim, whether the shard is finished or not."""
        with self._exclusive():
            if not self.lost(shard):
                self._path(shard).unlink(missing_ok=True)
        with self._guard:
            os.close(self._held.pop(shard))

    def owner(self, shard: int) -> str:
        """`host, process N` of a claim, for messages."""
        claim = _read(self._path(shard))
        return f"{claim.get('host', 'an unknown host')}, process {claim.get('pid', '?')}"

    def _path(self, shard: int) -> Path:
        return self.folder / f"pairs-{shard:05d}.json"

    def _create(self, shard: int) -> bool:
        with writing(self.folder.parent, "nothing was lost"):
            try:
                file = os.open(self._path(shard), os.O_CREAT | os.O_EXCL | os.O_RDWR)
            except FileExistsError:
                return False
            # The content identifies the owner's process, so that other jobs can check whether it still runs.
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
            # Move the dead claim away, then check that it is still the one examined above.
            removed = self.folder / f".{path.stem}.{uuid.uuid4().hex}"
            try:
                path.rename(removed)
            except FileNotFoundError:
                return False  # another job was quicker
            if _state(removed, inode_only=True) != (state[0], 0):
                # Without file locks this can be the new claim of a faster job: put it back.
                with suppress(FileExistsError):
                    os.link(removed, path)
                removed.unlink()
                return False
            removed.unlink()
            self._observed.pop(shard, None)
            return self._create(shard)

    def _dead(self, shard: int, state: tuple[int, int]) -> bool:
        # On this machine, ask the system whether the owner still runs; elsewhere, watch the counter.
        claim = _read(self._path(shard))
        if claim.get("place") == self.place:
            return bool(_start(claim["pid"]) != claim["start"])
        # Another machine: a counter that does not increase for `patience` seconds of our clock is dead.
        now = time.monotonic()
        before, since = self._observed.setdefault(shard, (state, now))
        if before == state:
            return now - since >= self.patience
        if before[0] == state[0]:
            self._alive.add(shard)
        self._observed[shard] = (state, now)
        return False

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Exclude other jobs, on file systems with locks."""
        file = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass  # no locks (some Lustre mounts): the rename in _take_over decides
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
    """(inode, counter) of a claim, None if it does not exist."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, 0 if inode_only else stat.st_mtime_ns


def _read(path: Path) -> dict[str, Any]:
    """The content of a claim; empty if it does not exist or its owner died before writing it."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _start(pid: int | None = None) -> str:
    """Start time of a process in ticks since boot, which distinguishes reused numbers; "" if it has ended."""
    try:
        text = Path(f"/proc/{pid or os.getpid()}/stat").read_text()
    except OSError:
        return ""
    state, *fields = text.rpartition(")")[2].split()
    return "" if state == "Z" else fields[18]


def _place() -> str:
    """Identifies the machine, its boot and the PID namespace: where a process number is unambiguous."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # no /proc: rely on the counter
