"""`d2g distill watch`: any run, also while it writes, as text, JSON and a picture; it changes nothing."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import cli
from core.errors import UserError
from core.runlog import RunLog
from distill.watch import view
from jobs import Running

LINE = {"loss/g": 0.5, "loss/d": 1.0, "grad/g": 1.0, "logit/real": 0.2, "time/images_per_sec": 20.0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that stands at 40 of 100 images, and has a checkpoint and two previews."""
    log = RunLog(tmp_path / "run", {"stage": "gan", "train": {"batch_size": 4}, "length": {"images": 100}})
    for nimg in (10, 20, 30, 40):
        log.write(nimg, {**LINE, "loss/g": 1 / nimg})
    for nimg in (20, 40):
        log.picture(nimg, "pairs", torch.zeros(3, 2, 2, dtype=torch.uint8), {})
    checkpoint = log.folder / "checkpoints" / "000000040"
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text('{"nimg": 40}')
    return log.folder


def watch(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.main(["distill", "watch", *map(str, words)])
    code = left.value.code
    return (code if isinstance(code, int) else 0), *capfd.readouterr()


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_view_of_a_run(run: Path) -> None:
    seen = view(run)
    assert (seen.stage, seen.nimg, seen.images, seen.finished) == ("gan", 40, 100, False)
    assert seen.seconds_left == pytest.approx(60 / 20) and seen.values["loss/g"] == 1 / 40
    assert seen.checkpoint == str(run / "checkpoints" / "000000040")
    assert seen.preview == str(run / "previews" / "pairs-000000040.png")
    assert seen.warnings == [] and {row.name for row in seen.rows} == set(LINE)


def test_json_is_one_object_and_nothing_changes(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    RunLog(run, json.loads((run / "config.json").read_text())).write(100, {**LINE, "val/psnr": float("nan")})
    before = snapshot(run)
    code, out, _ = watch(capfd, run, "--json")
    found: dict[str, Any] = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert code == 0 and len(out.splitlines()) == 1 and found["finished"] and found["nimg"] == 100
    assert found["values"]["val/psnr"] is None and found["seconds_left"] == 0
    assert len(found["warnings"]) == 1 and "val/psnr not finite" in found["warnings"][0]
    assert snapshot(run) == before


def test_once_and_the_picture(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = watch(capfd, run, "--once")
    assert code == 0 and "40 of 100 images, 40.0%" in out and "loss/g" in out and "▁" in out
    code, out, _ = watch(capfd, run, "--png", tmp_path / "health.png", "--json")
    assert code == 0 and json.loads(out)["png"] == str(tmp_path / "health.png")
    assert (tmp_path / "health.png").read_bytes().startswith(b"\x89PNG")


def test_a_live_view_follows_the_run_to_its_end(run: Path, tmp_path: Path) -> None:
    log = RunLog(run, json.loads((run / "config.json").read_text()))
    running = Running(["distill", "watch", str(run), "--every", "0.05"], tmp_path / "log")
    running.wait_for(lambda: "40 of 100" in running.out.read_text(), 30)
    log.write(70, LINE)
    log.write(100, LINE)
    ended = running.wait(30)
    assert ended.code == 0 and "100 of 100 images, finished" in ended.stdout


def test_ctrl_c_leaves_the_view_quietly(run: Path, tmp_path: Path) -> None:
    running = Running(["distill", "watch", str(run), "--every", "0.05"], tmp_path / "log")
    running.wait_for(lambda: "40 of 100" in running.out.read_text(), 30)
    running.send(signal.SIGINT)
    ended = running.wait(30)
    assert ended.code == 0 and "error" not in ended.stderr


def test_a_run_without_reports(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    RunLog(tmp_path, {"stage": "ode", "train": {"images": 50}})
    assert view(tmp_path).nimg == 0 and view(tmp_path).seconds_left is None
    code, out, _ = watch(capfd, tmp_path, "--once")
    assert code == 0 and "no reports yet" in out


def test_folders_that_are_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for content in (None, "{", "[]", '{"stage": "ode"}'):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="holds no run"):
            view(tmp_path)
    code, _, err = watch(capfd, tmp_path, "--once")
    assert code == 1 and err.startswith("error: ") and "give the --out of `d2g distill`" in err
    assert watch(capfd, tmp_path, "--every", "0")[0] == 2
