"""A run folder: config.json before the first step, one JSON line per report, never a config mixed with
another.
"""

import json
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.config import WRITTEN_ANEW, differing, read_object
from d2g.core.distributed import process_group
from d2g.core.distributed.checkpoint import whole_points
from d2g.core.errors import UserError
from d2g.core.png import save_png
from d2g.core.tracking.loggers import Logger, open_loggers

ENDED = "ended.json"
Ending = Literal["done", "minutes", "stopped", "failed"]


class RunLog:
    """Owner of RUN/config.json, RUN/stats.jsonl, RUN/previews and RUN/ended.json. Only rank 0 writes."""

    def __init__(self, folder: Path, config: Mapping[str, Any], ignore: tuple[str, ...] = ()) -> None:
        """Open a run folder. `ignore`: top-level keys that may change between resumes (lengths, intervals).

        Raises UserError when the folder holds a run with another config, naming the keys that differ, or
        checkpoints of nobody knows which. A run that ended before it left anything is no obstacle.
        """
        self.folder, self.config = folder, config
        self.loggers: list[Logger] = []
        self.lines: list[dict[str, float]] | None = None  # of stats.jsonl, once they were read
        path = folder / "config.json"
        if path.is_file():
            old = read_object(path, WRITTEN_ANEW)
            drop = {*ignore}
            keys = differing(
                {k: v for k, v in old.items() if k not in drop},
                {k: v for k, v in config.items() if k not in drop},
            )
            left = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
            if keys and not left <= {path.name, ENDED}:
                raise UserError(
                    f"{folder} holds a run with another config: {', '.join(keys)}; "
                    "give the same settings to resume it, or another --out"
                )
            if not keys:
                return
        elif whole_points(folder / "checkpoints"):
            raise UserError(
                f"{folder} holds checkpoints but no config.json; {WRITTEN_ANEW}, or delete {folder} to begin "
                "anew"
            )
        if process_group.rank() == 0:
            write_atomically(path, json.dumps(config, indent=1))

    def begin(self) -> None:
        """From now on nobody knows how the run ends."""
        if process_group.rank() == 0:
            (self.folder / ENDED).unlink(missing_ok=True)

    def end(self, how: Ending, why: str = "") -> None:
        """Write RUN/ended.json: images at the last report, how the run ended, and why if not of itself."""
        if process_group.rank() == 0:
            lines = self.read()
            facts = {"nimg": int(lines[-1]["nimg"]) if lines else 0, "how": how, "why": why}
            write_atomically(self.folder / ENDED, json.dumps(facts, indent=1))

    def rewind(self, nimg: int) -> None:
        """Drop lines written after the checkpoint that a resumed run starts from."""
        path = self.folder / "stats.jsonl"
        if process_group.rank() == 0 and path.is_file():
            kept = [line for line in read_stats(self.folder) if line["nimg"] <= nimg]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
            self.lines = None

    def attach(self, names: Sequence[str], nimg: int) -> None:
        """Also tell these loggers of `d2g.core.tracking.loggers` from now on; what they hold of later than `nimg` goes."""
        if process_group.rank() == 0:
            self.loggers = open_loggers(names, self.folder, self.config, nimg)

    def write(self, nimg: int, values: Mapping[str, float]) -> None:
        """Append one line of scalars."""
        if process_group.rank() == 0:
            try:
                with open(self.folder / "stats.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps({"nimg": nimg, **values}) + "\n")
            except OSError as error:
                raise UserError(f"cannot write {self.folder / 'stats.jsonl'}: {error.strerror}") from error
            if self.lines is not None:
                self.lines.append({"nimg": nimg, **values})
            for logger in self.loggers:
                logger.write(nimg, values)

    def picture(self, nimg: int, name: str, image: Tensor, text: Mapping[str, str]) -> None:
        """Keep uint8 [3, H, W] as RUN/previews/NAME-NIMG.png, with `text` as its metadata."""
        if process_group.rank() == 0:
            save_png(image, self.folder / "previews" / f"{name}-{nimg:09d}.png", text)
            for logger in self.loggers:
                logger.picture(nimg, name, image)

    def close(self) -> None:
        """Let the loggers finish what they hold back. stats.jsonl needs none of it."""
        for logger in self.loggers:
            logger.close()
        self.loggers = []

    def read(self) -> list[dict[str, float]]:
        """All lines so far. The rank that writes them reads its file once."""
        if process_group.rank() != 0:
            return read_stats(self.folder)
        if self.lines is None:
            self.lines = read_stats(self.folder)
        return list(self.lines)


def read_stats(folder: Path) -> list[dict[str, float]]:
    """The lines of a run folder's stats.jsonl; none when nothing was reported yet.

    A last line that is half there, of a run that writes it now or was killed at it, does not count. Raises
    UserError for any other line that is no JSON object.
    """
    path = folder / "stats.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    if lines and not lines[-1].endswith("}\n"):
        lines.pop()
    found: list[dict[str, float]] = []
    for number, line in enumerate(lines, 1):
        try:
            values: dict[str, float] = json.loads(line)
            values["nimg"] = int(values["nimg"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: line {number} is damaged ({error!r}); delete that line") from error
        found.append(values)
    return found


class Pace:
    """How fast a run is, and what it has cost: measured here, reported beside the losses, decides nothing.

    `before`: the lines of the run so far, for the hours spent before a restart.
    """

    def __init__(self, before: Sequence[Mapping[str, float]], nimg: int, devices: int) -> None:
        self.devices, self.nimg = devices, nimg
        self.hours = max((line.get("time/device_hours", 0.0) for line in before), default=0.0)
        self.waited, self.since = 0.0, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        begun = time.monotonic()
        yield
        self.waited += time.monotonic() - begun

    def report(self, nimg: int) -> dict[str, float]:
        """Since the last report: images per second, and the share of time spent waiting for data. Over all
        starts of the run: device hours. Memory: this process's peak.
        """
        seconds = max(time.monotonic() - self.since, 1e-9)
        self.hours += seconds * self.devices / 3600
        values = {
            "time/images_per_sec": (nimg - self.nimg) / seconds,
            "time/loader_wait": self.waited / seconds,
            "time/device_hours": self.hours,
            "mem/peak_gib": peak_memory_gib(),
        }
        self.nimg, self.waited, self.since = nimg, 0.0, time.monotonic()
        return values


def peak_memory_gib() -> float:
    """Peak memory of this process: CUDA's allocator if in use, else resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
