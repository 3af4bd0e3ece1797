"""report.html: one self-contained page of an evaluation. No script, no network, no other file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from core.checkpoint import write_atomically
from core.errors import UserError
from eval.gallery import Better, Pictures, Ranking
from eval.html_parts import all_pictures, column, facts, number, ranked_pictures, said, shown, table
from eval.style import STYLE
from eval.svg import Curve, bar, legend, line_chart

MAX_BYTES = 24 * 2**20
"""A page stays below this: what a mail takes and a phone opens."""

SIDES = (256, 192, 128)
"""Thumbnail sides in pixels, tried in turn until the page is small enough."""

_ARROWS = {
    "lower": '&nbsp;<abbr title="lower is better">\u2193</abbr>',
    "higher": '&nbsp;<abbr title="higher is better">\u2191</abbr>',
    "": "",
}
# C0 and C1 controls but for tab and newline, and halves of surrogate pairs: no HTML file may hold them.
_UNSPEAKABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One measure of one or more samplers. `intervals`: 95 %, (low, high). `note` says what it is."""

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
    """All that a report may show. Only `title` must be there; each other part appears when it is given.

    `sources`: what each sampler is. `settings`: the protocol's fields. `models`: per network its facts, as in
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
    metrics: Sequence[Metric] = ()
    beside: Sequence[Pictures] = ()
    grids: Sequence[Pictures] = ()
    rankings: Sequence[Ranking] = ()
    nearest: Sequence[Pictures] = ()
    curves: Sequence[Curve] = ()
    latency: Sequence[Latency] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def write_report(path: Path, data: ReportData, *, max_bytes: int = MAX_BYTES) -> None:
    """Write the page, with thumbnails as large as `max_bytes` allows. Raises UserError when none are small
    enough, or the file cannot be written.
    """
    for side in SIDES:
        page = render(data, side)
        size = len(page.encode())
        if size <= max_bytes:
            return write_atomically(path, page)
    raise UserError(
        f"{path.name} would take {size / 2**20:.1f} MiB with pictures of {SIDES[-1]} px; expected at most "
        f"{max_bytes / 2**20:.1f}; show fewer pictures"
    )


def render(data: ReportData, side: int = SIDES[0]) -> str:
    """The page's text, with thumbnails of at most `side` pixels."""
    sections = {
        "metrics": ("Metrics" if data.metrics else "Notes", _metrics(data)),
        "beside": ("Same noise, same prompt", all_pictures(data.beside, side, "Same noise, same prompt")),
        "images": ("Images", all_pictures(data.grids, side, "Images")),
        "ranking": ("Worst and best", "".join(ranked_pictures(ranking, side) for ranking in data.rankings)),
        "nearest": ("Nearest training images", all_pictures(data.nearest, side, "Nearest training images")),
        "curves": ("Curves", _curves(data.curves)),
        "latency": ("Latency", _latency(data.latency)),
        "timings": ("Time taken", _timings(data.timings)),
        "setting": ("Setting", _setting(data)),
    }
    there = {key: part for key, part in sections.items() if part[1]}
    links = "".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in there.items())
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        # No prompt can ever run or load a thing, whatever escaping may miss.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f'<link rel="icon" href="data:,"><title>{escape(data.title)}</title><style>{STYLE}</style></head>',
        f"<body><main><header><h1>{escape(data.title)}</h1>",
        f"<p>{said(data.summary)}</p>" if data.summary else "",
        _top(data),
        f'<nav aria-label="Sections">{links}</nav>' if len(there) > 1 else "",
        "</header>",
        *(
            f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>'
            f"{body}</section>"
            for key, (title, body) in there.items()
        ),
        "</main></body></html>\n",
    ]
    return _UNSPEAKABLE.sub("\ufffd", "\n".join(part for part in parts if part))


# Numbers.


def _metrics(data: ReportData) -> str:
    """Metrics down, samplers across: reads alike for one sampler and for five."""
    notes = "".join(f"<li>{said(note)}</li>" for note in data.notes)
    below = f'<ul class="notes">{notes}</ul>' if notes else ""
    if not data.metrics:
        return below
    samplers = list(dict.fromkeys(name for metric in data.metrics for name in metric.values))
    rows = []
    for metric in data.metrics:
        note = f"<br><small>{escape(metric.note)}</small>" if metric.note else ""
        rows.append([escape(metric.name) + _ARROWS[metric.better] + note, *_metric_cells(metric, samplers)])
    intervals = any(metric.intervals for metric in data.metrics)
    caption = "In brackets: 95 % intervals." if intervals else ""
    head = ["Metric", *(escape(name) for name in samplers)]
    return table(head, rows, label="Metrics", caption=caption, kind="metrics") + below


