"""The numbers of a report as HTML: metrics, latency, stages, curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from eval.report.gallery import Better
from eval.report.parts import column, number, said, shown, table
from eval.report.svg import Curve, bar, legend, line_chart

_ARROWS = {
    "lower": '&nbsp;<abbr title="lower is better">\u2193</abbr>',
    "higher": '&nbsp;<abbr title="higher is better">\u2191</abbr>',
    "": "",
}


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


def metrics_section(metrics: Sequence[Metric], notes: Sequence[str]) -> str:
    """Metrics down, samplers across: reads alike for one sampler and for five."""
    lines = "".join(f"<li>{said(note)}</li>" for note in notes)
    below = f'<ul class="notes">{lines}</ul>' if lines else ""
    if not metrics:
        return below
    samplers = list(dict.fromkeys(name for metric in metrics for name in metric.values))
    rows = []
    for metric in metrics:
        note = f"<br><small>{escape(metric.note)}</small>" if metric.note else ""
        rows.append([escape(metric.name) + _ARROWS[metric.better] + note, *_metric_cells(metric, samplers)])
    intervals = any(metric.intervals for metric in metrics)
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


def latency_section(latency: Sequence[Latency]) -> str:
    """A table of milliseconds, and bars."""
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


def timings_section(timings: Mapping[str, float]) -> str:
    """Seconds per stage, and all together."""
    if not timings:
        return ""
    rows = [[escape(name), f"{seconds:,.1f}"] for name, seconds in timings.items()]
    rows.append(["total", f"{sum(timings.values()):,.1f}"])
    return table(["Stage", "Seconds"], rows, label="Time taken")


def curves_section(curves: Sequence[Curve]) -> str:
    """Charts, each with its labelled points as a table."""
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
