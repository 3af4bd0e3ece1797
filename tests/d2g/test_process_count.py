"""Processes that share a job on a CPU: the measurement with real ones, the choice, what a folder keeps."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from d2g.core.distributed import timed_products
from d2g.core.distributed.process_count import (
    FILE,
    Measurement,
    measure_processes,
    save_process_count,
    saved_process_count,
)
from d2g.core.errors import UserError
from forks import fork, wait_until_ended


@pytest.mark.parametrize(
    ("alone", "together", "processes", "words"),
    [
        (100, [98, 97], 2, "2 processes (measured: 2 at once compute 1.94 times as much as one)"),
        (100, [61, 64], 2, "1.22 times"),
        (
            100,
            [60, 64],
            1,
            "1 process, because more are not worth it (measured: 2 at once compute 1.20 times",
        ),
        (100, [50, 50], 1, "1.00 times"),
        # Each step waits for the slowest rank.
        (100, [100, 30], 1, "0.60 times"),
        (50, [20] * 8, 8, "8 processes (measured: 8 at once compute 3.20 times"),
    ],
)
def test_processes_are_taken_if_they_compute_more(
    alone: float, together: Sequence[float], processes: int, words: str
) -> None:
    measurement = Measurement(alone=alone, together=together)
    assert measurement.processes == processes
    assert words in measurement.line()


def test_the_rates_are_those_of_real_products() -> None:
    measurement = measure_processes(2, 0.1)
    assert len(measurement.together) == 2 and min(measurement.alone, *measurement.together) > 0


MEETING = """
import os, sys, time
from pathlib import Path
folder = Path({folder!r})
print("ready", flush=True)
for seconds in sys.stdin:
    if not (folder / "alone").exists():
        assert len(list((folder / "asked").iterdir())) == 0
        (folder / "alone").write_text(seconds)
        print(100, flush=True)
        continue
    (folder / "asked" / str(os.getpid())).touch()
    end = time.monotonic() + 120
    while len(list((folder / "asked").iterdir())) < 3:
        assert time.monotonic() < end, "the others are not asked"
        time.sleep(0.01)
    print(50, flush=True)
"""


def test_processes_are_timed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise those of one core would not share it. Here none answers before all are asked."""
    (tmp_path / "asked").mkdir()
    (tmp_path / "work.py").write_text(MEETING.format(folder=str(tmp_path)))
    monkeypatch.setattr(timed_products, "__file__", str(tmp_path / "work.py"))
    measurement = measure_processes(3, 0.25)
    assert measurement == Measurement(alone=100, together=[50, 50, 50])
    assert (tmp_path / "alone").read_text() == "0.25\n"


def test_a_worker_that_cannot_start_is_an_error_with_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('numpy is damaged')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="was to be timed has ended: ImportError: numpy is damaged"):
        measure_processes(2)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks Linux for children")
def test_ctrl_c_ends_the_workers_at_once() -> None:
    """The terminal sends SIGINT to the whole group; workers ignore it and end with their parent."""

    def measure() -> None:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        with pytest.raises(KeyboardInterrupt):
            measure_processes(2, 600.0)

    parent = fork(measure)
    children = Path(f"/proc/{parent}/task/{parent}/children")
    deadline = time.monotonic() + 60
    while len(workers := children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(parent, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 0 and len(workers) == 2
    for worker in workers:
        wait_until_ended(int(worker))


def test_the_work_is_counted_per_second() -> None:
    rate = timed_products.products_per_second(0.05)
    assert 0 < rate < 1e6


def test_a_folder_keeps_the_number_of_its_last_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert saved_process_count(tmp_path / "none") is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    save_process_count(tmp_path)
    assert saved_process_count(tmp_path) == 4
    # Rank 1 writes nothing.
    monkeypatch.setenv("RANK", "1")
    save_process_count(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"processes": "two"}', "{}"])
def test_a_damaged_number_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(
        UserError, match=r"processes.json.*delete .*processes.json, the number is measured again"
    ):
        saved_process_count(tmp_path)
