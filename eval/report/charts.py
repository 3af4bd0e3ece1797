"""Line charts by matplotlib: as SVG inside a report, and as a file for a paper."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from d2g.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Coordinates = tuple[float, float]

SERIES = 8
"""Colors of the style sheet; further lines repeat them with another dash."""
DASHES = ("solid", "dashed", "dotted")
MAX_POINTS = 300
"""Longer lines are averaged in groups of neighbors."""
MAX_MARKERS = 40
"""Lines of up to this many points show each point."""

# Colors that stand for the style sheet's variables in matplotlib's output, so that charts follow the page's
# light or dark colors.
_VARIABLES = {
    "#010203": "var(--ink)",
    "#040506": "var(--dim)",
    "#070809": "var(--rule)",
    **{f"#0a0b{order:02x}": f"var(--s{order})" for order in range(SERIES)},
}
_COLORS = {variable: color for color, variable in _VARIABLES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A line chart. `lines`: points (x, y) in drawing order by name; points that are not finite are gaps.
    `labels`: a label for each point by name (say, its guidance scale); the report shows these as a table too.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[Coordinates]]
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        for name, labels in self.labels.items():
            points = len(self.lines.get(name, ()))
            assert len(labels) == points, f"{self.title}, {name}: {len(labels)} labels, {points} points"

    def has_finite_points(self) -> bool:
        """Whether there is anything to draw."""
        return any(_finite(point) for line in self.lines.values() for point in line)

    def group_size(self) -> int:
        """How many neighboring points of the longest line become one."""
        longest = max((len(line) for name, line in self.lines.items() if name not in self.labels), default=0)
        return math.ceil(longest / MAX_POINTS) if longest else 1


def curve_svg(curve: Curve, prefix: str) -> str:
    """The curve as one <svg> without title and legend, in the page's colors. `prefix` keeps its ids apart
    from those of other charts on the page. The same curve gives the same bytes. Needs one finite point.
    """
    assert curve.has_finite_points(), f"{curve.title}: no finite point"
    import matplotlib
    from matplotlib.figure import Figure

    # Fonts stay text, ids depend on the content alone.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "text.parse_math": False}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        _style_axes(axes, curve)
        colors = [_COLORS[f"var(--s{order})"] for order in range(SERIES)]
        _draw_lines(axes, curve, colors)
        figure.draw_without_rendering()  # fixes where the points lie, which decides where labels find room
        _draw_labels(axes, curve, colors)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), curve, prefix)


def plot_curve(curve: Curve, file: Path) -> None:
    """Write the curve as .png, .pdf or .svg. Raises UserError when the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 3.4), layout="constrained")
    axes = figure.subplots()
    # One line per model, with its labels.
    for name, points in curve.lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.2, label=name)
        for (x, y), label in zip(points, curve.labels.get(name, [""] * len(points)), strict=True):
            axes.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel(curve.x)
    axes.set_ylabel(curve.y)
    axes.grid(alpha=0.3)
    for text in axes.legend(fontsize=8).get_texts():
        text.set_parse_math(False)  # a folder may have dollar signs
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=200)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}; choose another --out") from error


def dash(order: int) -> str:
    """The dash of the line with this number: lines of one color, or printed in gray, stay distinguishable."""
    return DASHES[(order % SERIES + order // SERIES) % len(DASHES)]


def group_means(line: Sequence[Coordinates], size: int) -> list[Coordinates]:
    """Means of `size` neighboring points each; a group with a gap becomes a gap."""
    if size == 1:
        return list(line)
    groups = [line[start : start + size] for start in range(0, len(line), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]


def _style_axes(axes: "Axes", curve: Curve) -> None:
    """Plain axes with separated thousands. The y label is left out where the title above says the same."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    dim, rule = _COLORS["var(--dim)"], _COLORS["var(--rule)"]
    axes.set_xlabel(curve.x, color=dim)
    axes.set_ylabel("" if curve.y == curve.title else curve.y, color=dim)
    axes.grid(axis="y", color=rule, clip_on=False)
    axes.tick_params(color=dim, labelcolor=dim)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(dim)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.7g}".replace("-", "\u2212")))


def _draw_lines(axes: "Axes", curve: Curve, colors: Sequence[str]) -> None:
    """Lines with gaps, and markers where there are few points."""
    for order, (name, line) in enumerate(curve.lines.items()):
        points = line if name in curve.labels else group_means(line, curve.group_size())
        axes.plot(
            [x for x, _ in points],
            [y if _finite((x, y)) else math.nan for x, y in points],
            color=colors[order % SERIES],
            linestyle=dash(order),
            marker="o" if len(points) <= MAX_MARKERS else None,
            markersize=4,
            clip_on=False,  # a clip path would be an id that another chart may hold too
        )


def _draw_labels(axes: "Axes", curve: Curve, colors: Sequence[str]) -> None:
    """Each label beside its point where it hides no point and no other label; the table has them all."""
    points = [axes.transData.transform(p) for line in curve.lines.values() for p in line if _finite(p)]
    boxes: list[tuple[float, float, float, float]] = []  # left, bottom, right, top in pixels
    for order, (name, labels) in enumerate((name, curve.labels.get(name)) for name in curve.lines):
        for point, label in zip(curve.lines[name], labels, strict=True) if labels else ():
            if not _finite(point):
                continue
            x, y = axes.transData.transform(point)
            box = (x + 5, y + 5, x + 7 + 7.0 * len(label), y + 19)
            # Skip a label that would cover something.
            hides_point = any(box[0] < px < box[2] and box[1] < py < box[3] for px, py in points)
            if not hides_point and not any(_overlap(box, other) for other in boxes):
                boxes.append(box)
                color = colors[order % SERIES]
                axes.annotate(label, point, (5, 5), textcoords="offset points", fontsize=8, color=color)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inline(svg: str, curve: Curve, prefix: str) -> str:
    """matplotlib's file as an element of a page: no prolog, no style sheet, own ids, the page's colors."""
    svg = svg[svg.index("<svg") :]
    # Drop what an inline element does not need.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick)_?\w*">', "<g>", svg)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{prefix}-', svg)
    # Colors follow the page's light or dark theme.
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box, "matplotlib writes a viewBox"
    # A title for screen readers in place of the opening tag.
    label = escape(f"{curve.title}: {curve.y} over {curve.x}")
    opening = f'<svg class="chart" role="img" aria-label="{label}" {view_box[0]}>'
    return opening + svg[svg.index(">") + 1 :].strip()


def _finite(point: Coordinates) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])
