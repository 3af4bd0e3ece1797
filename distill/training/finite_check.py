"""Stop a run at the first loss or gradient that is not finite, before an update uses it.

The check runs on the device and disables the optimizers there. The host reads its result one step later, or
before anything is written, so that it does not wait for the device within a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from d2g.core.distributed.sharded_checkpoint import Writer
from d2g.core.transfer import HostCopy
from distill.training.data import bad_pairs
from distill.training.failure import not_finite_error, write_failure
from distill.training.logit_stats import LogitStats
from distill.training.state import State
from pairgen.store.hdf5 import PairBatch


@dataclass
class _Step:
    """Facts of a step for the error message."""

    number: int
    nimg: int
    batch: PairBatch
    updates: list[tuple[str, Tensor, dict[str, Tensor]]] = field(default_factory=list)
    """Of each update: the name of the gradient, its norm, and the loss terms so far."""
    logits: LogitStats = field(init=False)
    stopped: HostCopy = field(init=False)


class FiniteCheck:
    """Disables all updates from the first loss or gradient on that is not finite, then stops the run.

    Call `begin_step` and `end_step` around each step, on every rank.
    """

    def __init__(
        self,
        run: Path,
        pairs: str,
        state: State,
        logit_stats: LogitStats,
        writer: Writer,
        device: torch.device,
    ) -> None:
        self.run, self.pairs, self.state = run, pairs, state
        self.logit_stats, self.writer = logit_stats, writer
        self.stopped = torch.zeros((), device=device)
        self.step: _Step | None = None
        self.previous: _Step | None = None

    def begin_step(self, batch: PairBatch) -> None:
        """Begin the step that trains on `batch`."""
        self.step = _Step(self.state.steps, self.state.nimg, batch)

    def stop_updates(self, name: str, norm: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        """Return 1 if `norm`, or an earlier one, is not finite, else 0: an fp32 scalar on the device.

        name: "grad/g" or "grad/d". norm: the gradient norm, equal on all ranks, which is NaN if the loss is
        not finite (`step.one_or_nan`). terms: the step's loss terms, for the error message.
        """
        assert self.step is not None
        self.step.updates.append((name, norm, dict(terms)))
        self.stopped = torch.maximum(self.stopped, norm.isfinite().logical_not().float())
        return self.stopped

    def end_step(self, at_once: bool) -> None:
        """Raise FloatingPointError if updates were disabled in the previous step; with `at_once` in this one.

        It writes RUN/failure first.
        """
        assert self.step is not None
        self.step.logits, self.step.stopped = self.logit_stats.copy(), HostCopy(self.stopped)
        for step in (self.previous, self.step if at_once else None):
            if step is not None and bool(step.stopped.read()):
                self._fail(step)
        self.previous = None if at_once else self.step

    def _fail(self, step: _Step) -> None:
        name, norm, terms = next(update for update in step.updates if not torch.isfinite(update[1]))
        self.writer.finish()  # a checkpoint that is being written stays usable
        write_failure(
            self.run,
            step=step.number,
            nimg=step.nimg,
            gradient=name,
            norm=norm,
            pairs=step.batch.index.tolist(),
            terms=terms,
            logits=step.logits.latest(),
        )
        bad = bad_pairs(step.batch, self.pairs) if self.pairs else ""
        raise not_finite_error(name, norm, terms, step.nimg, self.run, bad)
