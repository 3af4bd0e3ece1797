"""The C allocator's thresholds, for training."""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt` (malloc.h)."""

LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""The largest MMAP_THRESHOLD in bytes that glibc takes on 64-bit machines."""


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory of this process for the next tensors; return whether it does.

    By default each freed tensor of more than 128 KiB to 32 MiB goes back to the system, and the system clears
    its pages again for the next tensor. Under torch on a CPU that happens thousands of times per training
    step, and once per batch of pairs that is read, on a CPU and for a GPU.
    Does nothing on other C libraries, or where the user has set glibc's thresholds.
    """
    user_settings = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if sys.platform != "linux" or any(name in os.environ for name in user_settings):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(TRIM_THRESHOLD, 2**30) and mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD))
