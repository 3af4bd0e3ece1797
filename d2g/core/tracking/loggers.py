"""TensorBoard and W&B beside stats.jsonl, for those who ask: the door to both."""

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from d2g.core.config import digest, pick
from d2g.core.errors import SettingError, UserError


class Logger(Protocol):
    """Who else is told what stats.jsonl holds."""

    def write(self, nimg: int, values: Mapping[str, float]) -> None:
        """One report."""

    def picture(self, nimg: int, name: str, image: Tensor) -> None:
        """uint8 [3, H, W]."""

    def close(self) -> None:
        """Write out what is held back."""


class TensorBoard:
    """RUN/tensorboard: `tensorboard --logdir RUN`. Steps are images."""

    def __init__(self, folder: Path, config: Mapping[str, Any], nimg: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:  # purge_step: what a killed run wrote after its checkpoint is not shown
            self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=nimg + 1)
        except OSError as error:
            raise UserError(f"cannot write {folder / 'tensorboard'}: {error.strerror or error}") from error
        self.writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```", nimg)

    def write(self, nimg: int, values: Mapping[str, float]) -> None:
        """One scalar each."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, nimg)
        self.writer.flush()

    def picture(self, nimg: int, name: str, image: Tensor) -> None:
        """Under its name."""
        self.writer.add_image(name, image.cpu(), nimg)

    def close(self) -> None:
        """Flush, and close the file."""
        self.writer.close()


class WandB:
    """A W&B run that a restart goes on with. Project, entity and mode come from W&B's own environment
    variables (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline).
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], nimg: int) -> None:
        import wandb

        # A restart finds its run by the folder and the settings, which config.json keeps equal.
        name = digest([str(folder.resolve()), {k: v for k, v in config.items() if k != "length"}])[:16]
        try:
            self.run: Any = wandb.init(
                dir=str(folder), config=dict(config), name=folder.name, id=name, resume="allow"
            )
        except wandb.Error as error:
            first = " ".join(str(error).split())[:200]
            raise UserError(
                f"W&B does not start ({first}); log in, set WANDB_MODE=offline, or leave wandb out of "
                "train.loggers"
            ) from error
        # Steps of their own: W&B drops values of a step before its last, as a resumed run has them.
        self.run.define_metric("nimg")
        self.run.define_metric("*", step_metric="nimg")

    def write(self, nimg: int, values: Mapping[str, float]) -> None:
        """One row."""
        self.run.log({"nimg": nimg, **values})

    def picture(self, nimg: int, name: str, image: Tensor) -> None:
        """Under its name."""
        import wandb

        pixels = image.permute(1, 2, 0).cpu().numpy()
        self.run.log({"nimg": nimg, f"preview/{name}": wandb.Image(pixels)})

    def close(self) -> None:
        """Upload the rest, or leave it in RUN/wandb when offline."""
        self.run.finish()


LOGGERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}
"""By name; each needs the package of that name."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise SettingError for a logger that does not exist, or whose package is not installed."""
    for name in names:
        pick(LOGGERS, name, "logger")
        if find_spec(name) is None:
            raise SettingError(
                f"train.loggers has {name!r}, which is not installed; `pip install {name}`, or leave it out: "
                "stats.jsonl is always written"
            )


def open_loggers(names: Sequence[str], folder: Path, config: Mapping[str, Any], nimg: int) -> list[Logger]:
    """The loggers of these names for a run that stands at `nimg` images. Raises as `check_loggers`."""
    check_loggers(names)
    return [LOGGERS[name](folder, config, nimg) for name in names]
