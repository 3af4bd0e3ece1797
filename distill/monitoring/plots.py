"""How the two networks do: the panel that shows a run's reports.

Everything is made from the lines of stats.jsonl, so that a panel can be drawn of any run, also after its end.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from d2g.core.atomic_files import write_atomically
from d2g.core.errors import UserError

Line = Mapping[str, float]


# The panel.


@dataclass(frozen=True)
class Panel:
    """One set of axes: series by name, each (images, values)."""

    title: str
    series: dict[str, tuple[list[float], list[float]]]
    log: bool = False


_PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("losses", ("loss/",), True),
    ("D's mean logits", ("logit/real", "logit/fake", "logit/mismatched", "logit/student"), False),
    ("D's logits of real rows, per head", ("logit/real/",), False),
    ("D's logits of the mixed batch's generated rows, per head", ("logit/fake/",), False),
    ("D's logits of mismatched rows, per head", ("logit/mismatched/",), False),
    ("D's logits of the student, per head", ("logit/student/",), False),
    ("D's order of real and student (AUC)", ("d/auc",), False),
    ("R1: squared gradient norm", ("loss/r1",), True),
    ("gradient norms", ("grad/",), True),
    ("student's spread over teacher's", ("latent/spread",), False),
    ("EMA drift", ("ema/",), True),
    ("held-out pairs: E-LatentLPIPS", ("val/e_latent_lpips",), False),
    ("held-out pairs: PSNR, dB", ("val/psnr",), False),
    ("held-out images: FID", ("val/fid",), False),
    ("validation", ("val/",), False),
    ("images per second", ("time/images_per_sec",), False),
    ("share of time waiting for data", ("time/loader_wait",), False),
    ("peak memory, GiB", ("mem/",), False),
)
"""Title; names of its series, or what they start with (a trailing slash); logarithmic or not."""


def panels(lines: Sequence[Line]) -> list[Panel]:
    """The panels that a run's reports have something for, in a fixed order."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    found = []
    alone = {starts[0] for _, starts, _ in _PANELS if len(starts) == 1}  # scales of their own
    for title, starts, log in _PANELS:
        own = [n for n in names if n in starts]
        own += [
            n for n in names if n not in alone and any(s.endswith("/") and n.startswith(s) for s in starts)
        ]
        series = {n: _series(lines, n) for n in own}
        if series := {n: s for n, s in series.items() if s[0]}:
            found.append(Panel(title, series, log and all(v > 0 for _, vs in series.values() for v in vs)))
    return found


def _series(lines: Sequence[Line], name: str) -> tuple[list[float], list[float]]:
    points = [(line["nimg"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
    return [x for x, _ in points], [y for _, y in points]


def plot_health(lines: Sequence[Line], file: Path, title: str = "") -> None:
    """Draw the panels of a run's reports as a PNG, under a temporary name first.

    Raises UserError without reports, or when the file cannot be written.
    """
    from matplotlib.figure import Figure

    shown = panels(lines)
    if not shown:
        raise UserError(f"{file.parent}: no reports yet to draw; wait for the first line of stats.jsonl")
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, shown, strict=False):
        for name, (x, y) in panel.series.items():
            label = name if len(panel.series) > 1 else None
            axis.plot(x, y, linewidth=1, marker="." if len(x) < 30 else None, label=label)
        axis.set_title(panel.title, fontsize=9)
        axis.set_yscale("log" if panel.log else "linear")
        axis.grid(alpha=0.3)
        axis.tick_params(which="both", labelsize=7)
        if len(panel.series) > 1:
            axis.legend(fontsize=5, ncols=2 if len(panel.series) > 6 else 1)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("images", fontsize=8)
    figure.savefig(drawn := io.BytesIO(), dpi=110, format="png")
    write_atomically(file, drawn.getvalue())


# As text.


@dataclass(frozen=True)
class Row:
    """One value of the panel: its last, and how it went, as a line of blocks."""

    panel: str
    name: str
    value: float
    trend: str


def health_rows(lines: Sequence[Line], width: int = 24) -> list[Row]:
    """The panels as rows of text, the heads of D left to the picture."""
    return [
        Row(panel.title, name, y[-1], sparkline(y, width))
        for panel in panels(lines)
        for name, (_, y) in panel.series.items()
        if name.count("/") < 2
    ]


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Values as blocks from lowest to highest; means of equal parts where there are more than `width`."""
    blocks = "▁▂▃▄▅▆▇█"
    count = min(width, len(values))
    cuts = [len(values) * i // count for i in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((value - low) * scale)] for value in means)
