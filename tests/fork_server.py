"""Python processes that start in milliseconds: a server that has imported everything forks them.

`ForkServer.python` is a program with the arguments of `python`. It asks the server for a process with its own
arguments, environment, folder and open files, passes its signals on, and ends as that process ends. Only the
import of modules is shared.
"""

import ctypes
import importlib
import json
import logging
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch

from forks import forget_logged_lines, fork

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
SIZE = 8
"""Bytes of a number in a message."""

CLIENT = f"""#!{sys.executable} -IS
import json, os, signal, socket, sys
numbers = {[int(number) for number in FORWARDED]}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
server = socket.socket(socket.AF_UNIX)
server.connect(ADDRESS)
ignored = [n for n in numbers if signal.getsignal(n) == signal.SIG_IGN]
request = dict(arguments=sys.argv[1:], environment=dict(os.environ), folder=os.getcwd(), ignored=ignored)
text = json.dumps(request).encode()
socket.send_fds(server, [len(text).to_bytes({SIZE}, "big")], [0, 1, 2])
server.sendall(text)

def answer():
    reply = server.recv({SIZE})
    return int.from_bytes(reply, "big", signed=True) if reply else sys.exit("the fork server is gone")

process = answer()
for number in numbers:
    signal.signal(number, lambda number, _: os.kill(process, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
status = answer()
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


class ForkServer:
    """A server in a process of its own, until `stop`. folder: an empty one for its program and its socket."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "python"
        address = folder / "socket"
        self.python.write_text(CLIENT.replace("ADDRESS", repr(str(address))))
        self.python.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(address))
            listener.listen()
            self._pid = fork(lambda: _serve(listener))

    def stop(self) -> None:
        """End the server and its processes."""
        os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def _import_all() -> None:
    """Import what the commands import, also the classes that a model needs when it is loaded."""
    modules = ("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.run", "d2g_cli.main")
    for name in (*modules, "distill.training.train", "eval.runner.run", "pairgen.generate"):
        importlib.import_module(name)
    load_student = importlib.import_module("distill.sampling").load_student
    load_student("miniature")


def _serve(listener: socket.socket) -> None:
    """Answer clients until SIGTERM. A client that is killed takes its process with it."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _import_all()
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    running = dict[Any, int]()  # by the socket of the client: its process
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                client, _ = listener.accept()
                if pid := _start(client):
                    running[client] = pid
                    selector.register(client, selectors.EVENT_READ)
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, client)
            elif key.data is not None:
                # A process ended.
                client = key.data
                status = os.waitstatus_to_exitcode(os.waitpid(running.pop(client), 0)[1])
                selector.unregister(key.fileobj)
                os.close(key.fd)
                if client in selector.get_map():
                    selector.unregister(client)
                with client:
                    _answer(client, status)
            elif key.fileobj in running:
                # A client says no more than its request, so this is its end.
                selector.unregister(key.fileobj)
                os.kill(running[key.fileobj], signal.SIGKILL)


def _answer(client: socket.socket, number: int) -> None:
    """Send a number to a client, which may be gone."""
    try:
        client.sendall(number.to_bytes(SIZE, "big", signed=True))
    except (BrokenPipeError, ConnectionResetError):
        return


def _start(client: socket.socket) -> int:
    """Fork the process that a client asks for; returns its number, 0 for a client that is gone."""
    head, files, _, _ = socket.recv_fds(client, SIZE, 3)
    text, part = b"", head
    while part and len(text) < int.from_bytes(head, "big"):
        part = client.recv(1 << 16)
        text += part
    pid = 0
    if part:
        pid = os.fork()
        if pid == 0:
            _become(json.loads(text), files)
        _answer(client, pid)
    for file in files:
        os.close(file)
    return pid


def _become(request: dict[str, Any], files: list[int]) -> NoReturn:
    """Run what `python ARGUMENTS` runs, and exit as it does."""
    code = 1
    try:
        _die_with_parent()
        os.setpgid(0, 0)
        for number, file in enumerate(files):
            os.dup2(file, number)
        sys.stdin, sys.stdout, sys.stderr = (open(n, mode) for n, mode in enumerate("rww"))
        # The server's files stay open: what still writes to one must not write to a new socket instead.
        loggers = (logging.getLogger(name) for name in logging.root.manager.loggerDict)
        for handler in (handler for logger in loggers for handler in logger.handlers):
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr  # setStream would flush the old one, which may be closed
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        # State of the interpreter that a new process has.
        for number in FORWARDED:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if number in request["ignored"] else default)
        logging.getLogger().handlers.clear()
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        random.seed()
        forget_logged_lines()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        from d2g_cli.common import reporter

        reporter.__init__()  # type: ignore[misc]  # the progress bars of the old one belong to the server
        _run([word for word in request["arguments"] if word != "-u"])
        code = 0
    except SystemExit as exit_error:
        value = exit_error.code
        code = value if isinstance(value, int) else 0 if value is None else 1
    except BaseException:  # the process must not go on as a copy of the server
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(arguments: list[str]) -> None:
    """`-m MODULE ...`, `-c CODE ...` or `FILE ...`."""
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
