"""What all tests share: one thread per process (xdist runs one process per core), and one tiny teacher."""

import atexit
import os
import shutil
import tempfile

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported: two pools of two threads on two cores are slower
)
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a model hub
os.environ["D2G_CACHE"] = tempfile.mkdtemp(prefix="d2g-cache-")  # nor use anybody's cache

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

import tiny

atexit.register(shutil.rmtree, os.environ["D2G_CACHE"], ignore_errors=True)
torch.set_num_threads(1)  # where a plugin imported torch first
# Autograd's first pass decides whether it has threads, and torch.export's would start some: then no forked
# process could train.
torch.ones((), requires_grad=True).backward()

# The same examples on every machine and run, and no clock: a busy machine is no failure.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fixed")


OPT_IN = ("slow", "gpu")
"""Marks whose tests run only when `-m` names the mark: `pytest -m slow`."""


def pytest_configure(config: pytest.Config) -> None:
    """Hide CUDA devices unless GPU tests are asked for: forked tests cannot run backward beside one."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of marks that `-m` does not name, and say so in pytest's own count."""
    absent = [mark for mark in OPT_IN if mark not in config.option.markexpr]
    left_out = [item for item in items if any(item.get_closest_marker(mark) for mark in absent)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable-Diffusion-shaped teacher with random weights. Read only: copy it before changing a byte."""
    folder = tmp_path_factory.mktemp("tiny") / "teacher"
    tiny.save_teacher(folder)
    return folder


@pytest.fixture
def d2g(capfd: pytest.CaptureFixture[str]) -> Any:
    """`d2g(words…)`: the command line in this process; gives a jobs.Ended."""
    from d2g_cli import main as cli
    from jobs import Ended

    def run(*words: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main([str(word) for word in words])
        code = left.value.code
        return Ended(code if isinstance(code, int) else 0, *capfd.readouterr())

    return run


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
