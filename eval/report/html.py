"""report.html: one self-contained page of an evaluation. No script, no network, no other file.

The page is the template `report.html.jinja` with `style.css` inside; here are its data and what it computes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path

from d2g.core.atomic_files import write_atomically
from d2g.core.errors import UserError
from eval.protocols.metric import Better
from eval.report.charts import Curve, curve_svg, dash
from eval.report.gallery import PIXEL_ART, Pictures, Ranking, thumbnail
from eval.report.numbers import arrow, format_column, format_number, format_setting, format_value

MAX_BYTES = 24 * 2**20
"""A page stays below this: what a mail takes and a phone opens."""

THUMBNAIL_SIDES = (256, 192, 128)
"""Thumbnail sides in pixels, tried in turn until the page is small enough."""

# C0 and C1 controls but for tab and newline, and halves of surrogate pairs: no HTML file may hold them.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricRow:
    """One metric of one or more samplers. `intervals`: 95 %, (low, high), by sampler. `note` explains it."""

    name: str
    values: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    better: Better = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Milliseconds per image of a sampler, end to end, and of its parts where they were measured."""

    name: str
    milliseconds: float
    batch: int = 1
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """All that a report may show. Only `title` is required; each other section appears when it has data.

    `sources`: what each sampler is. `settings`: the protocol's fields. `models`: facts of each network, as in
    `EvalResult.models`. `timings`: seconds per stage. `environment`: versions, hardware, command.
    """

    title: str
    summary: str = ""
    protocol: str = ""
    protocol_sha256: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    metrics: Sequence[MetricRow] = ()
    beside: Sequence[Pictures] = ()
    grids: Sequence[Pictures] = ()
    rankings: Sequence[Ranking] = ()
    nearest: Sequence[Pictures] = ()
    curves: Sequence[Curve] = ()
    latency: Sequence[Latency] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def write_report(path: Path, data: ReportData, *, max_bytes: int = MAX_BYTES) -> None:
    """Write the page with thumbnails as large as `max_bytes` allows. Raises UserError when even the smallest
    make it too large, or the file cannot be written.
    """
    for side in THUMBNAIL_SIDES:
        page = render_report(data, side)
        size = len(page.encode())
        if size <= max_bytes:
            return write_atomically(path, page)
    raise UserError(
        f"{path.name} would take {size / 2**20:.1f} MiB with pictures of {THUMBNAIL_SIDES[-1]} px; expected "
        f"at most {max_bytes / 2**20:.1f}; show fewer pictures"
    )


def render_report(data: ReportData, side: int = THUMBNAIL_SIDES[0]) -> str:
    """The page as text, with thumbnails of at most `side` pixels. The same data give the same text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    # The template, with undefined names as errors.
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    environment.filters["code"] = lambda text: Markup(_mark_code(text))
    environment.filters["small"] = _is_small
    # Columns in the order in which the metrics name the samplers.
    samplers = list(dict.fromkeys(name for metric in data.metrics for name in metric.values))
    latency = data.latency
    page = environment.get_template("report.html.jinja").render(
        data=data,
        style=Markup((folder / "style.css").read_text(encoding="utf-8")),
        samplers=samplers,
        has_intervals=any(metric.intervals for metric in data.metrics),
        cells=partial(_metric_cells, samplers=samplers),
        arrow=arrow,
        number=format_number,
        setting=format_setting,
        thumbnail=lambda image: thumbnail(image, side),
        curve_svg=lambda curve, prefix: Markup(curve_svg(curve, prefix)),
        dash=dash,
        labeled_points=_labeled_points,
        parts=list(dict.fromkeys(part for entry in latency for part in entry.parts)),
        fastest=min((entry.milliseconds for entry in latency), default=0.0),
        slowest=max((max(entry.milliseconds, sum(entry.parts.values())) for entry in latency), default=0.0),
    )
    return _FORBIDDEN.sub("\ufffd", page) + "\n"


def _mark_code(text: str) -> str:
    """Escaped text in which `code` became an element."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _is_small(block: Pictures) -> bool:
    """Whether all images of a gallery keep their pixels, shown enlarged."""
    return all(max(image.shape[-2:]) <= PIXEL_ART for images in block.columns.values() for image in images)


def _metric_cells(metric: MetricRow, samplers: Sequence[str]) -> list[tuple[str, str]]:
    """(value, interval) as text by sampler, ("", "") where it was not measured. Values without an interval,
    which would say how many digits count, all have the same decimals.
    """
    texts = dict(zip(metric.values, format_column(list(metric.values.values())), strict=True))
    cells = []
    for name in samplers:
        interval = metric.intervals.get(name)
        cells.append(format_value(metric.values[name], interval) if interval else (texts.get(name, ""), ""))
    return cells


def _labeled_points(curve: Curve) -> list[tuple[str, str, str]]:
    """(name, x, y) of the labeled points: what the chart shows, to read and copy."""
    points = [point for name in curve.labels for point in curve.lines[name]]
    names = [f"{name}, {label}" for name, labels in curve.labels.items() for label in labels]
    x, y = (format_column([point[axis] for point in points]) for axis in (0, 1))
    return list(zip(names, x, y, strict=True))
