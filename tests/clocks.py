"""A clock that stands still until a test moves it, and waiting by the real one."""

import time
from collections.abc import Callable


class Clock:
    """In the place of the module `time` in one of our modules. `now`: its seconds; `sleep` moves them."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for two minutes at most."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)
