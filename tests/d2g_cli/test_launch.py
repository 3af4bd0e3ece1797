"""`d2g launch` and the processes of `d2g demo`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from d2g.core.distributed.process_count import MEASURED_SECONDS, saved_process_count
from d2g.core.environment import usable_cores
from d2g.core.errors import SettingError
from d2g_cli.launch import MEASURED_FROM, cpu_processes, log_other_processes
from d2g_cli.main import main
from miniature.config import DEMO_PRESETS, planned_seconds

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
        ("launch --gpus 1000000 demo", "--gpus is 1000000; expected 1024 or fewer on one machine"),
        ("launch --nodes 2 --rendezvous here:x demo", "--rendezvous is 'here:x'; expected HOST:PORT"),
        ("launch --nodes 2 --rendezvous [::1]:70000 demo", "expected HOST:PORT with a port below 65536"),
        ("demo --processes 0", "--processes is 0; expected 1 or more"),
    ],
)
def test_wrong_options_are_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(words.split())
    assert exited.value.code == 2 and message in capsys.readouterr().err


several_cores = pytest.mark.skipif(usable_cores() < 2, reason="one core is shared by one process")


def test_a_process_of_torchrun_starts_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "processes.json").write_text('{"processes": 2}')
    assert cpu_processes(tmp_path) == 1


@several_cores
def test_a_long_job_measures_how_many_processes_it_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "d2g")
    started = time.monotonic()
    count = cpu_processes(tmp_path)
    assert time.monotonic() - started > 2 * MEASURED_SECONDS
    assert count in (1, cpu_processes(tmp_path, seconds=0))
    assert len(caplog.messages) == 1 and "(measured: " in caplog.messages[0]
    assert caplog.messages[0].endswith("; --processes chooses")
    # Nothing is written before the job itself starts.
    assert not list(tmp_path.iterdir())


def test_a_short_job_is_not_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "d2g")
    count = cpu_processes(tmp_path, seconds=MEASURED_FROM / 2)
    assert count & (count - 1) == 0 and 1 <= count <= usable_cores()
    assert planned_seconds(DEMO_PRESETS["quick"]) < MEASURED_FROM < planned_seconds(DEMO_PRESETS["default"])
    assert not caplog.messages


@several_cores
@pytest.mark.parametrize("threads", [usable_cores(), 2 * usable_cores()])
def test_processes_with_several_threads_share_the_cores(
    threads: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "d2g")
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    assert cpu_processes(tmp_path, seconds=0) == cpu_processes(tmp_path) == 1
    assert caplog.messages == [f"1 process of {threads} threads (OMP_NUM_THREADS); --processes chooses"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cpu_processes(tmp_path, seconds=0) > 1


def test_a_job_goes_on_with_its_number_of_processes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Noise of a teacher's training depends on it."""
    caplog.set_level("INFO", "d2g")
    (tmp_path / "processes.json").write_text('{"processes": 3}')
    assert cpu_processes(tmp_path) == cpu_processes(tmp_path, seconds=0) == 3
    assert "3 process(es), as at the last start; --processes chooses" in caplog.messages
    for number, expected in ((0, "1 or more"), (10**6, "1024 or fewer on one machine")):
        (tmp_path / "processes.json").write_text(json.dumps({"processes": number}))
        with pytest.raises(SettingError, match=f"processes.json is {number}; expected {expected}"):
            cpu_processes(tmp_path)


@several_cores
def test_processes_that_cannot_be_measured_are_not_started(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise MemoryError('no memory is left')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert cpu_processes(tmp_path / "out") == 1
    assert "could not be measured (a process that was to be timed has ended: MemoryError: no" in caplog.text


def test_a_command_in_one_process_with_threads_names_the_measurement(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "d2g")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        log_other_processes("distill ode")
        torch.set_num_threads(2)
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "2")
            log_other_processes("distill ode")
        assert not caplog.messages
        log_other_processes("distill ode")
    finally:
        torch.set_num_threads(threads)
    expected = "`d2g launch -- distill ode ...` measures whether several processes are faster"
    assert caplog.messages == [f"1 process with 2 threads; {expected}"]


