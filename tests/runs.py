"""What tests of whole runs compare: states in checkpoints and reported losses."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.distributed import checkpoint, sharded_checkpoint
from d2g.core.tracking.run_directory import read_stats
from distill.config.run import DistillConfig
from distill.training.train import train


def state_at(run: Path, images: int) -> dict[str, Tensor]:
    return sharded_checkpoint.read(checkpoint.open_checkpoint(run / "checkpoints" / f"{images:09d}"))


def equal(a: Any, b: Any) -> bool:
    """Whether two nested states are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def losses(run: Path) -> list[dict[str, float]]:
    kept = ("loss/", "grad/", "logit/", "latent/", "gan/")
    return [{k: v for k, v in line.items() if k.startswith(kept)} for line in read_stats(run)]


def assert_resumes_exactly(config: DistillConfig, shorter: DistillConfig, folder: Path) -> None:
    """An unbroken run, and one that ends early and goes on: equal weights, optimizer states and reports."""
    for run, configs in (("once", (config,)), ("twice", (shorter, config))):
        for each in configs:
            train(each, folder / run)
    once, twice = (state_at(folder / run, config.train.images) for run in ("once", "twice"))
    assert equal(once, twice)
    assert losses(folder / "once") == losses(folder / "twice") and "loss/r1" in losses(folder / "once")[0]
