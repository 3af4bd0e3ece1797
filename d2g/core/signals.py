"""Ctrl-C and SIGTERM as a flag that loops read between steps, so that a step is never interrupted."""

import signal
import threading
from types import FrameType, TracebackType


class StopFlag:
    """A context manager that is true after Ctrl-C or SIGTERM. A second Ctrl-C raises KeyboardInterrupt.

    Use it as `with StopFlag() as stop: ... if stop: save and return`. Outside the main thread Python
    allows no signal handlers, and the flag stays false.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def __bool__(self) -> bool:
        return self.signal is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Clusters send SIGTERM to every process and torchrun forwards it: a second one is not more urgent.
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
