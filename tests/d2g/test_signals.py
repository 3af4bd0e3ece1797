"""d2g.core.signals: the first signal sets a flag, the second interrupts; real signals in a subprocess."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from d2g.core.signals import STOP_SIGNALS, StopFlag

ROOT = Path(__file__).resolve().parents[2]

SIGNALLED = """
import os, signal, sys
from d2g.core.signals import StopFlag
number = int(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
before = signal.getsignal(number)
with StopFlag() as stop:
    assert not stop
    os.kill(os.getpid(), number)
    assert stop and stop.signal == number
    print("flag up, still running", flush=True)
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        print("second signal interrupts", flush=True)
assert signal.getsignal(number) is before
print("handlers back", flush=True)
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_first_signal_sets_a_flag_second_interrupts_and_handlers_are_restored(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(int(number))], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["flag up, still running", "second signal interrupts", "handlers back"]
    assert done.stderr.endswith("KeyboardInterrupt\n") and done.returncode == -signal.SIGINT


def test_sighup_is_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
            signal.raise_signal(signal.SIGUSR1)
            assert stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_handlers_outside_the_main_thread() -> None:
    flags: list[bool] = []

    def work() -> None:
        with StopFlag() as stop:
            flags.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert flags == [False]
