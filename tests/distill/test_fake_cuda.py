"""The training step on fake CUDA tensors: no tensor is on the wrong device, and the host does not wait."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="fake CUDA tensors need a CUDA build of torch")
@pytest.mark.parametrize(("stage", "updates"), [("ode", 1), ("gan", 2)])
def test_a_step_waits_for_the_device_only_to_check_its_gradients(stage: str, updates: int) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fake_cuda.py"), stage],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    waits = json.loads(done.stdout.splitlines()[-1])
    assert len(waits["steps"]) == 2
    for step in waits["steps"]:
        assert step == {"distill/training/train.py check: reads a value": updates}
