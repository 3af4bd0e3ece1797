"""Signals that ask to stop, as a flag that loops read between steps, so that a step is never interrupted.

Terminals and clusters send SIGINT (Ctrl-C), SIGTERM, SIGHUP (a closed terminal) and SIGUSR1 (SLURM's
`--signal`, before the time limit).
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class CommandInterrupts:
    """A context manager that lets STOP_SIGNALS end a command as Ctrl-C does, with KeyboardInterrupt.

    `received`: whether a signal came, also if a library has swallowed the KeyboardInterrupt: some do while
    they are imported, and fail later or go on. `raise_swallowed_interrupt` ends a command then. Loops that
    save their work have handlers of their own (`StopFlag`).
    torchrun signals its processes when one has failed: there, only Ctrl-C is handled, because that process's
    message is the only one.
    """

    def __init__(self) -> None:
        self.received = False
        self.process = os.getpid()
        self._old: dict[int, object] = {}

    def __enter__(self) -> Self:
        global _command
        if threading.current_thread() is not threading.main_thread():
            return self
        _command = self
        defaults = (signal.SIG_DFL, signal.default_int_handler)
        for number in (signal.SIGINT,) if "WORLD_SIZE" in os.environ else STOP_SIGNALS:
            # nohup and a caller of the command line may have chosen otherwise.
            if signal.getsignal(number) in defaults:
                self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _command
        _command = None
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process and number != signal.SIGINT:  # a fork: it has nothing to say
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = True
        raise KeyboardInterrupt


_command: CommandInterrupts | None = None
"""That of the command that runs."""


def raise_swallowed_interrupt() -> None:
    """Raise the KeyboardInterrupt of this command again if a library has swallowed it. Loops call this."""
    if _command is not None and _command.received:
        raise KeyboardInterrupt


class StopFlag:
    """A context manager that is true after one of STOP_SIGNALS. A second Ctrl-C raises KeyboardInterrupt.

    Use it as `with StopFlag() as stop: ... if stop: save and return`. Outside the main thread Python
    allows no signal handlers, and the flag stays false.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            raise_swallowed_interrupt()
            for number in STOP_SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup: the run is to outlive its terminal
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
