"""Loggers in addition to stats.jsonl: TensorBoard, W&B and Trackio."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from d2g.core.config import digest, pick
from d2g.core.errors import SettingError, UserError


class RunLogger(Protocol):
    """A logger that gets everything that stats.jsonl and the previews get. Steps are training images."""

    def write(self, nimg: int, values: Mapping[str, float]) -> None:
        """Log one report."""

    def picture(self, nimg: int, name: str, image: Tensor) -> None:
        """Log a uint8 image [3, H, W]."""

    def close(self) -> None:
        """Write out everything that is buffered."""


class TensorBoard:
    """Writes RUN/tensorboard. Show it with `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], nimg: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:  # purge_step hides what a killed run wrote after its checkpoint
            self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=nimg + 1)
        except OSError as error:
            raise UserError(f"cannot write {folder / 'tensorboard'}: {error.strerror or error}") from error
        self.writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```", nimg)

    def write(self, nimg: int, values: Mapping[str, float]) -> None:
        """Log one scalar per value."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, nimg)
        self.writer.flush()

    def picture(self, nimg: int, name: str, image: Tensor) -> None:
        """Log an image under its name."""
        self.writer.add_image(name, image.cpu(), nimg)

    def close(self) -> None:
        """Flush and close the file."""
        self.writer.close()


def _run_id(folder: Path, config: Mapping[str, Any]) -> str:
    """An id that depends on folder and settings, which a restart does not change."""
    return digest([str(folder.resolve()), {k: v for k, v in config.items() if k != "length"}])[:16]


class WandB:
    """A W&B run, which a restart continues. Project, entity and mode come from W&B's environment variables
    (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline).
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], nimg: int) -> None:
        import wandb

        try:
            self.run: Any = wandb.init(
                dir=str(folder),
                config=dict(config),
                name=folder.name,
                id=_run_id(folder, config),
                resume="allow",
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"W&B does not start ({reason}); log in, set WANDB_MODE=offline, or leave wandb out of "
                "train.loggers"
            ) from error
        # Count steps in `nimg`: W&B drops values of its own earlier steps, which a resumed run writes again.
        self.run.define_metric("nimg")
        self.run.define_metric("*", step_metric="nimg")

    def write(self, nimg: int, values: Mapping[str, float]) -> None:
        """Log one row."""
        self.run.log({"nimg": nimg, **values})

    def picture(self, nimg: int, name: str, image: Tensor) -> None:
        """Log an image under its name."""
        import wandb

        pixels = image.permute(1, 2, 0).cpu().numpy()
        self.run.log({"nimg": nimg, f"preview/{name}": wandb.Image(pixels)})

    def close(self) -> None:
        """Upload the rest; offline, it stays in RUN/wandb."""
        self.run.finish()


class Trackio:
    """A Trackio run, which a restart continues. `trackio show` displays it.

    Trackio stores it in the folder TRACKIO_DIR or the Space TRACKIO_SPACE_ID. The environment variable
    TRACKIO_PROJECT sets its project; the default is diffusion2gan.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], nimg: int) -> None:
        import trackio

        # Trackio prints; standard output belongs to the command's result.
        with redirect_stdout(sys.stderr):
            self.run: Any = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "diffusion2gan"),
                name=f"{folder.name}-{_run_id(folder, config)}",
                config=dict(config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, nimg: int, values: Mapping[str, float]) -> None:
        """Log one row."""
        self.run.log(dict(values), step=nimg)

    def picture(self, nimg: int, name: str, image: Tensor) -> None:
        """Log an image under its name."""
        import trackio

        self.run.log({f"preview/{name}": trackio.Image(image.permute(1, 2, 0).cpu().numpy())}, step=nimg)

    def close(self) -> None:
        """Write the rest."""
        import trackio

        with redirect_stdout(sys.stderr):
            trackio.finish()  # type: ignore[no-untyped-call]


LOGGERS: dict[str, Callable[[Path, Mapping[str, Any], int], RunLogger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
"""Loggers by name, from a run's folder, its settings and the images so far. Each needs the package of that
name."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise SettingError for a logger that does not exist, or whose package is not installed."""
    for name in names:
        pick(LOGGERS, name, "logger")
        if find_spec(name) is None:
            raise SettingError(
                f"train.loggers has {name!r}, which is not installed; `pip install {name}`, or leave it out: "
                "stats.jsonl is always written"
            )


def open_loggers(names: Sequence[str], folder: Path, config: Mapping[str, Any], nimg: int) -> list[RunLogger]:
    """Open loggers by name for a run at `nimg` images. Raises like `check_loggers`."""
    check_loggers(names)
    return [LOGGERS[name](folder, config, nimg) for name in names]
