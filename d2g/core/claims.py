"""Dividing work among jobs without a server or a common clock (`WorkClaims`); owning a folder alone.

A claim has a heartbeat counter, which its owner increments. Other jobs consider a claim dead when the owner's
process has ended (same machine), or when they saw no increment for `patience` seconds of their own monotonic
clock. A job that was only suspended finds its claim gone.

In a folder, a claim is a file, created with O_EXCL, whose modification time is the counter, independent of
the wall clock. Stale NFS handles are opened again. `FolderOwner` owns a folder alone.
`d2g.core.object_claims` has the claims of object stores.
"""

import errno
import json
import os
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from d2g.core.atomic_files import retry_stale
from d2g.core.errors import UserError
from d2g.core.file_lock import lock_file
from d2g.core.json_files import parse_json
from d2g.core.logs import EVERY_RANK, logger
from d2g.core.regular_files import open_regular

R = TypeVar("R")
ClaimState = tuple[int, int | str]
"""What a job sees of a claim: its identity (the inode of a file), and its counter."""
CLAIM_BYTES = 1 << 16  # more than any claim has
OWNER = ".owner"
"""The folder of the claim of a `FolderOwner`."""


class WorkClaims(ABC):
    """The claims of one process on numbered pieces of work.

        with FileClaims(folder) as claims:
            while (number := claims.take(unfinished())) is not None:
                ...
                claims.release(number)

    Leaving the block releases all claims. Claims of a killed process are taken over by other jobs.
    """

    def __init__(self, patience: float = 120.0) -> None:
        self.patience = patience
        self.poll_seconds = min(1.0, patience / 8)
        """How long a job should wait before it asks again for a claim that may be dead."""
        self.place = _place()
        self._observed: dict[int, tuple[ClaimState, float]] = {}  # number -> (state, when)
        self._alive: set[int] = set()  # claims of other jobs whose counter has increased
        self._stopped = threading.Event()
        self._guard = threading.Lock()

    def __enter__(self) -> Self:
        self._heartbeat = threading.Thread(target=self._beat, name="claims", daemon=True)
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._heartbeat.join()
        for number in self.held():
            self.release(number)

    def take(self, numbers: Sequence[int]) -> int | None:
        """Claim the first of `numbers` that no live job holds; None if there is none now."""
        held = set(self.held())
        for number in numbers:
            if number not in held and (self._create(number) or self._take_over(number)):
                return number
        return None

    def undecided(self, numbers: Sequence[int]) -> list[int]:
        """The numbers whose owners may be alive or dead: a caller should wait until that is known."""
        decided = self._alive.union(self.held())
        return [number for number in numbers if number not in decided]

    @abstractmethod
    def held(self) -> list[int]:
        """The numbers that this process has claimed."""

    @abstractmethod
    def lost(self, number: int) -> bool:
        """Whether another job has taken over this process's claim because it was suspended too long."""

    @abstractmethod
    def release(self, number: int) -> None:
        """Release the claim, whether the number is finished or not."""

    def owner(self, number: int) -> str:
        """`host, process N` of a claim, for messages."""
        claim = self._read(number)
        return f"{claim.get('host', 'an unknown host')}, process {claim.get('pid', '?')}"

    def is_alive_here(self, number: int) -> bool:
        """Whether the owner of a claim is a process of this machine, which runs."""
        claim = self._read(number)
        return claim.get("place") == self.place and self._runs(claim)

    @abstractmethod
    def _create(self, number: int) -> bool:
        """Claim a number that has no claim; False if it has one."""

    @abstractmethod
    def _take_over(self, number: int) -> bool:
        """Replace a dead claim by an own one; False if it may be alive, or another job was quicker."""

    @abstractmethod
    def _read(self, number: int) -> dict[str, Any]:
        """The content of a claim; empty if it does not exist or its owner died before writing it."""

    @abstractmethod
    def _increment_held(self) -> None:
        """Increment the counters of all claims of this process. Runs in the thread of the heartbeat."""

    def _own_claim(self) -> dict[str, Any]:
        """Content of this process's claims: others check with it whether the process still runs."""
        return {"host": socket.gethostname(), "place": self.place, "pid": os.getpid(), "start": _start()}

    def _runs(self, claim: dict[str, Any]) -> bool:
        """Whether the process of a claim of this machine still runs."""
        pid = claim.get("pid")
        return isinstance(pid, int) and _start(pid) == claim.get("start")

    def _dead(self, number: int, state: ClaimState) -> bool:
        """Whether the owner of a claim is gone. `state`: identity of the claim, and its counter now."""
        # On this machine, ask the system whether the owner still runs; elsewhere, watch the counter.
        claim = self._read(number)
        if claim.get("place") == self.place:
            return not self._runs(claim)
        # Another machine: a counter that does not increase for `patience` seconds of our clock is dead.
        now = time.monotonic()
        before, since = self._observed.setdefault(number, (state, now))
        if before == state:
            return now - since >= self.patience
        if before[0] == state[0]:
            self._alive.add(number)
        self._observed[number] = (state, now)
        return False

    def _beat(self) -> None:
        while not self._stopped.wait(self.patience / 8):
            self._increment_held()


