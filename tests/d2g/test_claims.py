"""d2g.core.claims.FolderOwner: one live process owns a folder; with real processes, kills and heartbeats."""

import fcntl
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from d2g.core.claims import OWNER, FileClaims, FolderOwner
from d2g.core.errors import UserError

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)


def own_folder(folder: Path, place: str | None, patience: float) -> None:
    """Own a folder until the file `leave` appears; if another process takes it over, name it in `lost`."""
    owner = FolderOwner(folder, "trains in", patience)
    owner.claims.place = place or owner.claims.place
    with owner:
        (folder / "held").touch()
        while not (folder / "leave").exists():
            if owner.lost_to():
                (folder / "lost").write_text(owner.lost_to())
                return
            time.sleep(0.01)


def start_owner(folder: Path, place: str | None = None, patience: float = 120.0) -> BaseProcess:
    child = FORK.Process(target=own_folder, args=(folder, place, patience))
    child.start()
    wait_until((folder / "held").exists)
    return child


def write_foreign_claim(folder: Path) -> None:
    """Write a claim of another machine that sends no heartbeats."""
    (folder / OWNER).mkdir(parents=True, exist_ok=True)
    content = {"host": "elsewhere", "place": "elsewhere", "pid": 7, "start": "1"}
    (folder / OWNER / "00000.json").write_text(json.dumps(content))


def test_a_second_process_is_refused_while_the_owner_is_alive(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child = start_owner(folder)
    owner_text = f"{os.uname().nodename}, process {child.pid}, already trains in {folder}"
    with pytest.raises(UserError, match=f"^{owner_text}; wait for it or stop it, or give another --out$"):
        FolderOwner(folder, "trains in").__enter__()
    (folder / "leave").touch()
    child.join()
    with FolderOwner(folder, "trains in") as owner:
        assert not owner.lost_to()
    assert sorted(path.name for path in folder.iterdir()) == ["held", "leave"], "the claim is removed"


def test_a_folder_of_a_killed_process_is_taken_over_immediately(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child = start_owner(tmp_path)
    child.kill()
    child.join()
    with caplog.at_level("INFO"), FolderOwner(tmp_path, "trains in"):
        pass
    assert f"taken over from {os.uname().nodename}, process {child.pid}, which is gone" in caplog.text


def test_a_folder_of_a_silent_remote_process_is_taken_over_after_a_timeout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_foreign_claim(tmp_path)
    start = time.monotonic()
    with caplog.at_level("INFO"), FolderOwner(tmp_path, "trains in", patience=0.4):
        assert time.monotonic() - start >= 0.4
    assert "waiting to see whether elsewhere, process 7, still runs" in caplog.text
    assert "taken over from elsewhere, process 7, which is gone" in caplog.text


def test_a_remote_process_with_heartbeats_keeps_the_folder(tmp_path: Path) -> None:
    child = start_owner(tmp_path, place="elsewhere", patience=0.8)
    # The refusal comes with the next heartbeat that this process sees, however late it is.
    with pytest.raises(UserError, match=rf"process {child.pid}, already trains in"):
        FolderOwner(tmp_path, "trains in", patience=120.0).__enter__()
    child.kill()
    child.join()


def test_a_suspended_process_notices_the_loss_of_its_folder(tmp_path: Path) -> None:
    child = start_owner(tmp_path, place="elsewhere", patience=0.4)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    with FolderOwner(tmp_path, "trains in", patience=0.4):
        os.kill(child.pid, signal.SIGCONT)
        wait_until((tmp_path / "lost").exists)
        child.join()
    assert str(os.getpid()) in (tmp_path / "lost").read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"place": 3}', '{"pid": "x"}'])
def test_a_damaged_claim_is_taken_over(content: str, tmp_path: Path) -> None:
    (tmp_path / OWNER).mkdir()
    (tmp_path / OWNER / "00000.json").write_text(content)
    with FolderOwner(tmp_path, "trains in", patience=0.2) as owner:
        assert not owner.lost_to()


def test_an_empty_new_folder_is_removed(tmp_path: Path) -> None:
    with FolderOwner(tmp_path / "a" / "run", "trains in"):
        assert (tmp_path / "a" / "run").is_dir()
    assert not (tmp_path / "a" / "run").exists()
    with FolderOwner(tmp_path / "run", "trains in"):
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file.*: Not a directory; choose another --out"):
        FolderOwner(tmp_path / "file" / "run", "trains in").__enter__()


def test_the_folder_may_be_deleted_while_it_is_owned(tmp_path: Path) -> None:
    import shutil

    with FolderOwner(tmp_path / "run", "trains in"):
        shutil.rmtree(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_lock_that_is_never_released_does_not_block_claims(tmp_path: Path) -> None:
    """Its holder may be suspended at the wrong moment."""
    write_foreign_claim(tmp_path)
    with (tmp_path / OWNER / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with FolderOwner(tmp_path, "trains in", patience=0.2) as owner:
            assert not owner.lost_to()
    assert not (tmp_path / OWNER).exists()


def test_the_heartbeat_outlives_an_error_of_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a network disk that does not answer for a while."""
    with FileClaims(tmp_path, patience=0.4) as claims:
        assert claims.take([0]) == 0
        spare = os.dup(file := claims._held[0])
        os.close(file)  # from here, every operation on the claim fails
        wait_until(lambda: "00000.json is not renewed (Bad file descriptor)" in caplog.text)
        os.dup2(spare, file)
        os.close(spare)
        before = (tmp_path / "00000.json").stat().st_mtime_ns
        wait_until(lambda: (tmp_path / "00000.json").stat().st_mtime_ns > before)


def test_a_claim_that_cannot_be_read_is_not_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FolderOwner(tmp_path, "trains in") as owner:
        spare = os.dup(file := owner.claims._held[0])
        os.close(file)  # from here, every operation on the claim fails
        assert not owner.lost_to() and not owner.lost_to()
        assert (
            caplog.text.count(f"the claim of {tmp_path} cannot be read (Bad file descriptor); going on") == 1
        )
        os.dup2(spare, file)
        os.close(spare)
        (tmp_path / OWNER / "00000.json").unlink()
        write_foreign_claim(tmp_path)
        assert owner.lost_to() == "elsewhere, process 7", "the claim is read again"
