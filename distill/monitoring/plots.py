"""Plots of a run: curves as a PNG, and as rows of text with sparklines.

Both are drawn from the lines of stats.jsonl alone, so they work for every run, also after its end.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from d2g.core.atomic_files import write_atomically
from d2g.core.errors import UserError
from distill.monitoring.collapse import Line


@dataclass(frozen=True)
class Panel:
    """One set of axes. `series`: (images, values) by name; `log`: logarithmic y axis."""

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
    ("student's contrast over teacher's", ("latent/contrast",), False),
    ("distance of channel means, in the teacher's standard deviations", ("latent/color",), False),
    ("preview: student's contrast, color distance, and grid over teacher's", ("preview/",), False),
    ("EMA drift", ("ema/",), True),
    ("held-out pairs: E-LatentLPIPS", ("val/e_latent_lpips",), False),
    ("held-out pairs: PSNR, dB", ("val/psnr",), False),
    ("held-out images: FID", ("val/fid",), False),
    ("validation", ("val/",), False),
    ("images per second", ("time/images_per_sec",), False),
    ("share of time waiting for data", ("time/loader_wait",), False),
    ("peak memory, GiB", ("mem/",), False),
)
"""Title of a panel, names of its series (or prefixes, with a trailing slash), logarithmic y axis or not."""


def panels(lines: Sequence[Line]) -> list[Panel]:
    """The panels for which a run's reports have finite values, in a fixed order."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    # A name with a panel of its own does not appear in the panel of its prefix: their scales differ.
    own_panel = {keys[0] for _, keys, _ in _PANELS if len(keys) == 1}
    result = []
    for title, keys, log in _PANELS:
        prefixes = tuple(key for key in keys if key.endswith("/"))
        members = [name for name in names if name in keys]
        members += [name for name in names if name not in own_panel and name.startswith(prefixes)]
        series = {name: _series(lines, name) for name in members}
        series = {name: points for name, points in series.items() if points[0]}
        if series:
            positive = all(value > 0 for _, values in series.values() for value in values)
            result.append(Panel(title, series, log and positive))
    return result


def _series(lines: Sequence[Line], name: str) -> tuple[list[float], list[float]]:
    """Images and finite values of one name."""
    points = [(line["nimg"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
    return [x for x, _ in points], [y for _, y in points]


def plot_health(lines: Sequence[Line], file: Path, title: str = "") -> None:
    """Draw the panels of a run's reports to a PNG file, replaced atomically.

    Raises UserError if there are no reports, or if the file cannot be written.
    """
    from matplotlib.figure import Figure

    drawn_panels = panels(lines)
    if not drawn_panels:
        raise UserError(f"{file.parent}: no reports yet to draw; wait for the first line of stats.jsonl")
    # A grid of up to three columns.
    columns = min(3, len(drawn_panels))
    rows = -(-len(drawn_panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, drawn_panels, strict=False):
        for name, (x, y) in panel.series.items():
            label = name if len(panel.series) > 1 else None
            axis.plot(x, y, linewidth=1, marker="." if len(x) < 30 else None, label=label)
        axis.set_title(panel.title, fontsize=9)
        axis.set_yscale("log" if panel.log else "linear")
        axis.grid(alpha=0.3)
        axis.tick_params(which="both", labelsize=7)
        if len(panel.series) > 1:
            axis.legend(fontsize=5, ncols=2 if len(panel.series) > 6 else 1)
    # Hide the axes that are left over.
    for axis in axes[len(drawn_panels) :]:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=10, parse_math=False)  # a folder may have dollar signs
    figure.supxlabel("images", fontsize=8)
    figure.savefig(png := io.BytesIO(), dpi=110, format="png")
    write_atomically(file, png.getvalue())


@dataclass(frozen=True)
class Row:
    """One series as text. `value`: its last value; `trend`: its curve as a sparkline."""

    panel: str
    name: str
    value: float
    trend: str


def health_rows(lines: Sequence[Line], width: int = 24) -> list[Row]:
    """The panels as rows of text, without the curves of single discriminator heads."""
    return [
        Row(panel.title, name, y[-1], sparkline(y, width))
        for panel in panels(lines)
        for name, (_, y) in panel.series.items()
        if name.count("/") < 2
    ]


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Values as block characters; more than `width` values become means of equal parts."""
    blocks = "▁▂▃▄▅▆▇█"
    count = min(width, len(values))
    cuts = [len(values) * i // count for i in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((value - low) * scale)] for value in means)
