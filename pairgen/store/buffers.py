"""Memory for batches that is used again: to touch fresh pages takes longer than to read a batch."""

import ctypes
import weakref
from collections import deque
from math import prod
from typing import Any

import numpy as np

SMALL = 1 << 18  # bytes below which the C library keeps freed memory by itself
KEPT = 8  # buffers in wait: noise and latent of two batches, in two types


class Buffers:
    """Gives arrays whose memory comes back here once no array, tensor or view holds it."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(
            maxlen=KEPT
        )  # the oldest is let go; append and popleft are atomic

    def __reduce__(self) -> tuple[type["Buffers"], tuple[()]]:
        return Buffers, ()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of unset values."""
        size = prod(shape) * np.dtype(dtype).itemsize
        if size < SMALL:
            return np.empty(shape, dtype)
        memory = self._take(size)
        # All views hold this handle, whatever base NumPy gives them; the handle holds the memory.
        handle = (ctypes.c_ubyte * size).from_buffer(memory)
        weakref.finalize(handle, self._free.append, memory).atexit = False
        return np.frombuffer(handle, dtype).reshape(shape)

    def _take(self, size: int) -> np.ndarray:
        for _ in range(len(self._free)):
            try:
                memory = self._free.popleft()
            except IndexError:  # another thread was quicker
                break
            if memory.nbytes == size:
                return memory
            self._free.append(memory)
        return np.empty(size, np.uint8)
