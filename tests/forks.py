"""Run functions in forked processes, also as ranks of a process group. Forks need not import torch again."""

import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from d2g.core import logs


def fork(work: Callable[[], object]) -> int:
    """Run `work()` in a forked process and return the process id. Exit code: 0 if `work` returns, else 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about forking with threads
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # OpenMP's pool does not survive a fork
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def forget_logged_lines() -> None:
    """Lines that a process logs once are logged again, as in a process that has just started."""
    logs._once_keys.clear()


def reserve_port() -> int:
    """A free port of 127.0.0.1, which no other process gets by chance until this one ends.

    A socket stays bound to it that does not listen: a server with SO_REUSEADDR may listen there all the same.
    """
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind(("127.0.0.1", 0))
    port: int = reservation.getsockname()[1]
    reservation.detach()
    return port


def environments(ranks: int) -> list[dict[str, str]]:
    """The environment variables that torchrun sets for each rank of a group on one machine."""
    port = str(reserve_port())
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def is_running(pid: int) -> bool:
    """Whether a process is neither gone nor a zombie. Who adopts an orphan may reap it late, or never."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_ended(pid: int) -> None:
    """Wait until a process that was killed has ended, which takes as long as a busy machine takes."""
    end = time.monotonic() + 120
    while is_running(pid):
        assert time.monotonic() < end, f"process {pid} still runs"
        time.sleep(0.02)


def on_ranks(ranks: int, work: Callable[[int], object]) -> None:
    """Run `work(rank)` in one process per rank and wait for all. Fails if one of them fails."""

    def run_rank(rank: int, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        work(rank)

    children = [
        fork(partial(run_rank, rank, environment)) for rank, environment in enumerate(environments(ranks))
    ]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * ranks
