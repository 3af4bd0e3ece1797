"""Pairs and both stages, one after the other; the demo uses this too."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from d2g.core.progress import Progress, quiet
from distill.config.run import DistillConfig
from distill.training.train import train
from pairgen.config import PairConfig
from pairgen.generate import generate_pairs
from teacher_training.times import PartTimes

PART_TITLES = {"pairs": "pairs", "ode": "stage 1", "gan": "stage 2"}
"""Parts of `distill_teacher` and their names among the timings."""


def distill_teacher(
    pairs: PairConfig,
    ode: DistillConfig,
    gan: DistillConfig,
    out: Path,
    times: PartTimes,
    progress: Progress = quiet,
    parts: Collection[str] = tuple(PART_TITLES),
) -> None:
    """Generate pairs in OUT/pairs, then train the stages in OUT/ode and OUT/gan. Call on every rank.

    Each part resumes, and stage 2 starts from stage 1. Raises what `generate_pairs` and `train` raise.
    """
    store = str(out / "pairs")
    runs: dict[str, Callable[[], object]] = {
        "pairs": lambda: generate_pairs(pairs, out / "pairs", progress),
        "ode": lambda: train(replace(ode, pairs=store), out / "ode", progress),
        "gan": lambda: train(replace(gan, pairs=store, init=str(out / "ode")), out / "gan", progress),
    }
    for part, title in PART_TITLES.items():
        if part in parts:
            with times.measure(title):
                runs[part]()
