"""A run folder: config.json before the first step, one JSON line per report, never a config mixed with
another.
"""

import json
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core import dist
from core.checkpoint import write_atomically
from core.config import differing
from core.errors import UserError


class RunLog:
    """Owner of RUN/config.json and RUN/stats.jsonl. Only rank 0 writes."""

    def __init__(self, folder: Path, config: Mapping[str, Any], ignore: tuple[str, ...] = ()) -> None:
        """Open a run folder. `ignore`: top-level keys that may change between resumes (lengths, intervals).

        Raises UserError when the folder holds a run with another config, naming the keys that differ.
        """
        self.folder = folder
        path = folder / "config.json"
        if path.is_file():
            old = json.loads(path.read_text())
            drop = {*ignore}
            keys = differing(
                {k: v for k, v in old.items() if k not in drop},
                {k: v for k, v in config.items() if k not in drop},
            )
            if keys:
                raise UserError(
                    f"{folder} holds a run with another config: {', '.join(keys)}; "
                    "give the same settings to resume it, or another --out"
                )
        elif dist.rank() == 0:
            write_atomically(path, json.dumps(config, indent=1))

    def rewind(self, nimg: int) -> None:
        """Drop lines written after the checkpoint that a resumed run starts from."""
        path = self.folder / "stats.jsonl"
        if dist.rank() == 0 and path.is_file():
            whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in whole if json.loads(line)["nimg"] <= nimg]
            write_atomically(path, "".join(line + "\n" for line in kept))

    def write(self, nimg: int, values: Mapping[str, float]) -> None:
        """Append one line of scalars."""
        if dist.rank() == 0:
            try:
                with open(self.folder / "stats.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps({"nimg": nimg, **values}) + "\n")
            except OSError as error:
                raise UserError(f"cannot write {self.folder / 'stats.jsonl'}: {error.strerror}") from error

    def read(self) -> list[dict[str, float]]:
        """All lines so far."""
        return read_stats(self.folder)


def read_stats(folder: Path) -> list[dict[str, float]]:
    """The lines of a run folder's stats.jsonl; none when nothing was reported yet."""
    path = folder / "stats.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def peak_memory_gib() -> float:
    """Peak memory of this process: CUDA's allocator if in use, else resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
