"""d2g.core.atomic_files: a file is complete or unchanged after real disk failures and signals."""

import os
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from d2g.core.atomic_files import STALE_WAITS, fsync_path, retry_stale, write_and_rename, write_atomically
from d2g.core.errors import UserError
from forks import fork
from jobs import limit_file_size
from stale import StaleHandles


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_atomically(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    write_atomically(path, b"\xff\r\n")
    assert path.read_bytes() == b"\xff\r\n"
    for content in ("x" * (1 << 16), bytes(1 << 16)):
        full = pytest.raises(UserError, match=r"cannot write .*b\.json: File too large, \d+\.\d MiB free on ")
        with limit_file_size(1 << 12), full as caught:
            write_atomically(path, content)
        assert str(caught.value).endswith("its disk; free space, then run the same command again")
        assert path.read_bytes() == b"\xff\r\n" and names(path.parent) == ["b.json"]
    elsewhere = "; choose another place, or repair this one, then run the same command again$"
    with pytest.raises(UserError, match=f"cannot write .*below: File exists{elsewhere}"):
        write_atomically(path / "below", "text")
    with pytest.raises(UserError, match=f"cannot write .*: Is a directory{elsewhere}"):
        write_atomically(tmp_path / "a", "text")
    assert names(tmp_path) == ["a"] and names(path.parent) == ["b.json"]


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_an_interruption_leaves_no_file(tmp_path: Path) -> None:
    """SIGINT while the write blocks on a pipe without a reader."""
    pipe, path = tmp_path / "scratch", tmp_path / "file"
    os.mkfifo(pipe)

    def start_alarms(event: str, arguments: tuple[Any, ...]) -> None:
        # Until one comes while the call waits: Python does not see one between its last look and the call.
        if event == "open" and arguments[0] == str(pipe):
            signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)

    def interrupt(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.raise_signal(signal.SIGINT)

    def write() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, interrupt)
        sys.addaudithook(start_alarms)
        with pytest.raises(KeyboardInterrupt):
            write_and_rename(b"data", path, pipe)

    child = fork(write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert names(tmp_path) == []


def test_fsync_of_a_missing_path_fails(tmp_path: Path) -> None:
    fsync_path(tmp_path)
    with pytest.raises(FileNotFoundError):
        fsync_path(tmp_path / "none")


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_stale_handle_starts_the_write_again(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stale = tmp_path / "a.json", StaleHandles(monkeypatch)
    stale.fail(call, 3)
    write_atomically(path, "new")
    assert path.read_text() == "new" and names(tmp_path) == ["a.json"] and stale.raised == 3


def test_a_handle_that_stays_stale_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, stale = tmp_path / "a.json", StaleHandles(monkeypatch)
    path.write_text("old")
    stale.fail("fsync", 100)
    with pytest.raises(UserError, match=r"cannot write .*a\.json: Stale file handle"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]
    assert stale.raised == 1 + len(STALE_WAITS)


def test_other_errors_are_not_retried() -> None:
    calls = []

    def operation() -> None:
        calls.append(1)
        raise PermissionError("no")

    with pytest.raises(PermissionError):
        retry_stale(operation)
    assert len(calls) == 1
