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
@pytest.mark.parametrize(
    "arguments",
    [
        "ode",
        "ode optim.name=radam",
        "gan",
        "gan gan.penalty=approx engine.gradient_accumulation=2 data.text_cache=4",
    ],
)
def test_a_step_never_waits_for_the_device(arguments: str) -> None:
    """Between reports, the host reads one value: whether the step before was finite."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fake_cuda.py"), *arguments.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    waits = json.loads(done.stdout.splitlines()[-1])
    assert waits["steps"] == [{}, {}]
    assert waits["late"] == [{}, {"d2g/core/transfer.py read: waits for an event": 1}]
    assert waits["report"], "the counter counts"
