"""Benchmarks: what scaling.py counts, and the battery for a GPU from its first item to its last on a CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from weakref import ref

import pytest

from benchmarks import gpu, gpu_items, gpu_steps
from benchmarks.gpu_rows import Options, Result, Row, Rows, goal
from benchmarks.pairs import products_in_a_row
from benchmarks.scaling import LATENT_LPIPS, metric_flops
from d2g.diffusion.pretrained import SHIPPED
from distill.config.presets import TABLE_A1
from distill.config.regression import RegressionConfig
from distill.config.run import DistillConfig
from forks import wait_until_ended

ROOT = Path(__file__).resolve().parents[1]


def test_each_latent_lpips_of_a_recipe_counts() -> None:
    """SD-CFG-3 adds LatentLPIPS without transforms to E-LatentLPIPS (Table A1); SD-CFG-8 does not."""
    one = LATENT_LPIPS * 64 * 64
    assert metric_flops(TABLE_A1["sd15-cfg3"]["ode"], 64 * 64) == 2 * one
    assert metric_flops(TABLE_A1["sd15-cfg8"]["ode"], 64 * 64) == one
    losses = RegressionConfig(losses=(("e_latent_lpips", 1.0), ("mse", 1.0)), draws=3)
    assert metric_flops(replace(DistillConfig(), regression=losses), 64 * 64) == 3 * one


# The battery for a GPU.


def test_a_row_that_fails_stops_no_other_row_and_is_measured_again(tmp_path: Path) -> None:
    rows = Rows(tmp_path, "steps")
    rows.restart(
        [{"variant": "earlier", "MFU": 0.5}, {"variant": "broken", "error": "OutOfMemoryError: 1 GiB"}]
    )
    rows.measure({"variant": "earlier"}, lambda: pytest.fail("it was measured before"))
    rows.measure({"variant": "bad"}, lambda: {"MFU": 1 / 0})
    rows.measure({"variant": "good"}, lambda: {"MFU": 0.4})
    assert rows.read() == [
        {"variant": "earlier", "MFU": 0.5},
        {"variant": "bad", "error": "ZeroDivisionError: division by zero"},
        {"variant": "good", "MFU": 0.4},
    ]
    assert rows.values("MFU") == [0.5, 0.4] and rows.values("MFU", variant="good") == [0.4]
    goals = [goal("MFU", 0.5, at_least=0.45), goal("MFU", 0.4, at_least=0.45)]
    failed = rows.finish(["note"], goals)
    assert failed["error"] == "1 of 3 rows: ZeroDivisionError: division by zero"
    assert [goal["reached"] for goal in failed["goals"]] == ["so far", "no"]
    rows.restart(rows.read())
    rows.measure({"variant": "bad"}, lambda: {"MFU": 0.1})
    assert rows.finish(["note"]) == {"notes": ["note"], "goals": []}


def test_goals_say_whether_they_are_reached() -> None:
    assert goal("speed", 1.6, at_least=1.5)["reached"] == "yes"
    assert goal("R1", 0.2, at_most=0.15) == {"goal": "R1", "aim": "<= 0.15", "measured": 0.2, "reached": "no"}
    assert goal("speed", float("nan"), at_least=1.5)["reached"] == ""


def test_the_share_of_r1_needs_equal_batches(tmp_path: Path) -> None:
    """16 steps of 1 s, and 4 s of R1 in one of them: 20 s, of which R1 takes a fifth."""
    rows = Rows(tmp_path, "steps")
    without, with_r1 = (v.name for v in (gpu_steps.WITHOUT_R1, gpu_steps.WITH_R1))
    rows.measure({"variant": without}, lambda: {"s per step": 1.0, "batch": 8})
    assert gpu_steps._share_of_r1(rows) != gpu_steps._share_of_r1(rows), "NaN"
    rows.measure({"variant": with_r1}, lambda: {"s per step": 5.0, "batch": 8})
    assert gpu_steps._share_of_r1(rows) == pytest.approx(0.2)
    other = Rows(tmp_path, "other")
    other.restart([{**row, "batch": number} for number, row in enumerate(rows.read())])
    assert gpu_steps._share_of_r1(other) != gpu_steps._share_of_r1(other), "NaN"


def test_tiny_matrix_products_do_not_keep_a_gpu_for_minutes() -> None:
    """Launching one takes about 5 microseconds, and a peak takes nine rounds of them."""
    assert products_in_a_row(4096) == 20 and products_in_a_row(16384) == 1
    assert 9 * products_in_a_row(128) * 5e-6 < 0.1


def test_a_row_that_fails_leaves_its_memory_to_the_next_one(tmp_path: Path) -> None:
    """A training state holds itself in a circle of references, and the error held the state."""

    class State:
        def __init__(self) -> None:
            self.itself = self

    def too_large() -> Row:
        state = State()
        states.append(ref(state))
        raise RuntimeError("out of memory")

    states: list[ref[State]] = []
    rows = Rows(tmp_path, "steps")
    rows.measure({"batch": 2}, too_large)
    assert rows.read() == [{"batch": 2, "error": "RuntimeError: out of memory"}]
    assert states[0]() is None


@pytest.mark.parametrize(("alone", "row", "rows"), [(10.0, 1.0, 32), (30.0, 2.0, 16), (90.0, 2.0, 0)])
def test_the_batch_of_a_step_fits_by_its_forecast(alone: float, row: float, rows: int) -> None:
    """The forecast is a constant peak, such as R1's, up to some batch, and grows with the rows from there."""
    assert gpu_steps.largest_rows(lambda n: max(alone, 5 + row * n), limit=40.0) == rows


