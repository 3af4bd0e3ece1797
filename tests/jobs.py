"""Small pair and training jobs, and the command line in forked processes with real signals and exit codes."""

import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import tiny
from d2g.core.config import override
from d2g_cli import main as cli
from d2g_cli.common import reporter
from distill.config.run import DistillConfig, TrainConfig
from eval.networks.registry import new_clip, save_clip
from forks import environments, forget_logged_lines
from pairgen.generate import generate_pairs

BATCH = 4
TRAIN = TrainConfig(
    images=5 * BATCH,
    batch_size=BATCH,
    ema_beta=0.9,
    precision="fp32",
    loader_workers=0,
    report_images=BATCH,
    checkpoint_images=1_000_000,
    plot=False,  # it takes as long as ten steps
    on_collapse="off",  # short runs of random networks trigger the checks by chance
)


def make_pairs(teacher: Path, folder: Path, **settings: Any) -> Path:
    """A store of 12 pairs of tiny.CAPTIONS at `folder`/pairs."""
    prompts = tiny.save_prompts(folder / "prompts.txt")
    generate_pairs(tiny.pair_config(str(teacher), prompts, **settings), folder / "pairs")
    return folder / "pairs"


def make_clip(teacher: Path, folder: Path) -> Path:
    """Save an untrained CLIP to `folder`: 16 px images, 8 features, the teacher's tokenizer."""
    tower = {"width": 16, "layers": 1, "mlp_ratio": 1.0}
    vocabulary = len(json.loads((teacher / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
    text = {"context_length": 12, "vocab_size": vocabulary, "heads": 2, **tower}
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "head_width": 8, **tower},
        "text_cfg": {**text, "hf_tokenizer_name": "tokenizer files beside this one"},
    }
    torch.manual_seed(0)
    shape = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    save_clip(new_clip(config), config, shape, teacher / "tokenizer", folder)
    return folder


def distill_config(
    teacher: Path, pairs: Path, *settings: str, stage: Any = "ode", init: Path | str = ""
) -> DistillConfig:
    """The config of five steps of batch 4 that report at every step; `settings`: NAME=VALUE as for --set."""
    config = DistillConfig(stage=stage, teacher=str(teacher), pairs=str(pairs), init=str(init))
    return override(replace(config, train=TRAIN), settings)


def distill_arguments(config: DistillConfig, out: Path, *settings: str) -> list[str]:
    """The command line equivalent to a config of `distill_config`."""
    options = [
        "--pairs",
        config.pairs,
        "--teacher",
        config.teacher,
        "--out",
        str(out),
        "--preset",
        "miniature-text" if config.stage == "text" else "miniature",
    ]
    options += ["--init", config.init] if config.init else []
    train = {name: getattr(config.train, name) for name in TrainConfig.__dataclass_fields__}
    sets = [f"train.{name}={json.dumps(value)}" for name, value in train.items()]
    sets += [f"optim.{name}=0" for name in ("warmup_images", "decay_images")]
    if config.adversarial:
        sets += [f"gan.optim.{name}=0" for name in ("warmup_images", "decay_images")]
    else:
        sets += ["optim.lr=5e-4", "regression.losses=e_latent_lpips"]
    return ["distill", config.stage, *options, *(part for s in (*sets, *settings) for part in ("--set", s))]


@contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """Limit the file size to `size` bytes. Writing more raises EFBIG, where a full disk raises ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _mount_disks(disks: Mapping[Path, int]) -> None:
    """Mount empty file systems of these sizes in bytes, which this process and its children alone see."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, recursive, private = 0x20000, 0x4000, 1 << 18
    calls = [lambda: libc.unshare(new_namespace)]
    calls += [lambda: libc.mount(b"none", b"/", None, recursive | private, None)]
    for path, size in disks.items():
        path.mkdir(parents=True, exist_ok=True)
        arguments = (b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={size}".encode())
        calls += [lambda arguments=arguments: libc.mount(*arguments)]  # type: ignore[misc]
    for call in calls:
        if call():
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def can_mount() -> bool:
    """Whether this user may mount file systems in a namespace of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            _mount_disks({Path("/mnt"): 1 << 16})
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


@dataclass
class Ended:
    """Exit code and output of a command."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The JSON object that a successful command printed: one line of stdout and nothing else."""
        assert self.code == 0, self.stderr
        assert len(self.stdout.splitlines()) == 1, self.stdout
        content: dict[str, Any] = json.loads(self.stdout)
        return content

    @property
    def error(self) -> str:
        """The only line of stderr that starts with `error: `; fails if there are several, or a traceback."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.stderr, self.stderr
        return lines[0]


class Running:
    """`d2g ARGUMENTS` in a forked process, which saves the seconds of importing.

    `disks`: folders that are disks of their own, by their size in bytes; needs NEEDS_MOUNT.
    """

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        file_limit: int = 0,
        disks: Mapping[Path, int] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("stdout*")))
        self.out, self.err = folder / f"stdout{number}", folder / f"stderr{number}"
        self.out.touch()
        self.err.touch()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # Python 3.12 warns about forking with threads
            self.pid = os.fork()
        if self.pid == 0:
            self._child(arguments, environment or {}, file_limit, disks or {})
        # Parent and child both set the group: the caller may send a signal before the child has run.
        with suppress(ProcessLookupError, PermissionError):
            os.setpgid(self.pid, self.pid)

    def _child(
        self, arguments: list[str], environment: Mapping[str, str], file_limit: int, disks: Mapping[Path, int]
    ) -> None:
        code = 99
        try:
            os.setpgid(0, 0)
            sys.stdout, sys.stderr = open(self.out, "w"), open(self.err, "w")
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stderr.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist's workers ignore SIGINT
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.update(environment)
            torch.set_num_threads(1)  # OpenMP's pool does not survive a fork
            forget_logged_lines()
            reporter.__init__()  # type: ignore[misc]  # a new reporter: the progress bars of the old one belong to the parent
            if disks:
                _mount_disks(disks)
            if file_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
            cli.main(arguments)
            code = 0
        except SystemExit as exit_error:
            value = exit_error.code
            code = value if isinstance(value, int) else 0 if value is None else 98
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        """Wait until `condition()` is true. Fails if the process ends or time runs out first."""
        end = time.monotonic() + seconds
        while not condition():
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) or time.monotonic() > end:
                raise AssertionError(f"ended or stuck too early: {self.wait(0)}")
            time.sleep(0.002)

    def send(self, number: int) -> None:
        """Send a signal to the process and its workers, as Ctrl-C in a terminal does."""
        os.killpg(self.pid, number)

    def wait(self, seconds: float = 240) -> Ended:
        """Wait for the end of the process, and kill it after `seconds`."""
        end = time.monotonic() + seconds
        while not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.002)
        _, status = os.waitpid(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), self.out.read_text(), self.err.read_text())


def succeed(*commands: Ended) -> None:
    """Fail unless every command has succeeded."""
    for ended in commands:
        assert ended.code == 0, ended.stderr


def d2g(arguments: list[str], folder: Path, **settings: Any) -> Ended:
    """Run a command in a forked process and wait for it."""
    return Running(arguments, folder, **settings).wait()


def d2g_ranks(
    arguments: list[str], folder: Path, ranks: int = 2, environment: Mapping[str, str] | None = None
) -> list[Ended]:
    """Run a command on several ranks with the environment variables that torchrun sets, and wait for all."""
    started = [
        Running(arguments, folder / f"rank{rank}", {**rank_environment, **(environment or {})})
        for rank, rank_environment in enumerate(environments(ranks))
    ]
    return [running.wait() for running in started]
