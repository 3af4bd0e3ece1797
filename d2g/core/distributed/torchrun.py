"""Starts a module in several processes with torchrun, from Python."""

import logging

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import get_args_parser, run

from d2g.core.errors import UserError, first_line

SIGNAL_OPTIONS = {
    "--signals-to-handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "--shutdown-timeout": "600",
}
"""Options of torchrun: signals to pass on to the processes, and seconds until it kills the processes."""


def run_module(
    module: str, arguments: list[str], processes: int, nodes: int, rendezvous: str, job: str, restarts: int
) -> int:
    """Run `python -m MODULE ARGUMENTS` in so many processes on each of `nodes` machines.

    rendezvous: HOST:PORT where several machines meet, in the name of `job`. restarts: of all processes after
    one has died. Returns 0, the exit code of the first process that failed, or 128 + the number of the signal
    that ended it or this process. Raises UserError if the machines do not meet.
    """
    # The failed process says what went wrong; torchrun would repeat it as a traceback.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    meeting = ["--standalone"]
    if nodes > 1:
        meeting = ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", rendezvous]
        meeting += ["--rdzv-id", job]
    options = [*meeting, "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    # Options of the command, such as --num, are no abbreviations of torchrun's own (--numa-binding).
    parser = get_args_parser()
    parser.allow_abbrev = False
    # Signals go on to the processes, which get time to save a checkpoint. Older torchruns lack these options.
    for name, value in SIGNAL_OPTIONS.items():
        if name in parser.format_usage():
            options += [name, value]
    try:
        run(parser.parse_args([*options, "--module", module, *arguments]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    except RendezvousError as error:
        raise UserError(
            f"the {nodes} machines cannot meet at {rendezvous} ({first_line(error)}); give an address of one "
            "of them that all can reach, and start the same command on each"
        ) from error
    return 0