@pytest.mark.parametrize("ended_by", ["its time", "SIGTERM"])
def test_a_stopped_item_ends_with_all_its_processes(ended_by: str, tmp_path: Path) -> None:
    """Otherwise they would keep the GPU's memory from what runs after it."""
    script, started = tmp_path / "item.py", tmp_path / "child"
    script.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(started)!r}, 'w').write(f'{{child.pid}}\\n')\n"
        "time.sleep(600)\n"
    )
    command, log = [sys.executable, str(script)], tmp_path / "log"

    def has_started() -> bool:
        return started.exists() and started.read_text().endswith("\n")

    def stop_after_the_start() -> None:
        for _ in range(5_000):
            if has_started():
                return os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)

    if ended_by == "its time":
        # A busy machine may take longer to start it.
        for seconds in (1.0, 10.0, 100.0):
            if not has_started():
                assert gpu.run_process_group(command, log, seconds) is None
    else:
        before = signal.getsignal(signal.SIGTERM)
        gpu.exit_on_sigterm()
        Thread(target=stop_after_the_start, daemon=True).start()
        try:
            with pytest.raises(SystemExit, match="143"):
                gpu.run_process_group(command, log, 300.0)
        finally:
            signal.signal(signal.SIGTERM, before)
    wait_until_ended(int(started.read_text()))


def test_a_battery_that_was_stopped_keeps_the_rows_of_its_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(options: Options, rows: Rows) -> Result:
        rows.measure({"size": 1}, lambda: {"speed": 2.0 + len(starts)})
        starts.append(1)
        if len(starts) == 1:
            raise KeyboardInterrupt
        rows.measure({"size": 2}, lambda: {"speed": 4.0})
        return rows.finish([], [])

    starts: list[int] = []
    items = (gpu.Item("speed", "How fast?", measure),)
    arguments = ["--tiny", "--together", "--out", str(tmp_path)]
    monkeypatch.setenv("PYTHONPATH", f"site{os.pathsep}.")
    with pytest.raises(KeyboardInterrupt):
        gpu.main(arguments, items)
    assert os.environ["PYTHONPATH"] == f"{Path('site').absolute()}{os.pathsep}{Path.cwd()}"
    assert gpu.main(arguments, items) == 0
    (result,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert result["rows"] == [{"size": 1, "speed": 2.0}, {"size": 2, "speed": 4.0}]

    # The same folder does not take results of full sizes.
    with pytest.raises(SystemExit, match="has results of cpu, tiny sizes, this is cpu; give another --out"):
        gpu.main(["--out", str(tmp_path)], items)


@pytest.mark.slow
def test_a_miniature_that_has_trained_is_only_scored(tmp_path: Path) -> None:
    """Scores that failed, or were stopped, do not cost another five minutes of training."""
    (tmp_path / "miniature").mkdir()
    (tmp_path / "miniature" / "ode").symlink_to(SHIPPED["miniature"] / "student")
    rows = Rows(tmp_path, "miniature-1")
    trained = {"stage": "ode", "part": "training", "images": 64}
    rows.restart([trained, {"stage": "ode", "part": "scores", "error": "no memory"}])
    result = gpu_items._miniature("ode", Options(out=tmp_path, tiny=True), rows)
    assert "error" not in result
    training, scores = rows.read()
    assert training == trained and scores["part"] == "scores" and 0.5 < scores["caption_accuracy"] <= 1

    # A new folder has the rows, but not the run: it trains again, here without pairs.
    (tmp_path / "new").mkdir()
    rows = Rows(tmp_path / "new", "miniature-1")
    rows.restart([trained])
    gpu_items._miniature("ode", Options(out=tmp_path / "new", tiny=True), rows)
    training, _ = rows.read()
    assert training["part"] == "training" and "error" in training


@pytest.mark.long
@pytest.mark.slow
def test_the_battery_runs_to_its_end_on_a_cpu_and_goes_on_where_it_stopped(
    tmp_path: Path, warm_python: str
) -> None:
    command = [warm_python, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    listed = subprocess.run([*command, "--list"], env=environment, capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names[:2] == ["tests", "matmul"] and len(names) == 13

    # An item that failed before runs again, in a process of its own, for the rows that it lacks; then others.
    kept = {"type": "bf16", "size": 128, "TFLOP/s": 7.0}
    failed = {"error": "stopped", "seconds": 1.0, "rows": [kept], "machine": "cpu, tiny sizes"}
    (tmp_path / "results.json").write_text(json.dumps({"matmul": failed}))
    for arguments, code in ((["--only", "matmul"], 0), (["--together"], 0)):
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert ("matmul: " in done.stdout) == ("--only" in arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["matmul"]["rows"][0] == kept and len(results["matmul"]["rows"]) == 8
    for name in names:
        assert "error" not in results[name] and (results[name]["rows"] or results[name]["notes"])
    (page,) = tmp_path.glob("gpu_*_cpu.md")
    text = page.read_text()
    assert "Not run yet" not in text and "Failed" not in text and "tiny sizes" in text
    assert len(json.loads(page.with_suffix(".json").read_text())["goals"]) == 16

    # A second start has nothing left to do.
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and str(page) in again.stdout and "tests: " not in again.stdout
