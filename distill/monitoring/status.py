"""Read the status of a run from its folder, during or after training, for `d2g distill watch`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from d2g.core.config import RESTORE_CONFIG_HINT
from d2g.core.distributed.checkpoint import complete_points
from d2g.core.errors import UserError
from d2g.core.json_files import read_json_object
from d2g.core.tracking.run_directory import ENDED, read_stats
from distill.monitoring.best_point import comparable_reports
from distill.monitoring.collapse import Line, findings
from distill.monitoring.plots import Row, health_rows

PATIENCE = 600.0
"""Seconds without a report after which a run counts as silent; five times the usual gap if that is longer."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Status of a run at one moment."""

    out: str
    stage: str
    nimg: int
    images: int
    """Planned number of images."""
    finished: bool
    ended: str | None
    """How the run ended: done, minutes, stopped or failed. None while it runs, or if it was killed."""
    why: str
    """Why it failed or was stopped; "" otherwise."""
    silent_minutes: int | None
    """Minutes since the last report, if that is longer than usual."""
    seconds_left: float | None
    """Estimate from the last images per second; None if the run makes no progress."""
    values: dict[str, float]
    """Latest value of each key of stats.jsonl."""
    warnings: list[str]
    checkpoint: str | None
    preview: str | None
    rows: list[Row]

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.finished or self.ended is not None

    def to_json(self) -> dict[str, Any]:
        """All fields except `rows`. Values that are not finite become null, since JSON has no NaN."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "rows"}
        finite = {k: v if abs(v) < float("inf") else None for k, v in self.values.items()}
        return {**data, "values": finite}


def read_status(folder: Path, width: int = 24, now: float | None = None) -> RunStatus:
    """Read the status of a run in `folder`.

    width: characters per sparkline. now: seconds since 1970; the default is the current time. Raises
    UserError for a folder that holds no run.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no run (no config.json); give the --out of `d2g distill`")

    # The run's config: stage and length.
    config = read_json_object(path, RESTORE_CONFIG_HINT)
    try:
        stage, length = str(config["stage"]), {**config["train"], **config.get("length", {})}
        images = int(length["images"])
        if images < 1:
            raise ValueError(f"images is {images}")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{folder} holds no run ({type(error).__name__}: {error}); give the --out of `d2g distill`"
        ) from error

    # Its progress, its speed, and whether it still runs.
    lines = read_stats(folder)
    latest = {"nimg": 0.0} | {name: value for line in lines for name, value in line.items()}
    nimg, rate = int(latest["nimg"]), latest.get("time/images_per_sec", 0.0)
    ended, why = _ending(folder)
    finished, silent = nimg >= images, None
    if not (finished or ended):
        silent = _silent_minutes(folder, lines, time.time() if now is None else now)
    progressing = finished or not (ended or silent)

    # Its checkpoints and previews.
    points = complete_points(folder / "checkpoints")
    previews = sorted((folder / "previews").glob("*.png"), key=lambda path: path.stem.rpartition("-")[2])
    return RunStatus(
        out=str(folder),
        stage=stage,
        nimg=nimg,
        images=images,
        finished=finished,
        ended=ended,
        why=why,
        silent_minutes=silent,
        seconds_left=max(0, images - nimg) / rate if rate > 0 and progressing else None,
        values={k: v for k, v in latest.items() if k != "nimg"},
        warnings=[finding.text for finding in findings(comparable_reports(folder, lines))],
        checkpoint=str(folder / "checkpoints" / f"{points[-1]:09d}") if points else None,
        preview=str(previews[-1]) if previews else None,
        rows=health_rows(lines, width),
    )


def _ending(folder: Path) -> tuple[str | None, str]:
    """How a run ended, and why; (None, "") while it runs and for a killed run, which records nothing."""
    path = folder / ENDED
    if not path.is_file():
        return None, ""
    facts = read_json_object(path, "delete it: it only says how the run ended")
    return str(facts.get("how")), " ".join(str(facts.get("why") or "").split())


def _silent_minutes(folder: Path, lines: Sequence[Line], now: float) -> int | None:
    """Minutes since the last report or the start, or None if that is not unusually long."""
    files = [path for name in ("config.json", "stats.jsonl") if (path := folder / name).is_file()]
    silent = now - max(path.stat().st_mtime for path in files)
    return int(silent // 60) if silent > max(PATIENCE, 5 * usual_gap(lines)) else None


def usual_gap(lines: Sequence[Line]) -> float:
    """Median seconds between a run's last twenty reports; 0 with fewer than two reports."""
    rates = [(line["nimg"], rate) for line in lines if (rate := line.get("time/images_per_sec", 0.0)) > 0]
    gaps = [(nimg - before) / rate for (before, _), (nimg, rate) in pairwise(rates[-21:])]
    return median(gaps) if gaps else 0.0
