"""Benchmarks: what scaling.py counts, and the battery for a GPU from its first item to its last on a CPU."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling import LATENT_LPIPS, metric_flops
from distill.config.presets import TABLE_A1
from distill.config.regression import RegressionConfig
from distill.config.run import DistillConfig

ROOT = Path(__file__).resolve().parents[1]


def test_each_latent_lpips_of_a_recipe_counts() -> None:
    """SD-CFG-3 adds LatentLPIPS without transforms to E-LatentLPIPS (Table A1); SD-CFG-8 does not."""
    one = LATENT_LPIPS * 64 * 64
    assert metric_flops(TABLE_A1["sd15-cfg3"]["ode"], 64 * 64) == 2 * one
    assert metric_flops(TABLE_A1["sd15-cfg8"]["ode"], 64 * 64) == one
    losses = RegressionConfig(losses=(("e_latent_lpips", 1.0), ("mse", 1.0)), draws=3)
    assert metric_flops(replace(DistillConfig(), regression=losses), 64 * 64) == 3 * one


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

    # An item that failed before runs again, in a process of its own; then the others.
    (tmp_path / "matmul.json").write_text(json.dumps({"error": "stopped", "seconds": 1.0}))
    for arguments in (["--only", "matmul"], ["--together"]):
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("matmul" in done.stdout) == ("--only" in arguments)
    for name in names:
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert "error" not in result and (result["rows"] or result["notes"])
    (page,) = tmp_path.glob("gpu_*_cpu.md")
    text = page.read_text()
    assert "Not run yet" not in text and "Failed" not in text and "tiny sizes" in text

    # A second start has nothing left to do.
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.splitlines() == [str(page)]