def _metric_cells(metric: Metric, samplers: Sequence[str]) -> list[str]:
    """Values and intervals; without intervals to say how many digits count, the row's decimals are alike."""
    texts = dict(zip(metric.values, column(list(metric.values.values())), strict=True))
    cells = dict.fromkeys(samplers, '<span class="dim" title="not measured">\u2013</span>')
    for name, value in metric.values.items():
        interval = metric.intervals.get(name)
        text, low_high = shown(value, interval) if interval else (texts[name], "")
        cells[name] = f"{text}<small>{low_high}</small>" if low_high else text
    return list(cells.values())


def _latency(latency: Sequence[Latency]) -> str:
    if not latency:
        return ""
    names = list(dict.fromkeys(part for one in latency for part in one.parts))
    fastest = min(one.milliseconds for one in latency)
    longest = max(max(one.milliseconds, sum(one.parts.values())) for one in latency)
    rows = [
        [
            escape(one.name),
            str(one.batch),
            *(number(one.parts[name]) if name in one.parts else "\u2013" for name in names),
            number(one.milliseconds),
            f"{one.milliseconds / fastest:.3g}\u00d7",
        ]
        for one in latency
    ]
    head = ["Sampler", "Batch", *(escape(name) for name in names), "End to end", "Relative"]
    bars = "".join(
        f"<div>{escape(one.name)}, batch {one.batch}: {number(one.milliseconds)} ms</div>"
        + bar([(names.index(n), ms) for n, ms in one.parts.items()] or [(0, one.milliseconds)], longest)
        for one in latency
    )
    return (
        table(head, rows, label="Latency", caption="Milliseconds per image.")
        + legend(names, boxes=True)
        + f'<div class="bars">{bars}</div>'
    )


def _timings(timings: Mapping[str, float]) -> str:
    if not timings:
        return ""
    rows = [[escape(name), f"{seconds:,.1f}"] for name, seconds in timings.items()]
    rows.append(["total", f"{sum(timings.values()):,.1f}"])
    return table(["Stage", "Seconds"], rows, label="Time taken")


# Curves.


def _curves(curves: Sequence[Curve]) -> str:
    figures = "".join(
        f'<figure class="{"labelled" if curve.labels else "plain"}">{_curve(curve)}</figure>'
        for curve in curves
    )
    return f'<div class="charts">{figures}</div>' if figures else ""


def _curve(curve: Curve) -> str:
    title = f"<h3>{escape(curve.title)}</h3>"
    if not curve.finite():
        return f"{title}<p>No point of this curve is finite.</p>"
    below = [curve.text] if curve.text else []
    if curve.group() > 1:
        below.append(f"Each point is the mean of {curve.group()} reports.")
    caption = f"<figcaption>{said(' '.join(below))}</figcaption>" if below else ""
    chart = legend(list(curve.lines)) + line_chart(curve) + caption
    return f"<div>{title}{chart}</div>{_points(curve)}"


def _points(curve: Curve) -> str:
    """The labelled points as a table: what the chart shows, to be read and copied."""
    points = [point for name in curve.labels for point in curve.lines[name]]
    if not points:
        return ""
    names = [escape(f"{name}, {label}") for name, labels in curve.labels.items() for label in labels]
    across, up = (column([point[axis] for point in points]) for axis in (0, 1))
    rows = zip(names, across, up, strict=True)
    return table(["Point", escape(curve.x), escape(curve.y)], rows, label=curve.title)


# Facts.


def _top(data: ReportData) -> str:
    """What was measured, in a few lines at the top."""
    lines = {}
    if data.protocol:
        digest = (
            f" <small><code>{escape(data.protocol_sha256)}</code></small>" if data.protocol_sha256 else ""
        )
        lines["Protocol"] = escape(data.protocol) + digest
    for name, source in data.sources.items():
        lines[name] = escape(source)
    if data.counts:
        lines["Counts"] = ", ".join(f"{number:,} {escape(name)}" for name, number in data.counts.items())
    return facts(lines)


def _setting(data: ReportData) -> str:
    """What a reader needs to get the same numbers."""
    models = {
        name: "<br>".join(f"{escape(key)} <code>{escape(str(value))}</code>" for key, value in facts.items())
        for name, facts in data.models.items()
    }
    blocks = {
        "Protocol": facts({key: escape(_plain(value)) for key, value in data.settings.items()}, "settings"),
        "Networks and reference": facts(models),
        "Environment": facts({key: escape(value) for key, value in data.environment.items()}),
    }
    return "".join(f"<h3>{title}</h3>{block}" for title, block in blocks.items() if block)


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_plain(part) for part in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value) or "none"
