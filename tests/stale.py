"""Stale NFS handles: system calls that raise ESTALE a few times, as an NFS client does."""

import errno
import os
from typing import Any

import pytest

import d2g.core.atomic_files


class StaleHandles:
    """`fail(name, times)`: the next calls of os.NAME raise ESTALE. `raised` counts those that did."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.raised = patch, 0
        patch.setattr(d2g.core.atomic_files, "STALE_WAITS", (0.001,) * 5)

    def fail(self, name: str, times: int = 2) -> None:
        real = getattr(os, name)
        remaining = times

        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal remaining
            if remaining:
                remaining -= 1
                self.raised += 1
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return real(*arguments, **settings)

        self.patch.setattr(os, name, call)
