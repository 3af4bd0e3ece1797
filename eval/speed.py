"""Wall-clock time of one image, end to end."""

import statistics
import time
from collections.abc import Callable

import torch

from core.errors import SettingError


def milliseconds_per_image(sample_one: Callable[[], object], *, repeats: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of `sample_one()`, which must make one image end to end (text encoder, U-Net, VAE).

    Waits for the GPU before and after each call, where one is in use (method notes 7.5: batch 1).
    """
    if repeats < 1 or warmup < 0:
        raise SettingError(f"timing takes repeats >= 1 and warmup >= 0, got {repeats} and {warmup}")
    for _ in range(warmup):
        sample_one()
    return statistics.median(_timed(sample_one) for _ in range(repeats)) * 1000


def _timed(call: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
