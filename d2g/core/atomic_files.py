"""Files that are whole or absent, and that a loss of power leaves so."""

import errno
import os
import shutil
import socket
from pathlib import Path

from d2g.core.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write meets where there is no room."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old or the new one, never half of it, with the umask's rights (a
    file of safetensors' own writer is its owner's alone). Raises UserError when the disk refuses.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(data, path, path.with_name(f".{path.name}.{own_mark()}.tmp"))
    except OSError as error:
        what, way = error.strerror or str(error), "choose another place, or mend this one"
        if error.errno in FULL:
            what, way = f"{what}, {mib_free(path):.1f} MiB free on its disk", "free space"
        raise UserError(f"cannot write {path}: {what}; {way}, then run the same command again") from error


def publish(data: bytes | memoryview, path: Path, temporary: Path) -> None:
    """Write `data` to `temporary`, sync it, rename it to `path`: whole or not there. Raises OSError."""
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def own_mark() -> str:
    """What tells this process's temporary files from others', on a shared folder too."""
    return f"{socket.gethostname()}-{os.getpid()}"


def mib_free(path: Path) -> float:
    """On the disk of `path`, or of the nearest folder above it that is there."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free / 2**20
