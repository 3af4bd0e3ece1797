"""Ctrl-C and SIGTERM as a flag that loops read between steps, so that no step is ever half done."""

import signal
import threading
from types import FrameType, TracebackType


class StopFlag:
    """`with StopFlag() as stop: ... if stop: save and leave`. A second Ctrl-C interrupts at once.

    Outside the main thread no handler can be set, and the flag simply stays down.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._raise)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def __bool__(self) -> bool:
        return self.signal is not None

    def _raise(self, number: int, frame: FrameType | None) -> None:
        # Clusters send SIGTERM to every process and torchrun sends it on: a second one is no more urgent.
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
