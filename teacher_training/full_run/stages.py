"""Pairs and both stages, one after the other, and the time of each part; the demo uses this too."""

import json
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed import process_group
from d2g.core.json_files import read_json
from d2g.core.progress import Progress, quiet
from distill.config.run import DistillConfig
from distill.training.train import train
from pairgen.config import PairConfig
from pairgen.generate import generate_pairs

PART_TITLES = {"pairs": "pairs", "ode": "stage 1", "gan": "stage 2"}
"""Parts of `distill_teacher` and their names among the timings."""


class PartTimes:
    """Seconds by part. With a file they add up over all starts of a run."""

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.seconds = file, dict[str, float]()
        if file is not None and file.is_file():
            self.seconds = read_json(file, f"delete {file}, it holds timings only", dict[str, float])

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block, also of one that is interrupted."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started
            if self.file is not None and process_group.rank() == 0:
                write_atomically(self.file, json.dumps(self.seconds, indent=1))


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
