"""The best validated point of a run, by the reports in stats.jsonl.

RUN/validation.json says what the validations measure, and since when: only those compare with each other.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from d2g.core.atomic_files import write_atomically
from d2g.core.config import differing
from d2g.core.json_files import read_json

MEASURE_FILE = "validation.json"

SELECTION_METRICS = ("val/fid", "val/e_latent_lpips", "val/psnr")
"""Metrics that select the best point, in order of preference: the first one that a run reports is used."""

HIGHER_IS_BETTER = ("val/psnr",)
"""Selection metrics whose best value is the largest."""


def best_validation(
    lines: Sequence[Mapping[str, float]], saved: Collection[int]
) -> tuple[int, str, float] | None:
    """The best validation among those at the checkpoints `saved`: (images seen, metric name, value).

    lines: validation reports, each with `nimg` and `val/...`. saved: images seen at each checkpoint. The
    earliest one wins a tie. Returns None if no checkpoint was validated.
    """
    name, points = validations([line for line in lines if line["nimg"] in saved])
    if not points:
        return None
    nimg, value = best_of(name, points)
    return nimg, name, value


class MeasureRecord(TypedDict):
    """The content of RUN/validation.json."""

    measure: dict[str, Any]  # the metric, and how it is measured
    since: int  # images seen at the first validation with this measure


def record_measure(folder: Path, measure: Mapping[str, Any], nimg: int) -> list[str]:
    """Record what the validation at `nimg` images measures, before its report is written.

    Returns what differs from the validations before, as texts; [] if they compare with this one.
    """
    before = _recorded_measure(folder)
    # What an older version has not recorded counts as the same.
    changes = [] if before is None else differing({**measure, **before["measure"]}, measure)
    since = 0 if before is None else nimg if changes else min(nimg, before["since"])
    record = MeasureRecord(measure=dict(measure), since=since)
    if record != before:
        write_atomically(folder / MEASURE_FILE, json.dumps(record, indent=1))
    return changes


def comparable_reports(folder: Path, lines: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The reports of a run, without validations whose metric or settings differ from the last one's."""
    record = _recorded_measure(folder)
    since = 0 if record is None else record["since"]
    return [line for line in lines if line["nimg"] >= since or not set(SELECTION_METRICS) & line.keys()]


def _recorded_measure(folder: Path) -> MeasureRecord | None:
    path = folder / MEASURE_FILE
    if not path.is_file():
        return None
    record: MeasureRecord = read_json(path, "delete it", MeasureRecord)
    return record


def validations(lines: Sequence[Mapping[str, float]]) -> tuple[str, list[tuple[int, float]]]:
    """The first of SELECTION_METRICS in these reports, and its finite values as (images seen, value).

    Returns ("", []) for reports without validations.
    """
    for name in SELECTION_METRICS:
        points = [
            (int(line["nimg"]), line[name]) for line in lines if math.isfinite(line.get(name, math.nan))
        ]
        if points:
            return name, points
    return "", []


def best_of(name: str, points: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """The best of several values (images seen, value) of a selection metric; the earliest one wins a tie."""
    sign = -1 if name in HIGHER_IS_BETTER else 1
    return min(points, key=lambda point: (sign * point[1], point[0]))
