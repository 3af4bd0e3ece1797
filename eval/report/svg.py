"""Line charts and bars as inline SVG: they take the page's colours, light or dark, and print sharply."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom

WIDTH, HEIGHT = 480.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 76.0, 32.0, 12.0, 46.0  # room for ticks like 0.91650 and 1,000,000
SERIES = 8  # colours of the style sheet; further lines repeat them with another dash
_DASHES = ("", "7 3", "2 3")
_MOST = 300  # points of a line; more are averaged in groups
_MARKED = 40  # up to this many points of a line are marked
_LETTER = 6.8  # mean width of a letter of a label


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A line chart. `lines`: per name its points (x, y) in drawing order; points that are not finite are
    gaps. `labels`: per name a label for each point (say, its guidance scale); such a curve gets a table too.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[Point]]
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        for name, labels in self.labels.items():
            points = len(self.lines.get(name, ()))
            assert len(labels) == points, f"{self.title}, {name}: {len(labels)} labels, {points} points"

    def finite(self) -> list[Point]:
        """All points that can be drawn."""
        return [point for line in self.lines.values() for point in line if _finite(point)]

    def group(self) -> int:
        """How many points of the longest line become one."""
        longest = max((len(line) for name, line in self.lines.items() if name not in self.labels), default=0)
        return math.ceil(longest / _MOST) if longest else 1


def line_chart(curve: Curve) -> str:
    """The curve as one <svg>, without title and legend. Needs one finite point at least."""
    points = curve.finite()
    assert points, f"{curve.title}: no finite point"
    x_ticks, x_low, x_high = _axis([x for x, _ in points], pad=0.03 if curve.labels else 0.0)
    y_ticks, y_low, y_high = _axis([y for _, y in points], pad=0.05)

    def place(point: Point) -> Point:
        across = (point[0] - x_low) / (x_high - x_low)
        up = (point[1] - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'aria-label="{escape(curve.title)}: {escape(curve.y)} over {escape(curve.x)}">'
    ]
    for text, y in zip(tick_labels(y_ticks), (place((x_low, tick))[1] for tick in y_ticks), strict=True):
        parts.append(f'<path class="grid" d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"/>')
        parts.append(f'<text class="end" x="{LEFT - 7:g}" y="{y + 4:.1f}">{text}</text>')
    for text, x in zip(tick_labels(x_ticks), (place((tick, y_low))[0] for tick in x_ticks), strict=True):
        parts.append(f'<path class="axis" d="M{x:.1f} {HEIGHT - BOTTOM:g}v4"/>')
        parts.append(f'<text class="mid" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18:g}">{text}</text>')
    parts.append(f'<path class="axis" d="M{LEFT:g} {HEIGHT - BOTTOM:g}H{WIDTH - RIGHT:g}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="mid" x="{middle[0]:g}" y="{HEIGHT - 8:g}">{escape(curve.x)}</text>')
    turned = f'transform="translate(13 {middle[1]:g}) rotate(-90)"'
    if curve.y != curve.title:  # which stands above, and has more room
        parts.append(f'<text class="mid" {turned}>{escape(curve.y)}</text>')
    for order, (name, line) in enumerate(curve.lines.items()):
        drawn = line if name in curve.labels else grouped(line, curve.group())
        parts += _line(order, name, drawn, [place(point) for point in drawn])
    parts += _labels(curve, place)
    return "".join([*parts, "</svg>"])


def _line(order: int, name: str, line: Sequence[Point], placed: Sequence[Point]) -> list[str]:
    """Runs of finite points as polylines, and marks with their values where there are few."""
    runs: list[list[Point]] = [[]]
    for point, at in zip(line, placed, strict=True):
        if _finite(point):
            runs[-1].append(at)
        elif runs[-1]:
            runs.append([])
    path = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in run) for run in runs if run)
    parts = [f'<path class="line s{order % SERIES}"{dash(order)} d="{path}"/>']
    if len(line) <= _MARKED:
        parts += [
            f'<circle class="dot s{order % SERIES}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">'
            f"<title>{escape(name)}: {value[0]:.6g}, {value[1]:.6g}</title></circle>"
            for value, (x, y) in zip(line, placed, strict=True)
            if _finite(value)
        ]
    return parts


def _labels(curve: Curve, place: Callable[[Point], Point]) -> list[str]:
    """Each label beside its point where it hides no line and no other label; the table has them all."""
    if not curve.labels:
        return []
    boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in map(place, curve.finite())]
    for line in curve.lines.values():
        placed = [place(point) for point in line if _finite(point)]
        boxes += [(x, y, x, y) for a, b in pairwise(placed) for x, y in _along(a, b)]
    parts = []
    for order, name in enumerate(curve.lines):
        labels = curve.labels.get(name, ())
        for point, label in zip(curve.lines[name] if labels else (), labels, strict=True):
            spot = _spot(place(point), _LETTER * len(label), boxes) if _finite(point) else None
            if spot:
                boxes.append(spot)
                at = f'x="{spot[0]:.1f}" y="{spot[3] - 2:.1f}"'
                parts.append(f'<text class="label s{order % SERIES}" {at}>{escape(label)}</text>')
    return parts


def _spot(point: Point, wide: float, taken: Sequence[Box]) -> Box | None:
    """Free room for a label beside a point: right or left of it, above or below."""
    x, y = point
    for left, base in ((x + 6, y - 5), (x + 6, y + 14), (x - 6 - wide, y - 5), (x - 6 - wide, y + 14)):
        box = (left, base - 10, left + wide, base + 2)
        inside = left >= LEFT and left + wide <= WIDTH and base >= TOP and base <= HEIGHT - BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            return box
    return None


def _along(a: Point, b: Point) -> list[Point]:
    """Points every few units of a straight line."""
    steps = math.ceil(math.dist(a, b) / 5)
    return [(a[0] + (b[0] - a[0]) * n / steps, a[1] + (b[1] - a[1]) * n / steps) for n in range(1, steps)]


def legend(names: Sequence[str], boxes: bool = False) -> str:
    """Names of lines (or of a bar's parts: `boxes`) beside their colours, as HTML; nothing for one line."""
    if len(names) < 2 and not boxes:
        return ""
    items = []
    for order, name in enumerate(names):
        line = f'<path class="line s{order % SERIES}"{dash(order)} d="M0 4H24"/>'
        box = f'<rect class="s{order % SERIES}" width="24" height="8"/>'
        swatch = f'<svg viewBox="0 0 24 8" aria-hidden="true">{box if boxes else line}</svg>'
        items.append(f"<li>{swatch}{escape(name)}</li>")
    if not items:
        return ""
    return f'<ul class="legend">{"".join(items)}</ul>'


def bar(parts: Sequence[tuple[int, float]], longest: float) -> str:
    """One stacked bar: (colour, length) parts, drawn against the longest bar's length."""
    rects, start = [], 0.0
    for order, length in parts:
        wide = 100 * length / longest
        rects.append(f'<rect class="s{order % SERIES}" x="{start:.3f}" width="{wide:.3f}" height="10"/>')
        start += wide
    box = 'viewBox="0 0 100 10" preserveAspectRatio="none"'
    return f'<svg class="bar" {box} aria-hidden="true">{"".join(rects)}</svg>'


def dash(order: int) -> str:
    """The stroke's dashes: lines that lie on one another or print grey can still be told apart."""
    pattern = _DASHES[(order % SERIES + order // SERIES) % len(_DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def grouped(line: Sequence[Point], group: int) -> list[Point]:
    """Means of `group` neighbouring points each; groups with a gap become a gap."""
    if group == 1:
        return list(line)
    parts = [line[start : start + group] for start in range(0, len(line), group)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) within [low, high], about five of them."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [count * step for count in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """As many decimals as the step needs, alike for all; powers of ten where that would be long."""
    largest = max(abs(value) for value in values)
    step = values[1] - values[0] if len(values) > 1 else largest or 1.0
    if largest >= 1e7 or 0 < largest < 1e-4:
        return [f"{value:.3g}" for value in values]
    decimals = next(d for d in range(9) if abs(round(step, d) - step) <= 1e-6 * step)
    return [f"{value + 0.0:,.{decimals}f}".replace("-", "\u2212") for value in values]


def _axis(values: Sequence[float], pad: float) -> tuple[list[float], float, float]:
    """Ticks and range of an axis that holds all values with `pad` of its length free at both ends."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        half = abs(low) / 10 or 0.5
        low, high = low - half, high + half
    free = pad * (high - low)
    low, high = low - free, high + free
    return ticks(low, high), low, high


def _finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
