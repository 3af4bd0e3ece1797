"""Files that are complete or absent, also after a loss of power."""

import errno
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from d2g.core.errors import UserError

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a write for which there is no room."""

STALE_WAITS = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds before each new attempt of an operation that met a stale NFS handle."""

UMASK = os.umask(0o077)
os.umask(UMASK)  # it can only be read by setting it

T = TypeVar("T")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never a part of it.

    The file gets the permissions of the umask. Raises UserError when the disk is full or refuses the write.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_and_rename(data, path, path.with_name(f".{path.name}.{process_tag()}.tmp"))
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error for a file that the disk refuses, with what to do."""
    reason, remedy = error.strerror or str(error), "choose another place, or repair this one"
    if error.errno in DISK_FULL_ERRNOS:
        reason, remedy = f"{reason}, {free_mib(path):.1f} MiB free on its disk", "free space"
    return UserError(f"cannot write {path}: {reason}; {remedy}, then run the same command again")


def write_and_rename(data: bytes | memoryview, path: Path, temporary: Path) -> None:
    """Write `data` to `temporary`, sync it, and rename it to `path`. Raises OSError.

    A stale NFS handle at any point starts the write again.
    """
    retry_stale(lambda: _write_and_rename(data, path, temporary))


def retry_stale(operation: Callable[[], T]) -> T:
    """The result of `operation`, which runs again while it raises ESTALE, with pauses of STALE_WAITS.

    NFS raises ESTALE for a file or folder that another machine has replaced. The operation must look its
    path up again each time. Raises the OSError of the last attempt.
    """
    for seconds in STALE_WAITS:
        try:
            return operation()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            time.sleep(seconds)
    return operation()


def _write_and_rename(data: bytes | memoryview, path: Path, temporary: Path) -> None:
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def share_weights(folder: Path, pattern: str = "*.safetensors") -> None:
    """Give a folder's files that match `pattern` the permissions of the umask: safetensors lets only their
    owner read them. Links stay as they are.
    """
    for path in folder.glob(pattern):
        if not path.is_symlink() and path.stat().st_uid == os.geteuid():
            path.chmod(0o666 & ~UMASK)


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def process_tag() -> str:
    """A text that tells this process's temporary files from those of others, also on a shared folder."""
    return f"{socket.gethostname()}-{os.getpid()}"


def free_mib(path: Path) -> float:
    """Free space in MiB on the disk of `path`, or of its nearest parent folder that exists."""
    parents = (path.absolute(), *path.absolute().parents)
    return shutil.disk_usage(next(parent for parent in parents if parent.exists())).free / 2**20