class FileClaims(WorkClaims):
    """The claims of one process on numbered pieces of work, as files in `folder`."""

    def __init__(self, folder: Path, patience: float = 120.0) -> None:
        super().__init__(patience)
        self.folder = Path(folder)
        self._held: dict[int, int] = {}  # number -> open file

    def held(self) -> list[int]:
        return list(self._held)

    def lost(self, number: int) -> bool:
        with self._guard:
            status = self._on_held(number, os.fstat)
        return status is None or _state(self._path(number), inode_only=True) != (status.st_ino, 0)

    def release(self, number: int) -> None:
        with self._exclusive() if self.folder.is_dir() else nullcontext():  # somebody may delete the folder
            if not self.lost(number):
                retry_stale(lambda: self._path(number).unlink(missing_ok=True))
        with self._guard:
            _close(self._held.pop(number))

    def exists(self, number: int) -> bool:
        """Whether anybody has a claim, alive or not."""
        return self._path(number).exists()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"

    def _create(self, number: int) -> bool:
        try:
            file = retry_stale(lambda: self._write_claim(number))
        except FileExistsError:
            return False
        with self._guard:
            self._held[number] = file
        self._alive.discard(number)
        return True

    def _write_claim(self, number: int) -> int:
        """Create the file of a claim and return it open. Raises FileExistsError if there is one."""
        path = self._path(number)
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        try:
            os.write(file, json.dumps(self._own_claim()).encode())
        except OSError:
            _close(file)
            path.unlink(missing_ok=True)
            raise
        return file

    def _on_held(self, number: int, operation: Callable[[int], R]) -> R | None:
        """The result of an operation on the open file of an own claim; None if the file is gone.

        A stale NFS handle is opened again, if the path still holds this process's claim. Needs the guard.
        """
        try:
            return operation(self._held[number])
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        # Another job may have replaced the file: its content says whose it is.
        try:
            file = retry_stale(lambda: os.open(self._path(number), os.O_RDWR))
        except FileNotFoundError:
            return None
        if parse_claim(os.read(file, CLAIM_BYTES)) != self._own_claim():
            os.close(file)
            return None
        _close(self._held[number])
        self._held[number] = file
        return operation(file)

    def _take_over(self, number: int) -> bool:
        path = self._path(number)
        state = _state(path)
        if state is None or not self._dead(number, state):
            return False
        with self._exclusive():
            # Move the dead claim away, then check that it is still the one examined above.
            removed = self.folder / f".{path.stem}.{uuid.uuid4().hex}"
            try:
                retry_stale(lambda: path.rename(removed))
            except FileNotFoundError:
                return False  # another job was quicker
            if _state(removed, inode_only=True) != (state[0], 0):
                # Without file locks this can be the new claim of a faster job: put it back.
                with suppress(FileExistsError):
                    os.link(removed, path)
                removed.unlink()
                return False
            removed.unlink()
            self._observed.pop(number, None)
            return self._create(number)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Exclude other jobs, on file systems with locks."""
        file = retry_stale(lambda: os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR))
        try:
            # Without a lock (some Lustre mounts), the rename in _take_over decides.
            lock_file(file, self.patience)
            yield
        finally:
            os.close(file)

    def _read(self, number: int) -> dict[str, Any]:
        return _read(self._path(number))

    def _increment_held(self) -> None:
        with self._guard:
            for number in self._held:
                try:
                    self._on_held(number, _increment)
                except OSError as error:  # without a heartbeat, others would take every further claim over
                    logger.warning(
                        "the claim %s is not renewed (%s); trying again",
                        *(self._path(number), error.strerror or error),
                        extra=EVERY_RANK,
                    )


def _increment(file: int) -> None:
    """Increment the counter of an open claim."""
    moment = os.fstat(file).st_mtime_ns + 1_000_000_000
    os.utime(file, ns=(moment, moment))


def _close(file: int) -> None:
    """Close a claim, whose NFS handle may be stale: there is nothing left to write."""
    try:
        os.close(file)
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise


def _state(path: Path, inode_only: bool = False) -> tuple[int, int] | None:
    """(inode, counter) of a claim, None if it does not exist."""
    try:
        stat = retry_stale(path.stat)
    except FileNotFoundError:
        return None
    return stat.st_ino, 0 if inode_only else stat.st_mtime_ns


def _read(path: Path) -> dict[str, Any]:
    """The content of a claim; empty if it does not exist or its owner died before writing it."""
    try:
        return parse_claim(retry_stale(lambda: _read_bytes(path)))
    except OSError:
        return {}


def _read_bytes(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(CLAIM_BYTES)


def parse_claim(data: bytes) -> dict[str, Any]:
    """The content of a claim from its bytes; empty for bytes that are no JSON object."""
    try:
        content = parse_json(data)
    except ValueError:
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


class FolderOwner:
    """Holds a folder for this process alone, over all machines that share its disk.

        with FolderOwner(folder, "trains in"):
            ...

    Entering raises UserError while a live process holds the folder. A claim of a process that is gone is
    taken over with a line in the log: at once on the same machine, else after `patience` seconds without a
    heartbeat. A folder that this creates and nothing is put into is removed in the end. `option`: the option
    that names the folder, for messages.
    """

    def __init__(self, folder: Path, what: str, patience: float = 120.0, option: str = "--out") -> None:
        self.folder, self.what, self.option = Path(folder), what, option
        self.claims = FileClaims(self.folder / OWNER, patience)
        self._unreadable = False  # whether the last reading of the claim failed: one warning for each time

    def __enter__(self) -> Self:
        self._created = not self.folder.exists()
        self.claims.__enter__()
        try:
            self._take()
        except BaseException as error:
            self.__exit__(None, None, None)
            if not isinstance(error, OSError):
                raise
            raise UserError(
                f"cannot write {error.filename or self.folder}: {error.strerror}; choose another "
                f"{self.option}"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.claims.__exit__(kind, error, trace)
        with suppress(OSError):  # another process holds the folder now, or waits for it
            (self.claims.folder / ".lock").unlink(missing_ok=True)
            self.claims.folder.rmdir()
            if self._created:
                self.folder.rmdir()

    def lost_to(self) -> str:
        """Who has taken the folder over because this process was suspended too long; "" if nobody, or if the
        disk does not answer: the next call reads the claim again.
        """
        try:
            lost = self.claims.lost(0)
        except OSError as error:
            if not self._unreadable:
                reason = error.strerror or error
                logger.warning("the claim of %s cannot be read (%s); going on", self.folder, reason)
            self._unreadable = True
            return ""
        self._unreadable = False
        return self.claims.owner(0) if lost else ""

    def _take(self) -> None:
        other = ""
        while not self._try():
            if self.claims.is_alive_here(0) or not self.claims.undecided([0]):
                raise UserError(
                    f"{self.claims.owner(0)}, already {self.what} {self.folder}; wait for it or stop it, or "
                    f"give another {self.option}"
                )
            if not other:
                other = self.claims.owner(0)
                logger.info("%s: waiting to see whether %s, still runs", self.folder, other)
            time.sleep(self.claims.poll_seconds)

    def _try(self) -> bool:
        """Take the claim if it is free, or if its owner is gone."""
        with suppress(FileNotFoundError):  # the last owner is just removing its folder: try again
            self.claims.folder.mkdir(parents=True, exist_ok=True)
            other = self.claims.owner(0) if self.claims.exists(0) else ""
            if self.claims.take([0]) is not None:
                if other:
                    logger.info("%s: taken over from %s, which is gone", self.folder, other)
                return True
        return False
