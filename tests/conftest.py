"""Fixtures and settings of all tests. Processes have one thread, because xdist runs one per core."""

import atexit
import os
import random
import shutil
import signal
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from zlib import crc32

if sys.dont_write_bytecode:
    # Otherwise every process would compile PyTorch and diffusers again, and take twice as long to start.
    # The bytecode goes to a folder of its own, because none is wanted beside the sources.
    folder = Path(__file__).parents[1] / ".pytest_cache" / "bytecode"
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(folder)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
os.environ["OMP_NUM_THREADS"] = (
    "1"  # set before torch is imported; two processes of two threads on two cores are slower
)

# Unless -m names the mark gpu, no test sees a CUDA device: a forked process cannot run a backward pass if one
# is visible. This comes before the imports, because some packages ask for devices when they are imported.
if any("gpu" in marks.replace("not gpu", "") for option, marks in pairwise(sys.argv) if option == "-m"):
    os.environ["D2G_TESTS_SEE_GPU"] = "1"  # for the processes of xdist, which do not have the command
if "D2G_TESTS_SEE_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"  # tests do not download from a model hub
os.environ["D2G_CACHE"] = tempfile.mkdtemp(prefix="d2g-cache-")  # tests do not use the user's cache

from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

import tiny
from fork_server import ForkServer
from forks import forget_logged_lines

atexit.register(shutil.rmtree, os.environ["D2G_CACHE"], ignore_errors=True)
torch.set_num_threads(1)  # in case a pytest plugin imported torch before this file
# The first backward pass decides whether autograd starts threads. If torch.export ran it, threads would
# start, and forked processes could not run a backward pass.
torch.ones((), requires_grad=True).backward()

# The same examples on every machine and in every run, and no deadline, because the machine may be busy.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fixed")


OPT_IN = ("slow", "long", "gpu")
"""Marks whose tests run only when `-m` names the mark: `pytest -m slow`."""

LONGEST = (
    "distill/test_fake_cuda.py",
    "test_readme.py",
    "distill/test_engine.py",
    "d2g_cli/test_launch.py",
    "teacher_training/test_full_run.py",
    "test_benchmarks.py",
    "distill/test_components.py",
    "distill/test_presets.py",
    "d2g/test_engine.py",
    "distill/test_transformer_runs.py",
    "test_own_pictures.py",
)
"""Files that take long. They start first, so that both processes end at nearly the same time."""


def _restore_ignored_signals() -> None:
    """A shell ignores SIGINT in background jobs, and nohup SIGHUP; tests of signals need both."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_configure(config: pytest.Config) -> None:
    """Give tests of signals the signals that a shell ignores in background jobs."""
    _restore_ignored_signals()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests with an opt-in mark that `-m` does not name; pytest reports their number."""
    unreachable = [
        i.nodeid for i in items if i.get_closest_marker("long") and not i.get_closest_marker("slow")
    ]
    assert not unreachable, f"long without slow, so no command of CI runs them: {unreachable}"
    inactive = [mark for mark in OPT_IN if mark not in config.option.markexpr]
    deselected = [item for item in items if any(item.get_closest_marker(mark) for mark in inactive)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        left_out = set(deselected)
        items[:] = [item for item in items if item not in left_out]
    # Then the files with the most tests.
    counts = Counter(item.path for item in items)
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path, len(places)), -counts[item.path]))


def _seed(name: str) -> None:
    seed = crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Seed each fixture by its name: its random numbers do not depend on the tests that ran before."""
    _seed(fixturedef.argname)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test logs does not depend on the tests that ran before."""
    forget_logged_lines()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Seed each test by its name, after its fixtures."""
    _seed(item.nodeid)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable-Diffusion-shaped teacher with random weights. Read only: copy it before changing a byte."""
    folder = tmp_path_factory.mktemp("tiny") / "teacher"
    tiny.save_teacher(folder)
    return folder


@pytest.fixture(scope="session")
def pairs(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 12 pairs of that teacher, with prompts.txt beside it. Read only, too."""
    from jobs import make_pairs

    return make_pairs(teacher, tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A program that runs what `python` runs, in processes that need not import torch again."""
    server = ForkServer(tmp_path_factory.mktemp("server"))
    yield str(server.python)
    server.stop()


@pytest.fixture
def d2g(capfd: pytest.CaptureFixture[str]) -> Any:
    """`d2g(*args)` runs the command line in this process and returns a jobs.Ended (exit code, output)."""
    from d2g_cli import main as cli
    from jobs import Ended

    def run(*args: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            cli.main([str(arg) for arg in args])
        code = exit_info.value.code
        return Ended(code if isinstance(code, int) else 0, *capfd.readouterr())

    return run


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that rounds to fp32 (diffusers does, for example rotary positions) keeps float64.

    For finite differences, for which fp32 is too coarse.
    """
    to_float = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else to_float(t))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Clear the compile cache of torch.compile before and after the test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
