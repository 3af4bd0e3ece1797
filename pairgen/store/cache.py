"""A folder of copies that several processes fill: locks, and room made by dropping the longest unused."""

import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pairgen.store.hdf5_chunks import Descriptor


def default_cache() -> Path:
    """$XDG_CACHE_HOME/diffusion2gan/pairs, or ~/.cache/diffusion2gan/pairs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion2gan" / "pairs"


@contextmanager
def alone(folder: Path, stem: str) -> Iterator[bool]:
    """Hold FOLDER/STEM.lock among processes and threads; gives False where the file system has no locks."""
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / f"{stem}.lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False  # some network file systems: the work is done twice, and the last rename wins
        yield locked
    finally:
        os.close(file)


def growing(path: Path, length: int) -> Path:
    """The name of a copy while it grows: nobody else's, and it says how long it will be."""
    unique = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    return path.with_name(f"{path.stem}.{unique}.{length}.tmp")


def make_room(root: Path, limit: int, temporary: Path) -> None:
    """Create `temporary`; drop copies in the folders of `root` until `limit` bytes hold them all (0: any)."""
    with alone(root, ""):
        temporary.touch()  # counts from now on, with its final length
        if not limit:
            return
        held = {path: _held(path) for path in root.glob("*/pairs-*") if path.suffix in (".h5", ".tmp")}
        total = sum(size for size, _ in held.values())
        for path, (size, _) in sorted(held.items(), key=lambda item: item[1][1]):
            if total > limit and path.suffix == ".h5":
                path.unlink(missing_ok=True)
                total -= size


def _held(path: Path) -> tuple[int, int]:
    """The bytes that a copy takes, or will take, and when it was last used."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return int(path.name.split(".")[-2]) if path.suffix == ".tmp" else found.st_size, found.st_atime_ns


def used(file: Descriptor) -> None:
    """Note that a copy is in use. Its time of change stays: it is the same file."""
    with suppress(PermissionError):  # somebody else's copy
        os.utime(file.number, ns=(time.time_ns(), os.fstat(file.number).st_mtime_ns))
