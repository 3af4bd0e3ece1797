"""Work in forked processes, alone or as the ranks of one group: real ones, without the imports' seconds."""

import os
import socket
import traceback
import warnings
from collections.abc import Callable
from functools import partial

import torch


def fork(work: Callable[[], object]) -> int:
    """Start `work()` in a forked process and return its number; it ends with 0 where `work` returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
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


def environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each rank of a group on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def on_ranks(ranks: int, work: Callable[[int], object]) -> None:
    """`work(rank)` on each rank of a group, to its end; fails when one of them does."""

    def one(rank: int, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        work(rank)

    children = [fork(partial(one, rank, told)) for rank, told in enumerate(environments(ranks))]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * ranks
