"""Signals end a command with one line; a closed stdout ends it without output."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from d2g.core.signals import CommandInterrupts, StopFlag
from d2g_cli.common import reporter
from pairgen.merge import merge_stores
from stores import put_store

COMMAND = [sys.executable, "-m", "d2g_cli"]
LINE = "error: interrupted; what was finished before is safe, run the same command again\n"


def start(python: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a command that reads standard input, and return after it has begun to read."""
    process = subprocess.Popen(
        [python, "-m", "d2g_cli", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(
        b"a red cube\n" * 100_000
    )  # more than the buffer of a pipe, so write() returns after the command reads
    process.stdin.flush()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_every_signal_ends_a_command_with_one_line(
    number: signal.Signals, warm_python: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "pairs")
    command = "pairs generate --teacher miniature --prompts - --out".split()
    process = start(warm_python, *command, out)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.decode().endswith(LINE), err
    assert err.decode().count("\n") == 2, "a line about the teacher, and the error"
    assert not list(tmp_path.iterdir())


def test_handlers_of_the_parent_and_of_torchrun_are_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """nohup ignores SIGHUP. Under torchrun signals keep their default: only rank 0 prints a message."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with CommandInterrupts():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        monkeypatch.delenv("WORLD_SIZE")
        with CommandInterrupts() as interrupts:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not interrupts.received
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(number)
            assert interrupts.received
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_interrupt_that_a_library_swallows_is_not_reported_as_its_error(
    monkeypatch: pytest.MonkeyPatch, d2g: Any
) -> None:
    """numpy turns a KeyboardInterrupt during its import into an ImportError."""

    def swallow(name: str) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ImportError("cannot load module more than once per process")

    monkeypatch.setattr("d2g.diffusion.teacher.describe_teacher", swallow)
    ended = d2g("teacher", "info", "miniature")
    assert ended.code == 130 and ended.stderr == LINE


@pytest.mark.parametrize("loop", [lambda: StopFlag().__enter__(), lambda: reporter("work", 0, 1)])
def test_a_command_ends_at_its_next_loop_if_a_library_swallows_the_interrupt(
    loop: Callable[[], object],
) -> None:
    with CommandInterrupts(), pytest.raises(KeyboardInterrupt):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        loop()


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(mask >> (number - 1) & 1)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_signals_at_random_times_end_a_command_with_one_line(seed: int, tmp_path: Path) -> None:
    """At any time: before the command line is imported, while libraries and models load, and at work."""
    numbers = random.Random(seed)
    commands = (
        ["sample", "--student", "miniature", "--prompt", "a"],
        ["eval", "run", *"--student miniature --protocol miniature --num 6 --allow-fewer".split()],
        ["teacher", "train", "--stages", "data", "--set", "images=4"],
    )
    for case in range(2):
        number = numbers.choice([signal.SIGINT, signal.SIGTERM])
        arguments = [*numbers.choice(commands), "--out", str(tmp_path / f"out{case}")]
        process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        # Python itself takes some time to start, during which it has no handlers.
        while not catches(process.pid, signal.SIGTERM):
            time.sleep(0.01)
        delay = numbers.uniform(0, 10)
        with suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(number)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        where = f"{number.name} after {delay:.2f} s of {arguments[0]}"
        last = err.decode().splitlines()[-1:]
        # Python ends itself by SIGINT, which shells report as 130, where C code was running Python code.
        # After the result is printed, a signal may end Python while it exits.
        finished = process.returncode in (0, -number) and bool(out)
        assert finished or process.returncode in (130, -signal.SIGINT), f"{where}: {err.decode()}"
        assert "Traceback" not in err.decode(), f"{where}: {err.decode()}"
        assert finished or last[0].startswith("error: "), f"{where}: {err.decode()}"


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["pipe", "file"])
def test_a_closed_stdout_prints_no_error(closed: str, tmp_path: Path) -> None:
    put_store(tmp_path)
    arguments = [*COMMAND, "pairs", "info", str(tmp_path)]
    read, write = os.pipe()
    os.close(read)
    if closed == "file":
        arguments = ["bash", "-c", 'exec "$@" >&-', "-", *arguments]
    process = subprocess.run(arguments, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(write)
    assert process.stderr == b"", process.stderr.decode()


def test_a_merge_deletes_the_temporary_files_of_a_killed_one(tmp_path: Path) -> None:
    source, out = put_store(tmp_path / "a"), tmp_path / "out"
    merge_stores([source], out)
    for name in ("pairs-00001.host-1.tmp", "prompts.host-1.tmp", "store.host-1.tmp"):
        (out / "partial" / name).write_bytes(b"half")
    (out / "shards" / "pairs-00001.h5").unlink()
    merge_stores([source], out)
    assert list((out / "partial").iterdir()) == []
