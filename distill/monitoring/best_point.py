"""The best validated point of a run, by the reports in stats.jsonl."""

import math
from collections.abc import Collection, Mapping, Sequence

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
