"""Small whole jobs for tests, and the command line in forked processes: real signals, limits, codes."""

import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from forks import environments
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
    on_collapse="off",  # such short runs of random networks look like anything
)


def make_pairs(teacher: Path, folder: Path, **settings: Any) -> Path:
    """A store of 12 pairs of tiny.CAPTIONS at `folder`/pairs."""
    prompts = tiny.save_prompts(folder / "prompts.txt")
    generate_pairs(tiny.pair_config(str(teacher), prompts, **settings), folder / "pairs")
    return folder / "pairs"


def make_clip(teacher: Path, folder: Path) -> Path:
    """A CLIP of 16 px and 8 features at `folder`, untrained, with the teacher's tokenizer."""
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
    """A few steps of batch 4 that report at every step; `settings` as after --set."""
    config = DistillConfig(stage=stage, teacher=str(teacher), pairs=str(pairs), init=str(init))
    return override(replace(config, train=TRAIN), settings)


def distill_arguments(config: DistillConfig, out: Path, *settings: str) -> list[str]:
    """The command line that says what `distill_config` says."""
    options = [
        "--pairs",
        config.pairs,
        "--teacher",
        config.teacher,
        "--out",
        str(out),
        "--preset",
        "miniature",
    ]
    options += ["--init", config.init] if config.init else []
    train = {name: getattr(config.train, name) for name in TrainConfig.__dataclass_fields__}
    sets = [f"train.{name}={json.dumps(value)}" for name, value in train.items()]
    return ["distill", config.stage, *options, *(part for s in (*sets, *settings) for part in ("--set", s))]


@contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """The kernel refuses to let files grow beyond `size` bytes: EFBIG, met where a full disk gives ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@dataclass
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout of a command that ended well: one object on one line and nothing else."""
        assert self.code == 0, self.stderr
        assert len(self.stdout.splitlines()) == 1, self.stdout
        found: dict[str, Any] = json.loads(self.stdout)
        return found

    @property
    def error(self) -> str:
        """The one line that starts with `error: `; nothing else of the kind, no traceback."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.stderr, self.stderr
        return lines[0]


class Running:
    """`d2g ARGUMENTS` in a forked process: as real as a fresh one, without the imports' seconds."""

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        file_limit: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("stdout*")))
        self.out, self.err = folder / f"stdout{number}", folder / f"stderr{number}"
        self.out.touch()
        self.err.touch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
            self.pid = os.fork()
        if self.pid == 0:
            self._child(arguments, environment or {}, file_limit)

    def _child(self, arguments: list[str], environment: Mapping[str, str], file_limit: int) -> None:
        code = 99
        try:
            os.setpgid(0, 0)
            sys.stdout, sys.stderr = open(self.out, "w"), open(self.err, "w")
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stderr.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist's workers ignore it
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.update(environment)
            torch.set_num_threads(1)  # OpenMP's pool does not survive a fork
            reporter.__init__()  # type: ignore[misc]  # its bars belong to the parent
            if file_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
            cli.main(arguments)
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0 if left.code is None else 98
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait_for(self, seen: Callable[[], bool], seconds: float = 240) -> None:
        """Until `seen()`; fails when the process ends or time runs out before."""
        end = time.monotonic() + seconds
        while not seen():
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) or time.monotonic() > end:
                raise AssertionError(f"ended or stuck too early: {self.wait(0)}")
            time.sleep(0.002)

    def send(self, number: int) -> None:
        """A signal to the process and its workers, as a terminal's Ctrl-C sends it."""
        os.killpg(self.pid, number)

    def wait(self, seconds: float = 240) -> Ended:
        """How it ended; killed when it takes longer."""
        end = time.monotonic() + seconds
        while not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.002)
        _, status = os.waitpid(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), self.out.read_text(), self.err.read_text())


def d2g(arguments: list[str], folder: Path, **settings: Any) -> Ended:
    """Run a command in a forked process to its end."""
    return Running(arguments, folder, **settings).wait()


def d2g_ranks(
    arguments: list[str], folder: Path, ranks: int = 2, environment: Mapping[str, str] | None = None
) -> list[Ended]:
    """Run a command on several ranks, told about each other as torchrun tells them."""
    started = [
        Running(arguments, folder / f"rank{rank}", {**told, **(environment or {})})
        for rank, told in enumerate(environments(ranks))
    ]
    return [running.wait() for running in started]
