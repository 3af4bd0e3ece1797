"""d2g.core.distributed.checkpoint: atomic writes, strict loading, pruning; real full disks and kills."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from d2g.core.distributed import checkpoint, sharded_checkpoint
from d2g.core.errors import UserError
from forks import fork
from jobs import limit_file_size

ROOT = Path(__file__).resolve().parents[2]


def save(folder: Path, nimg: int, **settings: Any) -> Path:
    return checkpoint.save(
        folder, nimg, {"net": nn.Linear(2, 2).state_dict()}, {"step": nimg}, {"note": "x"}, **settings
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_of_tensors_state_and_meta(tmp_path: Path) -> None:
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    folder = checkpoint.save(
        tmp_path, 64, {"net": net.state_dict()}, {"adam": optimizer.state_dict()}, {"seed": 3}
    )
    assert names(folder) == ["meta.json", "net.safetensors", "state.pt"]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.nimg == 64 and newest.meta == {"seed": 3, "nimg": 64}
    newest.load("net", other)
    assert torch.equal(other.weight, net.weight) and torch.equal(other.bias, net.bias)
    moments = newest.state()["adam"]["state"][0]
    assert torch.equal(moments["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_views_and_shared_storage_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(6.0).view(2, 3)
    checkpoint.save(tmp_path, 1, {"net": {"turned": base.T, "row": base[1]}}, {}, {})
    tensors = checkpoint.open_checkpoint(tmp_path / "000000001").tensors("net")
    assert torch.equal(tensors["turned"], base.T) and torch.equal(tensors["row"], base[1])


def test_pruning_keeps_the_newest_and_latest_sorts_by_images(tmp_path: Path) -> None:
    for nimg in (2, 10, 300, 4000):
        save(tmp_path, nimg, keep=3)
    assert names(tmp_path) == ["000000010", "000000300", "000004000"]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.nimg == 4000


def test_a_checkpoint_can_be_overwritten(tmp_path: Path) -> None:
    save(tmp_path, 5)
    first = checkpoint.open_checkpoint(tmp_path / "000000005").tensors("net")["weight"]
    save(tmp_path, 5)
    assert names(tmp_path) == ["000000005"]
    assert not torch.equal(checkpoint.open_checkpoint(tmp_path / "000000005").tensors("net")["weight"], first)


def test_an_empty_or_missing_folder_has_no_latest(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "none") is None


def test_loading_is_strict(tmp_path: Path) -> None:
    save(tmp_path, 1)
    opened = checkpoint.open_checkpoint(tmp_path / "000000001")
    with pytest.raises(RuntimeError, match=r"Missing key.*Unexpected key|size mismatch"):
        opened.load("net", nn.Linear(2, 3))
    with pytest.raises(RuntimeError, match="Missing key"):
        opened.load("net", nn.Sequential(nn.Linear(2, 2)))


def test_errors_about_missing_names_list_the_existing_ones(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    with pytest.raises(UserError, match=r"no checkpoint .*000000003; found 000000001, 000000002"):
        checkpoint.open_checkpoint(tmp_path / "000000003")
    with pytest.raises(UserError, match=r"no ema\.safetensors, found net"):
        checkpoint.open_checkpoint(tmp_path / "000000002").tensors("ema")


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_file_is_reported(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, 1) / "net.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-8], "empty": b"", "noise": b"\xff" * len(data)}[damage])
    with pytest.raises(UserError, match=r"net\.safetensors is damaged .*; delete .*000000001"):
        checkpoint.open_checkpoint(path.parent).tensors("net")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"note": "x", "ni', r"Unterminated string .*"),
        ("", r"Expecting value: .*"),
        ("[]", r"expected a JSON object, got '\[\]'"),
        ("{}", r"it has no nimg"),
        ('{"nimg": "2"}', r"nimg: expected a whole number, got '\"2\"'"),
    ],
)
def test_a_damaged_meta_is_reported(tmp_path: Path, content: str, why: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "meta.json"
    path.write_text(content)
    damaged = (
        rf"^{path} is damaged \({why}\); delete {path.parent} to continue from the checkpoint before it$"
    )
    with pytest.raises(UserError, match=damaged):
        checkpoint.latest(tmp_path)
    assert checkpoint.complete_points(tmp_path) == [1, 2]
    shutil.rmtree(path.parent)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.nimg == 1


def test_a_checkpoint_without_meta_is_reported_as_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / "meta.json").unlink()
    damaged = rf"^{path} is damaged \(it has no meta\.json\); delete {path} to continue without it$"
    for function, folder in (
        (checkpoint.latest, tmp_path),
        (checkpoint.list_checkpoints, tmp_path),
        (checkpoint.open_checkpoint, path),
    ):
        with pytest.raises(UserError, match=damaged):
            function(folder)
    assert checkpoint.complete_points(tmp_path) == [1]
    shutil.rmtree(path)
    newest = checkpoint.latest(tmp_path)
    assert (
        newest is not None and newest.nimg == 1 and checkpoint.list_checkpoints(tmp_path) == [newest.folder]
    )


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "deleted"])
def test_a_damaged_state_is_reported(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, 1) / "state.pt"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-8], "empty": b"", "noise": b"\xff" * len(data), "deleted": b""}[damage])
    if damage == "deleted":
        path.unlink()
    with pytest.raises(UserError, match=r"state\.pt is damaged .*; delete .*000000001 to continue") as caught:
        checkpoint.open_checkpoint(path.parent).state()
    assert "\n" not in str(caught.value)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = (tmp_path / "000000001" / "net.safetensors").read_bytes()
    large = {"net": {"weight": torch.zeros(1 << 16)}}
    with limit_file_size(1 << 14), pytest.raises(UserError) as caught:
        checkpoint.save(tmp_path, 2, large, {}, {})
    assert "the last good checkpoint is" in str(caught.value) and "000000001;" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["000000001"], "no partial checkpoint is left"
    assert (tmp_path / "000000001" / "net.safetensors").read_bytes() == before
    with limit_file_size(1 << 14), pytest.raises(UserError, match="no checkpoint was written before"):
        checkpoint.save(tmp_path / "new", 2, large, {}, {})
    with limit_file_size(1 << 14), pytest.raises(UserError, match="000000001"):
        checkpoint.save(tmp_path, 3, {}, {"adam": torch.zeros(1 << 16)}, {})


def test_an_unwritable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write checkpoint .*file/checkpoints/000000001"):
        save(tmp_path / "file" / "checkpoints", 1)


KILLED = """
import resource, signal, sys, torch
from pathlib import Path
from d2g.core.distributed import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills the writer in the middle of state.pt
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
checkpoint.save(Path(sys.argv[1]), 2, {"net": {"w": torch.zeros(4)}}, {"adam": torch.zeros(1 << 16)}, {})
"""


def test_leftovers_of_a_killed_writer_are_ignored_and_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGXFSZ, done.stderr.decode()
    assert len(names(tmp_path)) == 2, "the partial checkpoint has a temporary name"
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.nimg == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["000000001", "000000002"]


def _kill_at(number: int) -> None:
    """Make this process kill itself right before it deletes its `number`-th file or folder."""
    deletions = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal deletions
        if event in ("os.remove", "os.rmdir"):
            deletions += 1
            if deletions == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("kind", ["plain", "sharded"])
@pytest.mark.parametrize("nimg", [3, 2], ids=["pruning", "overwriting"])
def test_a_kill_during_deletion_damages_no_checkpoint(nimg: int, kind: str, tmp_path: Path) -> None:
    """Kill before each deletion, for a pruned checkpoint and for one that is overwritten."""

    def write(point: int) -> None:
        if kind == "plain":
            save(tmp_path, point)
            return
        tensors = {"net": torch.zeros(4)}
        sharded_checkpoint.Writer(tmp_path).save(point, tensors, {"ema": tensors}, {})

    killed, number = True, 0
    while killed:
        number += 1
        write(1)
        write(2)
        child = fork(lambda: (_kill_at(number), write(nimg)))  # noqa: B023
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed = code == -signal.SIGKILL
        assert killed or code == 0
        newest = checkpoint.latest(tmp_path)
        assert newest is not None and newest.nimg >= (1 if nimg == 2 else 2)
        write(nimg)
        assert checkpoint.complete_points(tmp_path)[-1] == nimg
        assert all(name.isdigit() for name in names(tmp_path)), "leftovers are removed"
        shutil.rmtree(tmp_path)
    assert number > 4, "each file and the folder were deleted"
