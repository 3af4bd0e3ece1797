"""Folders that a command fills beside their final place, so that a failure leaves nothing half done."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2g.core.atomic_files import share_weights
from d2g.core.claims import FolderOwner
from d2g.core.errors import UserError


@contextmanager
def staged(out: Path, what: str, option: str = "--out") -> Iterator[Path]:
    """A temporary folder, whose entries replace those of `out` only if the block succeeds.

    `what`, `option`: as in `FolderOwner`. Raises UserError if the disk refuses, and while another command
    owns `out`.
    """
    with FolderOwner(out, what, option=option):
        yield from _staged(out, option)


def _staged(out: Path, option: str) -> Iterator[Path]:
    temporary = out / f".staged.{os.getpid()}.tmp"
    try:
        # Folders that killed commands left behind.
        for stale in out.glob(".staged.*.tmp"):
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)
        yield temporary
        share_weights(temporary, "**/*.safetensors")
        # The block has succeeded: replace the entries of `out`, folders before files. Old files and links go
        # first: a kill in between leaves no folder that looks complete.
        entries = sorted(temporary.iterdir(), key=lambda path: (path.is_file(), path.name))
        for old in (out / entry.name for entry in entries):
            if old.is_symlink() or not old.is_dir():
                old.unlink(missing_ok=True)
        for entry in entries:
            if (out / entry.name).is_dir():
                shutil.rmtree(out / entry.name)
            os.replace(entry, out / entry.name)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error}; free space or choose another {option}, then run again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
