"""eval.report.svg: round ticks, labels that hide nothing, gaps that stay gaps."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eval.report.svg import (
    _LETTER,
    HEIGHT,
    LEFT,
    WIDTH,
    Curve,
    bar,
    grouped,
    legend,
    line_chart,
    tick_labels,
    ticks,
)

LINE = [(0.0, 3.0), (1.0, 1.0), (2.0, 2.0), (3.0, 0.5)]
RANGES = st.tuples(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))


def chart(**lines: list[tuple[float, float]]) -> ET.Element:
    return ET.fromstring(line_chart(Curve(title="t", x="images", y="loss", lines=lines)))


def numbers(element: ET.Element) -> list[float]:
    return [float(text) for text in re.findall(r"-?\d+\.?\d*", element.attrib["d"])]


def paths(svg: ET.Element) -> list[ET.Element]:
    return [path for path in svg.iter("path") if "line" in path.attrib["class"].split()]


@given(RANGES)
def test_ticks_are_few_round_and_inside(given_range: tuple[float, float]) -> None:
    low, length = given_range
    high = low + length
    assume(length > 1e-6 * abs(low))  # an axis finer than that would need more digits than a label has
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    slack = 1e-6 * length
    assert all(low - slack <= tick <= high + slack for tick in found)
    mantissa = float(f"{found[1] - found[0]:.2e}".split("e")[0])
    assert mantissa in (1, 2, 2.5, 5)
    assert len(set(tick_labels(found))) == len(found)


def test_tick_labels_are_alike_and_readable() -> None:
    assert tick_labels([0, 5_000, 10_000]) == ["0", "5,000", "10,000"]
    assert tick_labels([-0.5, 0.0, 0.5]) == ["\u22120.5", "0.0", "0.5"]
    assert tick_labels([0.25, 0.5]) == ["0.25", "0.50"]
    assert tick_labels([1e9, 2e9]) == ["1e+09", "2e+09"]
    assert tick_labels([1e-5, 2e-5]) == ["1e-05", "2e-05"]


def test_a_line_goes_where_its_numbers_say() -> None:
    (path,) = paths(chart(a=LINE))
    xs, ys = numbers(path)[::2], numbers(path)[1::2]
    assert len(xs) == len(LINE) and min(xs) == LEFT and max(xs) <= WIDTH and max(ys) <= HEIGHT
    assert [x - xs[0] for x in xs] == pytest.approx([(xs[-1] - xs[0]) * x / 3 for x, _ in LINE], abs=0.2)
    assert ys[0] == min(ys) and ys[3] == max(ys)  # 3.0 is on top, 0.5 at the bottom
    assert (ys[2] - ys[0]) / (ys[1] - ys[0]) == pytest.approx((3 - 2) / (3 - 1), abs=0.01)


def test_gaps_constant_lines_and_single_points() -> None:
    (path,) = paths(chart(a=[(0, 1), (1, math.nan), (2, 2), (3, math.inf), (4, 1), (5, 2)]))
    assert path.attrib["d"].count("M") == 3 and "n" not in path.attrib["d"]
    assert len(list(chart(a=[(0, 7.0), (5, 7.0)]).iter("circle"))) == 2
    assert len(list(chart(a=[(3, 0.0)]).iter("circle"))) == 1
    with pytest.raises(AssertionError, match="no finite point"):
        chart(a=[(math.nan, 1)])
    assert Curve(title="t", x="x", y="y", lines={}).group() == 1


def test_long_lines_are_averaged_and_say_so() -> None:
    line = [(float(i), float(i % 2)) for i in range(1000)]
    curve = Curve(title="t", x="x", y="y", lines={"a": line})
    assert curve.group() == 4
    drawn = grouped(line, 4)
    assert drawn[0] == (1.5, 0.5) and drawn[-1] == (997.5, 0.5) and len(drawn) == 250
    assert grouped(LINE, 1) == LINE
    assert math.isnan(grouped([(0, 1), (1, math.nan)], 2)[0][1])
    svg = ET.fromstring(line_chart(curve))
    assert len(numbers(paths(svg)[0])) == 500 and not list(svg.iter("circle"))


def test_labels_hide_no_point_and_no_other_label() -> None:
    line = [(0.9 + 0.01 * i, 30.0 + (i - 3) ** 2) for i in range(8)]
    near = [(x + 0.001, y + 0.5) for x, y in line]  # so near that not every label finds room
    names = [f"guidance {i}" for i in range(8)]
    curve = Curve(title="t", x="CLIP", y="FID", lines={"a": line, "b": near}, labels={"a": names, "b": names})
    svg = ET.fromstring(line_chart(curve))
    labels = [text for text in svg.iter("text") if "label" in text.attrib["class"]]
    boxes = [(float(t.attrib["x"]), float(t.attrib["y"]) - 10, 6.0 * len(t.text or ""), 12.0) for t in labels]
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in svg.iter("circle")]
    assert 4 <= len(labels) < 16 and len(circles) == 16
    for i, (x, y, w, h) in enumerate(boxes):
        assert LEFT <= x and x + w <= WIDTH and 0 <= y
        assert not any(x < cx < x + w and y < cy < y + h for cx, cy in circles)
        for x2, y2, w2, h2 in boxes[:i]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_labels_must_be_as_many_as_points() -> None:
    with pytest.raises(AssertionError, match="1 labels, 4 points"):
        Curve(title="t", x="x", y="y", lines={"a": LINE}, labels={"a": ["one"]})


def test_lines_differ_without_colour_and_names_are_escaped() -> None:
    names = [f"<{i}>" for i in range(10)]
    svg = chart(**dict.fromkeys(names, LINE))
    looks = [(p.attrib["class"], p.attrib.get("stroke-dasharray")) for p in paths(svg)]
    assert len(set(looks)) == 10 and len({dash for _, dash in looks[:3]}) == 3
    text = legend(names)
    assert text.count("<li>") == 10 and "&lt;3&gt;" in text and "<3>" not in text
    assert legend(["a"]) == "" and legend([], boxes=True) == "" and "<rect" in legend(["a"], boxes=True)


def test_bars_are_as_long_as_their_parts() -> None:
    rects = list(ET.fromstring(bar([(0, 1.0), (2, 3.0)], longest=8.0)).iter("rect"))
    assert [(r.attrib["class"], r.attrib.get("x"), r.attrib["width"]) for r in rects] == [
        ("s0", "0.000", "12.500"),
        ("s2", "12.500", "37.500"),
    ]


def test_ticks_stay_inside_and_clear_of_the_axis_title() -> None:
    line = [(960_000.0, 0.91565), (1_000_000.0, 0.9167)]
    curve = Curve(title="Score over training", x="images", y="Score", lines={"student": line})
    svg = ET.fromstring(line_chart(curve))
    ticks_up = [text for text in svg.iter("text") if text.attrib["class"] == "end"]
    assert ticks_up and max(len(text.text or "") for text in ticks_up) == 7
    assert all(float(t.attrib["x"]) - _LETTER * len(t.text or "") > 18 for t in ticks_up), (
        "the title ends there"
    )
    across = [t for t in svg.iter("text") if t.attrib["class"] == "mid" and "x" in t.attrib]
    assert "1,000,000" in [text.text for text in across]
    assert all(float(t.attrib["x"]) + _LETTER * len(t.text or "") / 2 < WIDTH for t in across)
    assert "Score" in [text.text for text in svg.iter("text")]
    alone = ET.fromstring(line_chart(Curve(title="Score", x="images", y="Score", lines={"student": line})))
    assert "Score" not in [text.text for text in alone.iter("text")]
