"""`d2g launch`: any command in several processes, on one machine or many, through torchrun."""

import os
import signal
import sys
import time
from math import inf
from pathlib import Path
from typing import Annotated

import typer

from d2g.core.errors import SettingError, UserError
from d2g.core.logs import logger
from d2g_cli.terminal import print_line

MOST_CPU_PROCESSES = 8
"""Processes that `cpu_processes` uses at most: the small jobs that it is for do not divide further."""

MEASURED_FROM = 60.0
"""Seconds of a job from which `cpu_processes` measures; the measurement itself takes about one."""

MEASUREMENTS = 3
"""Measurements that must agree, a second or two apart, before one process is taken."""

MOST_PROCESSES = 1024
"""Processes that one machine may be asked to start."""


def launch(
    context: typer.Context,
    gpus: Annotated[
        int | None,
        typer.Option(
            help="Processes on this machine, one per GPU (all GPUs; on a CPU measured: one per core, up to "
            "8, or one).",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(help="Machines that run this same command.")] = 1,
    rendezvous: Annotated[
        str, typer.Option(help="HOST:PORT of one of the machines, where they all meet.")
    ] = "",
    job: Annotated[str, typer.Option(help="Name of the job, the same on all machines.")] = "d2g",
    restarts: Annotated[int, typer.Option(help="Restarts after a process has died.")] = 0,
) -> None:
    """Run a command of d2g in several processes: `d2g launch --gpus 8 -- distill gan ...`.

    `pairs generate` needs no launch: start it as often as you like, on as many machines as you like.
    """
    # Numbers of processes, machines and restarts.
    for name, value, least in (("--nodes", nodes, 1), ("--restarts", restarts, 0)):
        if value < least:
            raise SettingError(f"{name} is {value}; expected {least} or more")
    check_count("--gpus", gpus)
    # The command to launch follows the options.
    command = context.args
    if not command or command[0].startswith("-"):
        raise SettingError("no command to launch; write it after --, as in `d2g launch -- distill ode ...`")
    if command[0] == "launch":
        raise SettingError("`d2g launch` cannot launch itself")
    if nodes > 1 and not rendezvous:
        raise SettingError(
            f"--nodes {nodes} needs --rendezvous HOST:PORT, an address of one of them that all can reach"
        )
    port = rendezvous.rpartition(":")[2] if ":" in rendezvous else "0"
    if nodes > 1 and not (port.isascii() and port.isdecimal() and int(port) < 2**16):
        raise SettingError(f"--rendezvous is {rendezvous!r}; expected HOST:PORT with a port below {2**16}")
    # By default one process per GPU. Machines without one must agree on a number, so theirs is not measured.
    if (processes := gpus) is None:
        import torch

        gpus_here = torch.cuda.device_count()
        processes = gpus_here or (most_cpu_processes() if nodes > 1 else measured_cpu_processes("--gpus"))
    raise typer.Exit(run_in_processes(command, processes, nodes, rendezvous, job, restarts))


def run_in_processes(
    command: list[str],
    processes: int,
    nodes: int = 1,
    rendezvous: str = "",
    job: str = "d2g",
    restarts: int = 0,
) -> int:
    """Run `d2g COMMAND` in so many processes per machine. Returns the exit code of the first that failed.

    Each process computes with one thread, unless OMP_NUM_THREADS is set. On a CPU, processes of one thread
    are faster than threads of one process, and slow down in proportion where other programs use the cores.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from d2g.core.distributed.torchrun import run_module

    code = run_module("d2g_cli", command, processes, nodes, rendezvous, job, restarts)
    # Ctrl-C reaches the processes too, and rank 0 prints its line; other signals reach one process alone.
    if code > 128 and code != 128 + signal.SIGINT:
        name = signal.Signals(code - 128).name
        print_line(f"error: stopped by {name}; run the same command again", sys.stderr)
    return code


def _check_processes(processes: int | None) -> int | None:
    return check_count("--processes", processes)


def check_count(option: str, processes: int | None) -> int | None:
    """The number of processes of an option. Raises SettingError for none and for absurdly many."""
    if processes is not None and not 1 <= processes <= MOST_PROCESSES:
        expected = "1 or more" if processes < 1 else f"{MOST_PROCESSES} or fewer on one machine"
        raise SettingError(f"{option} is {processes}; expected {expected}")
    return processes


Processes = Annotated[
    int | None,
    typer.Option(
        help="Processes that share the work on a CPU (measured: one per core, up to 8, or one).",
        show_default=False,
        callback=_check_processes,
    ),
]
"""The option of commands that call `share_among_processes`."""


def share_among_processes(
    context: typer.Context, processes: int | None, out: Path, seconds: float = inf
) -> None:
    """Run this command in several processes and exit. Returns at once in each of these, or if one is enough.

    processes: their number; None: `cpu_processes(out, seconds)`.
    """
    # Under `d2g launch` or torchrun this is one of the processes already.
    count = cpu_processes(out, seconds) if processes is None else processes
    if count > 1 and "WORLD_SIZE" not in os.environ:
        raise typer.Exit(run_in_processes(context.find_root().obj, count))


def cpu_processes(out: Path, seconds: float = inf) -> int:
    """How many processes a small job takes here: a power of two or one, 1 with a GPU or under torchrun.

    A job that has run in the folder OUT before takes as many as then, so that it goes on with the same random
    numbers. Otherwise it is `measured_cpu_processes`, except that jobs of fewer seconds than `MEASURED_FROM`
    take one process per core without a measurement.
    """
    if "WORLD_SIZE" in os.environ:
        return 1
    import torch

    from d2g.core.distributed.process_count import FILE, saved_process_count

    if torch.cuda.is_available():
        return 1
    if (saved := check_count(f"processes in {out / FILE}", saved_process_count(out))) is not None:
        logger.info("%d process(es), as at the last start; --processes chooses", saved)
        return saved
    return most_cpu_processes() if seconds < MEASURED_FROM else measured_cpu_processes("--processes")


def most_cpu_processes() -> int:
    """One process per core, at most `MOST_CPU_PROCESSES`; a power of two, to divide batches.

    Fewer if OMP_NUM_THREADS gives each process several threads: together they have one per core.
    """
    from d2g.core.environment import usable_cores

    processes = max(1, usable_cores() // threads_per_process())
    return 1 << (min(processes, MOST_CPU_PROCESSES).bit_length() - 1)


def threads_per_process() -> int:
    """The threads of each of several processes: OMP_NUM_THREADS, else 1."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(1, int(threads)) if threads.isascii() and threads.isdecimal() else 1


def measured_cpu_processes(option: str) -> int:
    """`most_cpu_processes` if they compute more than one process, else 1. Logs the choice.

    They may not where other programs use the cores, or where a container is limited to a part of them.
    option: the one by which users choose.
    """
    from d2g.core.distributed.process_count import measure_processes

    if (most := most_cpu_processes()) == 1:
        if (threads := threads_per_process()) > 1:
            logger.info("1 process of %d threads (OMP_NUM_THREADS); %s chooses", threads, option)
        return 1
    try:
        # A moment in which another program ends or starts must not decide about minutes of work.
        for attempt in range(MEASUREMENTS):
            time.sleep(attempt)
            measurement = measure_processes(most)
            if measurement.processes > 1:
                break
    except UserError as error:
        logger.warning("1 process, because more could not be measured (%s); %s chooses", error, option)
        return 1
    logger.info("%s; %s chooses", measurement.line(), option)
    return measurement.processes


def log_other_processes(command: str) -> None:
    """Log that `d2g launch` may be faster, where a command starts in one process with several threads."""
    import torch

    threads = torch.get_num_threads()
    if "WORLD_SIZE" not in os.environ and threads > 1 and not torch.cuda.is_available():
        again = f"`d2g launch -- {command} ...` measures whether several processes are faster"
        logger.info("1 process with %d threads; %s", threads, again)
