"""`lpips train`, `teacher train` and the ONNX export, killed and run again: nothing is lost or left over."""

import random
import signal
import time
from pathlib import Path

import pytest

from exported import save_run
from jobs import Running, d2g, succeed
from labeled import save_classes
from own_pictures import image_folder, train_arguments
from stores import FORKS

pytestmark = [FORKS, pytest.mark.slow]


def run_with_kills(
    arguments: list[str], log: Path, numbers: random.Random, seconds: float, kills: int
) -> int:
    """Run a command again and again, killed `kills` times at most; returns how often it was."""
    for kill in range(kills):
        running = Running(arguments, log)
        # The first kill is never late, because a command may be faster than when it was timed.
        time.sleep(numbers.uniform(0, seconds if kill else seconds / 2))
        running.send(signal.SIGKILL)
        if running.wait().code == 0:
            return kill
    succeed(d2g(arguments, log))
    return kills


def weights(folder: Path) -> dict[str, bytes]:
    """The weights that a training leaves, by their place."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("captions.json")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(files)}


def check_kills(arguments: list[str], tmp_path: Path, seed: int) -> None:
    """Run a command with --out OUT once, and with kills elsewhere, and compare."""
    once, killed = ([word.replace("OUT", str(tmp_path / name)) for word in arguments] for name in "ab")
    started = time.monotonic()
    assert d2g(once, tmp_path / "log").code == 0
    seconds = time.monotonic() - started
    kills = run_with_kills(killed, tmp_path / "log", random.Random(seed), seconds, 4)
    assert kills > 0, "no kill came before the end"
    expected, actual = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert expected and expected.keys() == actual.keys()
    assert [name for name in expected if expected[name] != actual[name]] == []


@pytest.mark.parametrize(
    ("seed", "crops"),
    [(0, 0), (1, 2), *(pytest.param(*case, marks=pytest.mark.long) for case in ((0, 2), (1, 0)))],
)
def test_lpips_train(seed: int, crops: int, teacher: Path, tmp_path: Path) -> None:
    data = save_classes(tmp_path / "data")
    words = f"--data {data} --latents {teacher} --out OUT --set size=16 --set width=0.0625 --set grid=1"
    sets = "--set batch=12 --set epochs=20 --set score_epochs=1 --set optimizer=adamw --set lr=0.001"
    check_kills(["lpips", "train", *words.split(), *sets.split(), "--set", f"crops={crops}"], tmp_path, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_teacher_train(seed: int, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    image_folder(tmp_path / "data")
    checkpoints = ["--set", "vae.fit.checkpoint_minutes=0", "--set", "unet.fit.checkpoint_minutes=0"]
    arguments = train_arguments(
        tmp_path / "data", Path("OUT"), "--images", "160", *checkpoints, stages="data,vae,unet,lpips"
    )
    check_kills(arguments, tmp_path, seed)


@pytest.mark.long
def test_onnx_export(teacher: Path, tmp_path: Path) -> None:
    """Killed during the conversion and when the graph is on the disk: then the same files, byte for byte."""
    once, out = tmp_path / "once", tmp_path / "out"
    export = ["export", "--student", save_run(tmp_path / "run", str(teacher)), "--format", "onnx", "--out"]
    started = time.monotonic()
    assert d2g([*export, str(once)], tmp_path / "log").code == 0
    early = time.monotonic() + random.Random(0).uniform(0.1, 0.5) * (time.monotonic() - started)
    for late in (False, True):
        running = Running([*export, str(out)], tmp_path / "log")
        graph = out / f".staged.{running.pid}.tmp" / "student.onnx"
        running.wait_for(graph.exists if late else lambda: time.monotonic() > early, 300)
        running.send(signal.SIGKILL)
        assert running.wait().code != 0 and not [path for path in out.glob("*") if path.name[0] != "."]
    assert d2g([*export, str(out)], tmp_path / "log").code == 0
    files = {path.relative_to(once): path.read_bytes() for path in once.rglob("*") if path.is_file()}
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    assert not list(out.glob(".*"))
