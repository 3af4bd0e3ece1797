"""`d2g launch` and the processes of `d2g demo`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from d2g.core.environment import usable_cores
from d2g_cli.launch import cpu_processes
from d2g_cli.main import main

COMMAND = [sys.executable, "-m", "d2g_cli"]
TINY_DEMO = ["demo", "--quick", "--json"]
for _setting in (
    "pairs.num_pairs=8",
    "pairs.steps=2",
    "pairs.shard_size=4",
    "eval_images=8",
    "teacher_steps=2",
):
    TINY_DEMO += ["--set", _setting]
for _stage in ("ode", "gan"):
    for _setting in ("images=16", "batch_size=8", "report_images=8"):
        TINY_DEMO += ["--set", f"{_stage}.train.{_setting}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("launch", "no command to launch"),
        ("launch --gpus 2", "no command to launch"),
        ("launch --gpus 2 -- --json", "no command to launch"),
        ("launch launch demo", "cannot launch itself"),
        ("launch --gpus 0 demo", "--gpus is 0; expected 1 or more"),
        ("launch --nodes 0 demo", "--nodes is 0; expected 1 or more"),
        ("launch --nodes 2 demo", "--nodes 2 needs --rendezvous HOST:PORT"),
        ("demo --processes 0", "--processes is 0; expected 1 or more"),
    ],
)
def test_wrong_options_are_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(words.split())
    assert exited.value.code == 2 and message in capsys.readouterr().err


def test_a_process_of_torchrun_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cpu_processes() == 1
    monkeypatch.delenv("WORLD_SIZE")
    count = cpu_processes()
    assert count & (count - 1) == 0 and 1 <= count <= usable_cores()


@pytest.mark.slow
def test_a_failed_command_gives_its_exit_code_and_one_line() -> None:
    command = [*COMMAND, "launch", "--gpus", "2", "--", "distill", "ode", "--preset", "no-such-preset"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 2
    assert process.stderr.count("no-such-preset") == 1 and "Traceback" not in process.stderr, process.stderr


@pytest.mark.slow
def test_the_demo_in_two_processes_measures_what_one_process_measures(tmp_path: Path) -> None:
    results = []
    for count in ("1", "2"):
        command = [*COMMAND, *TINY_DEMO, "--processes", count, "--out", str(tmp_path / count)]
        process = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert process.returncode == 0, process.stderr
        results.append(json.loads(process.stdout))
    one, two = results
    assert two["pairs"] == one["pairs"] == 8
    for metric in ("fid", "clip_score", "caption_accuracy"):
        assert two[metric] == pytest.approx(one[metric], rel=1e-3)
    assert (tmp_path / "2" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_demo_and_says_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    command = [*COMMAND, *TINY_DEMO, "--set", "ode.train.images=100000", "--processes", "2"]
    command += ["--out", str(tmp_path / "demo")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, text=True)
    # Wait until the first stage trains.
    stats, deadline = tmp_path / "demo" / "ode" / "stats.jsonl", time.monotonic() + 120
    while not (stats.is_file() and stats.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    # Ctrl-C reaches every process of the terminal; a scheduler signals the first one alone.
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert lines and "run the same command again" in lines[-1], err
    assert len(lines) == 1 or (number != signal.SIGINT and len(lines) == 2), err
    assert process.returncode in (130, 128 + number) and "Traceback" not in err


def test_help_names_the_processes() -> None:
    from d2g_cli.main import app

    assert "--processes" in CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "200"}).output
