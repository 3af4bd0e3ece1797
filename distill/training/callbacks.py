"""Callbacks after each step: reports, checkpoints and validation, and the decision when to stop.

`train` calls the callbacks in this order after every step, on every rank.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from d2g.core.claims import FolderOwner
from d2g.core.distributed import process_group
from d2g.core.distributed.sharded_checkpoint import Writer
from d2g.core.errors import LostFolder
from d2g.core.signals import StopFlag
from d2g.core.tracking.run_directory import Pace
from distill.config.run import TrainConfig
from distill.training.logit_stats import LogitStats
from distill.training.microbatch import MicroBatch
from distill.training.monitor import RunMonitor
from distill.training.state import State


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """A finished step. The flags are the same on every rank."""

    nimg: int
    finished: bool
    """Whether the run has seen all its images or reached its time limit."""
    interrupted: bool
    """Whether any rank received Ctrl-C or SIGTERM."""
    writing: bool
    """Whether any rank is still writing the previous checkpoint."""
    due: bool
    """Whether a report, a checkpoint or a validation follows, or the run ends here."""
    terms: Mapping[str, Tensor]
    microbatches: Sequence[MicroBatch]


class Callback(Protocol):
    """Called after each training step."""

    def after_step(self, event: StepEvent) -> None:
        """Called on every rank after every step."""


class StopControl:
    """Decides, together with all ranks, whether the run continues.

    Before anything is written, the ranks exchange their flags and wait for the result. After other steps, the
    exchange runs in the background and its result is read one step later, so that no rank waits.
    """

    def __init__(self, options: TrainConfig, stop: StopFlag, writer: Writer, owner: FolderOwner) -> None:
        self.options, self.stop, self.writer, self.owner = options, stop, writer, owner
        self.started = time.monotonic()
        self.exchange: Callable[[], dict[str, bool]] | None = None

    def event(self, nimg: int, terms: Mapping[str, Tensor], microbatches: Sequence[MicroBatch]) -> StepEvent:
        """Build the event of the step that ended at `nimg` images. Call it on every rank.

        Raises LostFolder if another run has taken over the folder.
        """
        # This process's flags: whether another run owns the folder, and whether the time limit is over.
        new_owner = self.owner.lost_to() if process_group.rank() == 0 else ""
        minutes = self.options.minutes
        late = minutes is not None and time.monotonic() - self.started > 60 * minutes

        # Combine the flags, so that all processes decide alike: the flag of one counts for all.
        options = self.options
        intervals = (options.report_images, options.checkpoint_images, options.validate_images)
        due = nimg >= options.images or any(
            passed_interval(nimg, options.batch_size, interval) for interval in intervals if interval
        )
        local = {
            "stop": bool(self.stop),
            "late": late,
            "writing": not self.writer.done,
            "lost": bool(new_owner),
        }
        flags = self._agree(local, due)

        # Stop before writing into a folder that another run owns now.
        if flags["lost"]:
            raise LostFolder(
                f"{process_group.gather_objects(new_owner)[0]}, trains in {self.owner.folder} now, because "
                "this run was suspended; nothing more was written here"
            )
        return StepEvent(
            nimg=nimg,
            finished=nimg >= self.options.images or flags["late"],
            interrupted=flags["stop"],
            writing=flags["writing"],
            due=due or flags["late"] or flags["stop"],
            terms=terms,
            microbatches=microbatches,
        )

    def _agree(self, local: dict[str, bool], at_once: bool) -> dict[str, bool]:
        """Combine the flags of all ranks: a flag is set if any rank has set it.

        With `at_once`, exchange this step's flags and wait. Otherwise start the exchange and return the flags
        of the previous step, unless one of them stops the run: then exchange this step's flags at once, too.
        """
        if not process_group.joined():
            return local
        previous = {"stop": False, "late": False, "writing": True, "lost": False}
        if self.exchange is not None:
            previous, self.exchange = self.exchange(), None
        if at_once or previous["stop"] or previous["late"] or previous["lost"]:
            return process_group.any_of(local)
        self.exchange = process_group.start_any_of(local)
        return previous


class ReportCallback:
    """Writes a line of stats.jsonl, a preview, and warnings about a collapse at each report interval."""

    def __init__(
        self, options: TrainConfig, monitor: RunMonitor, logit_stats: LogitStats, pace: Pace, writer: Writer
    ) -> None:
        self.options, self.monitor, self.logit_stats = options, monitor, logit_stats
        self.pace, self.writer = pace, writer
        self.latest: dict[str, Tensor] = {}  # latest value of each term since the last report

    def after_step(self, event: StepEvent) -> None:
        """Collect the step's loss terms, and report if a report is due."""
        if not event.writing:
            self.writer.finish()
        self.latest |= event.terms
        if passed_interval(event.nimg, self.options.batch_size, self.options.report_images) or event.finished:
            statistics = self.logit_stats.report(event.microbatches)
            self.monitor.report({**self.latest, **statistics}, self.pace, self.writer)
            self.latest.clear()


class CheckpointCallback:
    """Saves the training state at each checkpoint interval and at the end."""

    def __init__(self, options: TrainConfig, monitor: RunMonitor, state: State, writer: Writer) -> None:
        self.options, self.monitor, self.state, self.writer = options, monitor, state, writer
        self.saved_at = -1

    def after_step(self, event: StepEvent) -> None:
        """Save if a checkpoint is due. It comes before validation, so that SIGTERM saves first."""
        due = passed_interval(event.nimg, self.options.batch_size, self.options.checkpoint_images)
        if due or event.finished or event.interrupted:
            self.writer.finish()  # the previous checkpoint may be the best one, so it must be complete
            self.save(event.nimg)

    def save(self, nimg: int) -> None:
        """Save a checkpoint at `nimg` images, unless it exists. The best checkpoint is not deleted."""
        if nimg == self.saved_at:
            return
        self.writer.spare = self.monitor.checkpoints_to_keep()
        self.state.save(self.writer)
        self.saved_at = nimg


class ValidationCallback:
    """Validates at each validation interval, and saves a checkpoint if it is the best so far."""

    def __init__(self, monitor: RunMonitor, checkpoints: CheckpointCallback, writer: Writer) -> None:
        self.monitor, self.checkpoints, self.writer = monitor, checkpoints, writer

    def after_step(self, event: StepEvent) -> None:
        """Validate if it is due. If the run ends here, wait until the last checkpoint is written."""
        if not event.interrupted and self.monitor.validation_due(event.finished):
            self.writer.finish()  # the checkpoint that is being written may be the best one
            if self.monitor.validate():
                self.checkpoints.save(event.nimg)
        if event.finished or event.interrupted:
            self.writer.finish()


def passed_interval(nimg: int, size: int, interval: int) -> bool:
    """Whether the last step, of `size` images up to `nimg`, has passed a multiple of `interval`."""
    return nimg // interval > (nimg - size) // interval
