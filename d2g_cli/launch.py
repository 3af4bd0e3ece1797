"""`d2g launch`: any command in several processes, on one machine or many, through torchrun."""

import logging
import os
import signal
import sys
from typing import Annotated

import typer

from d2g.core.errors import SettingError
from d2g_cli.terminal import print_line

MOST_CPU_PROCESSES = 8
"""Processes that `cpu_processes` uses at most: the small jobs that it is for do not divide further."""

SIGNAL_OPTIONS = {
    "--signals-to-handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "--shutdown-timeout": "600",
}
"""Options of torchrun: signals to pass on to the processes, and seconds until it kills the processes."""


def launch(
    context: typer.Context,
    gpus: Annotated[
        int | None,
        typer.Option(
            help="Processes on this machine, one per GPU (all GPUs; without one, all CPU cores).",
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
    command = context.args
    if not command or command[0].startswith("-"):
        raise SettingError("no command to launch; write it after --, as in `d2g launch -- distill ode ...`")
    if command[0] == "launch":
        raise SettingError("`d2g launch` cannot launch itself")
    for name, value in (("--gpus", gpus), ("--nodes", nodes)):
        if value is not None and value < 1:
            raise SettingError(f"{name} is {value}; expected 1 or more")
    if nodes > 1 and not rendezvous:
        raise SettingError(
            f"--nodes {nodes} needs --rendezvous HOST:PORT, an address of one of them that all can reach"
        )
    if (processes := gpus) is None:
        import torch

        from d2g.core.environment import usable_cores

        processes = torch.cuda.device_count() or usable_cores()
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
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    # The failed process says what went wrong; torchrun would repeat it as a traceback.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    meeting = ["--standalone"]
    if nodes > 1:
        meeting = ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", rendezvous]
        meeting += ["--rdzv-id", job]
    options = [*meeting, "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    # Signals go on to the processes, which get time to save a checkpoint. Older torchruns lack these options.
    parser = get_args_parser()
    for name, value in SIGNAL_OPTIONS.items():
        if name in parser.format_usage():
            options += [name, value]
    try:
        run(parser.parse_args([*options, "--module", "d2g_cli", *command]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        # Ctrl-C reaches the processes too, and rank 0 prints its line; other signals come to this one alone.
        if error.sigval != signal.SIGINT:
            print_line(f"error: stopped by {error.sigval.name}; run the same command again", sys.stderr)
        return 128 + int(error.sigval)
    return 0


def cpu_processes() -> int:
    """How many processes a small job takes here: a power of two, 1 with a GPU or under torchrun."""
    if "WORLD_SIZE" in os.environ:
        return 1
    import torch

    from d2g.core.environment import usable_cores

    if torch.cuda.is_available():
        return 1
    return 1 << (min(usable_cores(), MOST_CPU_PROCESSES).bit_length() - 1)
