"""`d2g distill watch`: views of a run as text, JSON and PNG; the run folder stays unchanged."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from clocks import Clock
from d2g.core.errors import UserError
from d2g.core.tracking.run_directory import RunLog, read_stats
from d2g_cli import main as cli
from d2g_cli.watch import has_news
from distill.monitoring.best_point import record_measure
from distill.monitoring.status import read_status, usual_gap
from jobs import Running

LINE = {"loss/g": 0.5, "loss/d": 1.0, "grad/g": 1.0, "logit/real": 0.2, "time/images_per_sec": 20.0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run at 40 of 100 images with one checkpoint and two previews."""
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
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["distill", "watch", *map(str, words)])
    code = exit_info.value.code
    return (code if isinstance(code, int) else 0), *capfd.readouterr()


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_view_of_a_run(run: Path) -> None:
    status = read_status(run)
    assert (status.stage, status.nimg, status.images, status.finished) == ("gan", 40, 100, False)
    assert status.seconds_left == pytest.approx(60 / 20) and status.values["loss/g"] == 1 / 40
    assert status.checkpoint == str(run / "checkpoints" / "000000040")
    assert status.preview == str(run / "previews" / "pairs-000000040.png")
    assert status.warnings == [] and {row.name for row in status.rows} == set(LINE)


def test_a_run_that_goes_on_before_its_first_report_is_not_silent(tmp_path: Path) -> None:
    """It was killed two hours ago, and its config.json is as old."""
    settings = {"stage": "gan", "train": {"batch_size": 4}, "length": {"images": 100}}
    log = RunLog(tmp_path, settings)
    before = time.time() - 7200
    os.utime(tmp_path / "config.json", (before, before))
    assert read_status(tmp_path).silent_minutes == 120
    RunLog(log.folder, settings).begin()
    assert read_status(tmp_path).silent_minutes is None


