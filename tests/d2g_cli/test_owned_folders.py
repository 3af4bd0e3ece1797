"""Commands that write to a folder refuse it while another process that works in it is alive."""

from pathlib import Path
from typing import Any

import pytest

from d2g.core.claims import FolderOwner
from d2g.core.errors import UserError
from d2g.core.tracking.run_directory import sole_owner
from teacher_training.config import TeacherConfig
from teacher_training.train import train_teacher

EVALUATE = ["eval", "run", "--student", "miniature", "--protocol", "miniature"]
COMMANDS = {
    "teacher train": (["teacher", "train", "--stages", "data", "--set", "images=4", "--out"], "trains in"),
    "lpips train": (["lpips", "train", "--data", "x", "--latents", "miniature", "--out"], "trains in"),
    "lpips calibrate": (
        ["lpips", "calibrate", "--data", "x", "--latents", "miniature", "--weights", "x", "--out"],
        "trains in",
    ),
    "lpips overfit": (
        ["lpips", "overfit", "--data", "x", "--latents", "miniature", "--weights", "x", "--out"],
        "optimizes in",
    ),
    "export": (["export", "--student", "miniature", "--out"], "exports to"),
    "eval run --out": ([*EVALUATE, "--out"], "evaluates in"),
    "eval run --work": ([*EVALUATE, "--work"], "evaluates in"),
    "eval run --keep": ([*EVALUATE, "--keep"], "evaluates in"),
    "eval stats": (["eval", "stats", "--images", "x", "--metrics", "fid", "--out"], "measures in"),
    "eval curve": (["eval", "curve", *EVALUATE[2:], "--over", "noise_scale=0.5,1", "--out"], "evaluates in"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_with_a_live_owner_is_refused(command: str, tmp_path: Path, d2g: Any) -> None:
    arguments, verb = COMMANDS[command]
    folder = tmp_path / "folder.work"
    out = folder.with_suffix(".safetensors") if command == "eval stats" else folder
    with FolderOwner(folder, verb):
        ended = d2g(*arguments, out)
        assert [path.name for path in folder.iterdir()] == [".owner"], "the second command writes nothing"
    option = arguments[-1] if command.startswith("eval") else "--out"
    assert ended.code == 1
    assert f", already {verb} {folder}; wait for it or stop it, or give another {option}" in ended.error


def test_the_library_call_of_teacher_train_holds_its_folder(tmp_path: Path) -> None:
    with FolderOwner(tmp_path, "trains in"):
        with pytest.raises(UserError, match=f"already trains in {tmp_path}; wait for it or stop it"):
            train_teacher(TeacherConfig(data="x"), tmp_path, ("data",))
        assert [path.name for path in tmp_path.iterdir()] == [".owner"]
    # A command holds the folder from its plan on: the call inside is part of it.
    with sole_owner(tmp_path, "trains in"), sole_owner(tmp_path / ".." / tmp_path.name, "trains in"):
        with pytest.raises(UserError, match="already trains in"), FolderOwner(tmp_path, "trains in"):
            raise AssertionError("not reached")
    assert not (tmp_path / ".owner").exists()


def test_one_evaluation_may_name_a_folder_twice(tmp_path: Path, d2g: Any) -> None:
    arguments = ["--metrics", "caption_accuracy", "--num", "4", "--allow-fewer", "--json"]
    ended = d2g(*EVALUATE, *arguments, "--out", tmp_path, "--work", f"{tmp_path}/../{tmp_path.name}")
    assert ended.json["counts"] and not (tmp_path / ".owner").exists()
