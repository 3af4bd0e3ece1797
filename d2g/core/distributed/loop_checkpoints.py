"""Checkpoints of a small training loop in one process, which goes on exactly where it was stopped."""

import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from d2g.core.distributed import checkpoint
from d2g.core.errors import Interrupted
from d2g.core.signals import StopFlag
from d2g.core.transfer import device_of

MINUTES = 3.0
"""Minutes between checkpoints."""


class LoopCheckpoints:
    """Saves a network, its optimizer and torch's random state every few minutes, at the end, and on Ctrl-C.

    Use it as a context manager around the loop, which counts its images in `nimg`. `values`: what else the
    loop keeps from step to step, as torch.save takes it. `seconds`: those of the loop in all starts.
    folder: of the checkpoints; None saves nothing, and Ctrl-C interrupts as it does elsewhere.
    """

    def __init__(
        self, folder: Path | None, label: str, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.folder, self.label, self.model, self.optimizer = folder, label, model, optimizer
        self.nimg, self.values = 0, dict[str, Any]()
        self._stop = StopFlag() if folder is not None else None
        self._started = self._saved = time.monotonic()
        self._earlier_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the loop so far, those of earlier starts included."""
        return self._earlier_seconds + time.monotonic() - self._started

    def __enter__(self) -> Self:
        if self.folder is not None and (newest := checkpoint.latest(self.folder)) is not None:
            newest.load("model", self.model)
            state = newest.state()
            self.optimizer.load_state_dict(state["optimizer"])
            self.nimg, self.values = newest.nimg, state["values"]
            self._earlier_seconds = float(newest.meta["seconds"])
            self._set_random_state(state["random"])
        if self._stop is not None:
            self._stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stop is not None:
            self._stop.__exit__(kind, error, trace)
        if error is None:
            self._save()

    def step_done(self) -> None:
        """Save if it is time. Raises Interrupted, with a checkpoint on disk, after a signal to stop."""
        if self._stop is not None and self._stop:
            path = self._save()
            raise Interrupted(
                f"{self.label} stopped; safe on disk: {path}; run the same command again to go on"
            )
        if time.monotonic() - self._saved > 60 * MINUTES:
            self._save()

    def _save(self) -> Path | None:
        if self.folder is None:
            return None
        state = {
            "optimizer": self.optimizer.state_dict(),
            "random": self._random_state(),
            "values": self.values,
        }
        meta = {"label": self.label, "seconds": self.seconds}
        path = checkpoint.save(
            self.folder, self.nimg, {"model": self.model.state_dict()}, state, meta, keep=1
        )
        self._saved = time.monotonic()
        return path

    def _random_state(self) -> dict[str, torch.Tensor]:
        device = device_of(self.model)
        cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
        return {"cpu": torch.get_rng_state(), **cuda}

    def _set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        device = device_of(self.model)
        torch.set_rng_state(state["cpu"])
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