def test_a_run_of_no_images_is_an_error(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = json.loads((run / "config.json").read_text())
    config["length"]["images"] = 0
    (run / "config.json").write_text(json.dumps(config))
    code, _, err = watch(capfd, run, "--once")
    assert code == 1 and "holds no run (ValueError: images is 0)" in err


def test_validations_with_other_settings_are_no_warning(run: Path) -> None:
    """As in the run itself, validations count from the last change of their settings on."""
    log = RunLog(run, json.loads((run / "config.json").read_text()))
    for nimg in range(50, 62):
        log.write(nimg, {"val/fid": float(nimg)})
    assert [text for text in read_status(run).warnings if "quality stalls" in text]
    record_measure(run, {"metric": "val/fid", "num": 1}, 50)
    record_measure(run, {"metric": "val/fid", "num": 2}, 60)
    assert read_status(run).warnings == []


def test_json_output_leaves_the_folder_unchanged(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    RunLog(run, json.loads((run / "config.json").read_text())).write(100, {**LINE, "val/psnr": float("nan")})
    before = snapshot(run)
    code, out, _ = watch(capfd, run, "--json")
    result: dict[str, Any] = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert code == 0 and len(out.splitlines()) == 1 and result["finished"] and result["nimg"] == 100
    assert result["values"]["val/psnr"] is None and result["seconds_left"] == 0
    assert len(result["warnings"]) == 1 and "val/psnr not finite" in result["warnings"][0]
    assert snapshot(run) == before


def test_once_and_png_options(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = watch(capfd, run, "--once")
    assert code == 0 and "40 of 100 images, 40.0%" in out and "loss/g" in out and "▁" in out
    code, out, _ = watch(capfd, run, "--png", tmp_path / "health.png", "--json")
    assert code == 0 and json.loads(out)["png"] == str(tmp_path / "health.png")
    assert (tmp_path / "health.png").read_bytes().startswith(b"\x89PNG")


def test_a_live_view_follows_the_run_to_its_end(run: Path, tmp_path: Path) -> None:
    log = RunLog(run, json.loads((run / "config.json").read_text()))
    running = Running(["distill", "watch", str(run), "--every", "0.05"], tmp_path / "log")
    running.wait_for(lambda: "40 of 100" in running.out.read_text())
    log.write(70, LINE)
    log.write(100, LINE)
    ended = running.wait()
    assert ended.code == 0 and "100 of 100 images, finished" in ended.stdout


def test_ctrl_c_ends_the_view_without_an_error(run: Path, tmp_path: Path) -> None:
    running = Running(["distill", "watch", str(run), "--every", "0.05"], tmp_path / "log")
    running.wait_for(lambda: "40 of 100" in running.out.read_text())
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 0 and "error" not in ended.stderr


def test_a_run_without_reports(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    RunLog(tmp_path, {"stage": "ode", "train": {"images": 50}})
    assert read_status(tmp_path).nimg == 0 and read_status(tmp_path).seconds_left is None
    code, out, _ = watch(capfd, tmp_path, "--once")
    assert code == 0 and "no reports yet" in out


def test_folders_without_a_run_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for content, message in (
        (None, "holds no run"),
        ("{", "config.json is damaged .*; copy it from another --out"),
        ("[]", "config.json is damaged"),
        ('{"stage": "ode"}', "holds no run"),
    ):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_status(tmp_path)
    code, _, err = watch(capfd, tmp_path, "--once")
    assert code == 1 and err.startswith("error: ") and "give the --out of `d2g distill`" in err


@pytest.mark.parametrize("every", ["0", "-1", "nan", "inf"])
def test_the_refresh_interval_is_checked(every: str, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = watch(capfd, run, "--every", every)
    assert code == 2 and "expected seconds above 0" in err


def test_png_must_be_a_file(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = watch(capfd, run, "--png", run)
    assert code == 2 and out == "" and list(run.glob("*.png")) == []
    example = run / "health.png"
    assert err == f"error: --png {run} is a folder; give the name of a file in it, for example {example}\n"


# Ends of runs.

ENDINGS = [
    ("done", "", "40 of 100 images, finished"),
    ("minutes", "", "40.0%, it reached its limit of minutes"),
    ("stopped", "stopped at image 40; safe on disk", "40.0%, it was stopped"),
    ("failed", "cannot write\ncheckpoint: no room", "40.0%, it failed"),
]


@pytest.mark.parametrize(("how", "why", "expected"), ENDINGS)
def test_ended_json_is_shown(
    how: Any, why: str, expected: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The live view exits, and all outputs state how the run ended, without a remaining time."""
    RunLog(run, json.loads((run / "config.json").read_text())).end(how, why)
    silent = time.time() - 10_000
    os.utime(run / "stats.jsonl", (silent, silent))
    os.utime(run / "config.json", (silent, silent))
    code, out, _ = watch(capfd, run)
    out = " ".join(out.split())  # titles are wrapped at the width of the table
    assert code == 0 and expected in out and " ".join(why.split()) in out and "left" not in out
    assert "no report for" not in out
    code, out, _ = watch(capfd, run, "--once")
    assert code == 0 and expected in " ".join(out.split())
    code, out, _ = watch(capfd, run, "--json")
    result = json.loads(out)
    assert code == 0 and (result["ended"], result["why"]) == (how, " ".join(why.split()))
    assert result["silent_minutes"] is result["seconds_left"] is None and not result["finished"]


def test_a_clock_that_was_set_back_is_no_silence(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The reports lie in the future of the new clock."""
    for name in ("stats.jsonl", "config.json"):
        os.utime(run / name, (time.time() + 10_000,) * 2)
    code, out, _ = watch(capfd, run, "--json")
    assert code == 0 and json.loads(out)["silent_minutes"] is None


def test_a_live_view_exits_when_the_run_fails(run: Path, tmp_path: Path) -> None:
    running = Running(["distill", "watch", str(run), "--every", "0.05"], tmp_path / "log")
    running.wait_for(lambda: "40 of 100" in running.out.read_text())
    RunLog(run, json.loads((run / "config.json").read_text())).end("failed", "loss/g is nan at image 40")
    ended = running.wait()
    expected = " ".join(ended.stdout.split())
    assert ended.code == 0 and "40.0%, it failed" in expected and "loss/g is nan" in expected


def test_a_damaged_ended_json_is_reported(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "ended.json").write_text('{"how": "fai')
    code, _, err = watch(capfd, run, "--once")
    assert code == 1 and f"{run / 'ended.json'} is damaged" in err and "delete it" in err


def test_a_run_without_new_reports_is_reported_as_silent(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run writes no ended.json. After reports every 0.5 s, ten minutes without one are silence."""
    last = (run / "stats.jsonl").stat().st_mtime
    assert usual_gap(read_stats(run)) == 0.5
    assert read_status(run, now=last + 590).silent_minutes is None
    assert read_status(run, now=last + 590).seconds_left == 3
    status = read_status(run, now=last + 14 * 60)
    assert status.silent_minutes == 14 and status.seconds_left is None and not status.over
    clock = Clock()
    clock.now = last + 1000
    monkeypatch.setattr("distill.monitoring.status.time", clock)
    code, out, _ = watch(capfd, run, "--once")
    out = " ".join(out.split())
    assert code == 0 and "40.0%, no report for 16 minutes" in out and "left" not in out
    code, out, _ = watch(capfd, run, "--json")
    assert json.loads(out)["silent_minutes"] == 16 and json.loads(out)["ended"] is None


def test_a_clock_that_was_set_back_makes_no_run_silent(run: Path) -> None:
    last = (run / "stats.jsonl").stat().st_mtime
    status = read_status(run, now=last - 5 * 3600)
    assert status.silent_minutes is None and status.seconds_left == 3 and not status.over
    assert read_status(run, now=last + 5 * 3600).silent_minutes == 300, (
        "and set forward, it says so, and goes on"
    )


def test_rare_reports_do_not_count_as_silence(run: Path) -> None:
    log = RunLog(run, json.loads((run / "config.json").read_text()))
    for nimg in (50, 60, 70, 80, 90):
        log.write(nimg, {**LINE, "time/images_per_sec": 10 / 300})  # 300 seconds each
    last = (run / "stats.jsonl").stat().st_mtime
    assert usual_gap(read_stats(run)) == pytest.approx(300)
    assert read_status(run, now=last + 1490).silent_minutes is None
    assert read_status(run, now=last + 1510).silent_minutes == 25


def test_a_run_without_any_report_can_be_silent(tmp_path: Path) -> None:
    RunLog(tmp_path, {"stage": "ode", "train": {"images": 50}})
    start_time = (tmp_path / "config.json").stat().st_mtime
    assert read_status(tmp_path, now=start_time + 599).silent_minutes is None
    assert read_status(tmp_path, now=start_time + 700).silent_minutes == 11


def test_silence_is_printed_once_to_a_file_and_every_minute_to_a_terminal(run: Path) -> None:
    last = (run / "stats.jsonl").stat().st_mtime
    active, silent, longer = (read_status(run, now=last + 60 * minutes) for minutes in (0, 11, 12))
    for live in (False, True):
        assert has_news(active, silent, live) and has_news(silent, active, live)
        assert not has_news(silent, silent, live) and has_news(silent, longer, live) == live


def test_a_checkpoint_with_a_damaged_meta_does_not_end_the_view(run: Path) -> None:
    (run / "checkpoints" / "000000040" / "meta.json").write_text("{")
    assert read_status(run).checkpoint == str(run / "checkpoints" / "000000040")
