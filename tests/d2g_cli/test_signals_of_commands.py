"""Signals end a command with one line; a closed stdout ends it without output."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from d2g_cli.main import stop_on_signals
from pairgen.merge import merge_stores
from stores import put_store

COMMAND = [sys.executable, "-m", "d2g_cli"]
LINE = "error: interrupted; what was finished before is safe, run the same command again\n"


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """Start a command that reads standard input, and return after it has begun to read."""
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(
        b"a red cube\n" * 100_000
    )  # more than the buffer of a pipe, so write() returns after the command reads
    process.stdin.flush()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_every_signal_ends_a_command_with_one_line(number: signal.Signals, tmp_path: Path) -> None:
    out = str(tmp_path / "pairs")
    process = start("pairs", "generate", "--teacher", "miniature", "--prompts", "-", "--out", out)
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
        stop_on_signals()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        monkeypatch.delenv("WORLD_SIZE")
        stop_on_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for number in (signal.SIGTERM, signal.SIGUSR1):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
