"""How many processes share a job on a CPU: by measurement at its first start, and then as before."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import IO, TypedDict

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed import process_group, timed_products
from d2g.core.errors import UserError
from d2g.core.json_files import read_json

MEASURED_SECONDS = 0.4
"""Length of each of the two measurements: fixed, so that they take no longer on a busy machine."""
PROCESS_GAIN = 1.2
"""Processes are worth their start and their exchange if they compute so many times as much as one alone."""
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
"""Environment in which numpy's matrix products have one thread, whatever its library."""
FILE = "processes.json"
"""File in the folder of a job: the number of processes of its last start."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Products per second of one process while the others wait, and of each of all processes at once."""

    alone: float
    together: Sequence[float]

    @property
    def gain(self) -> float:
        """How many times as much as one the processes do: ranks wait for the slowest one in each step."""
        return len(self.together) * min(self.together) / self.alone

    @property
    def processes(self) -> int:
        """The number of processes to take: all of them, or one."""
        return len(self.together) if self.gain > PROCESS_GAIN else 1

    def line(self) -> str:
        """The measurement and the choice in words."""
        count = len(self.together)
        measured = f"measured: {count} at once compute {self.gain:.2f} times as much as one"
        if self.processes == 1:
            return f"1 process, because more are not worth it ({measured})"
        return f"{count} processes ({measured})"


def measure_processes(count: int, seconds: float = MEASURED_SECONDS) -> Measurement:
    """Time matrix products in one process alone, then in `count` processes at once, of one thread each.

    Takes 2 * `seconds` and the start of Python with numpy. Raises UserError if a process cannot start.
    """
    with ExitStack() as stack:
        # All start first, so that no start disturbs a measurement.
        workers = [stack.enter_context(_worker()) for _ in range(count)]
        for worker in workers:
            _answer(worker)
        _ask(workers[0], seconds)
        alone = float(_answer(workers[0]))
        for worker in workers:
            _ask(worker, seconds)
        return Measurement(alone=alone, together=[float(_answer(worker)) for worker in workers])


@contextmanager
def _worker() -> Iterator["Popen[bytes]"]:
    # -P: the folder of the file is not searched for modules.
    command = [sys.executable, "-P", timed_products.__file__]
    environment = {**os.environ, **ONE_THREAD}
    try:
        process = Popen(command, bufsize=0, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment)
    except OSError as error:
        raise UserError(f"no process can be started: {error.strerror}") from error
    with process:
        try:
            yield process
        finally:
            process.kill()


def _ask(worker: "Popen[bytes]", seconds: float) -> None:
    try:
        _pipe(worker.stdin).write(f"{seconds}\n".encode())
    except BrokenPipeError as error:
        raise _ended(worker) from error


def _answer(worker: "Popen[bytes]") -> str:
    if line := _pipe(worker.stdout).readline():
        return line.decode().strip()
    raise _ended(worker)


def _ended(worker: "Popen[bytes]") -> UserError:
    """The error of a worker that has ended, with the last line that it wrote."""
    lines = _pipe(worker.stderr).read().decode(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "without a message")
    return UserError(f"a process that was to be timed has ended: {last.strip()}")


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


class _Saved(TypedDict):
    processes: int


def save_process_count(folder: Path) -> None:
    """Write the number of processes of this start into the folder of a job. Call on every rank."""
    if process_group.rank() == 0:
        write_atomically(folder / FILE, json.dumps({"processes": process_group.world_size()}))


def saved_process_count(folder: Path) -> int | None:
    """The number of processes of a job's last start; None before the first.

    Raises UserError for a damaged file.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    saved = read_json(file, f"delete {file}, the number is measured again", _Saved)
    return int(saved["processes"])