@pytest.fixture
def command(warm_python: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`d2g`, whose processes need not import torch again; torchrun starts its own by PYTHON_EXEC."""
    monkeypatch.setenv("PYTHON_EXEC", warm_python)
    return [warm_python, "-m", "d2g_cli"]


@pytest.fixture(scope="module")
def demo_of_one_process(
    warm_python: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """(folder, results) of a demo in one process."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    words = [warm_python, "-m", "d2g_cli", *TINY_DEMO, "--processes", "1", "--out", str(out)]
    process = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stderr
    return out, json.loads(process.stdout)


@several_cores
@pytest.mark.slow
def test_a_launch_without_a_number_measures_it(command: list[str]) -> None:
    words = [*command, "launch", "--", "distill", "ode", "--preset", "no-such-preset"]
    process = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 2 and process.stderr.count("no-such-preset") == 1, process.stderr
    (measured,) = [line for line in process.stderr.splitlines() if "(measured: " in line]
    assert measured.endswith("; --gpus chooses")


@pytest.mark.slow
def test_options_of_the_command_are_no_abbreviations_of_torchrun_options(command: list[str]) -> None:
    """`--num` begins `--numa-binding` and `--numa_binding`."""
    words = [*command, "launch", "--gpus", "1", "--", "sample", "--student", "miniature", "--num", "0"]
    process = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 2
    assert "error: num is 0; expected 1 or more" in process.stderr, process.stderr


@pytest.mark.slow
def test_a_failed_command_gives_its_exit_code_and_one_line(command: list[str]) -> None:
    words = [*command, "launch", "--gpus", "2", "--", "distill", "ode", "--preset", "no-such-preset"]
    process = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 2
    assert process.stderr.count("no-such-preset") == 1 and "Traceback" not in process.stderr, process.stderr


@pytest.mark.long
@pytest.mark.slow
def test_the_demo_in_two_processes_measures_what_one_process_measures(
    command: list[str], demo_of_one_process: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, (_, one) = tmp_path / "two", demo_of_one_process
    words = [*command, *TINY_DEMO, "--processes", "2", "--out", str(out)]
    process = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stderr
    two = json.loads(process.stdout)
    assert two["pairs"] == one["pairs"] == 8
    for metric in ("fid", "clip_score", "caption_accuracy"):
        assert two[metric] == pytest.approx(one[metric], rel=1e-3)
    assert (out / "report.html").is_file()
    # The same command goes on with as many processes.
    assert saved_process_count(out) == 2 and saved_process_count(demo_of_one_process[0]) == 1


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_demo_and_says_how_to_go_on(
    number: signal.Signals,
    command: list[str],
    demo_of_one_process: tuple[Path, dict[str, Any]],
    tmp_path: Path,
) -> None:
    # The pairs are there, so the first stage trains soon.
    shutil.copytree(demo_of_one_process[0] / "pairs", tmp_path / "demo" / "pairs")
    words = [*command, *TINY_DEMO, "--set", "ode.train.images=100000", "--processes", "2"]
    words += ["--out", str(tmp_path / "demo")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, start_new_session=True, text=True)
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


@pytest.mark.parametrize(
    ("given", "policy"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "1000"}, None)],
)
def test_threads_do_not_spin_while_they_wait(given: dict[str, str], policy: str | None) -> None:
    """OpenMP reads its policy when torch is imported, so the command line sets it before."""
    code = (
        "import os, sys; from d2g_cli.__main__ import wait_without_spinning; "
        "assert 'torch' not in sys.modules; wait_without_spinning(); print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    others = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_W", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**others, **given}, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(policy)], done.stderr
