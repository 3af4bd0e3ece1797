"""eval.report.charts: lines go where their numbers say, gaps stay gaps, names are escaped."""

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from d2g.core.errors import UserError
from eval.report.charts import MAX_POINTS, SERIES, Curve, curve_svg, dash, group_means, plot_curve

LINE = [(0.0, 3.0), (1.0, 1.0), (2.0, 2.0), (3.0, 0.5)]


def chart(curve: Curve) -> ET.Element:
    return ET.fromstring(curve_svg(curve, "c1"))


def lines_of(svg: ET.Element) -> list[ET.Element]:
    """The drawn lines: paths in a series color outside of marker definitions."""
    definitions = {path for defs in svg.iter("defs") for path in defs.iter("path")}
    return [
        path
        for path in svg.iter("path")
        if "stroke: var(--s" in path.get("style", "") and path not in definitions
    ]


def coordinates(path: ET.Element) -> list[tuple[float, float]]:
    numbers = [float(text) for text in re.findall(r"-?\d+\.?\d*", path.attrib["d"])]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def markers(svg: ET.Element) -> list[ET.Element]:
    return [use for use in svg.iter("use") if "var(--s" in use.get("style", "")]


def curve(**lines: list[tuple[float, float]]) -> Curve:
    return Curve(title="t", x="images", y="loss", lines=lines)


def test_a_line_goes_where_its_numbers_say() -> None:
    svg = chart(curve(a=LINE))
    (path,) = lines_of(svg)
    points = coordinates(path)
    assert len(points) == len(LINE)
    width, height = (float(number) for number in svg.attrib["viewBox"].split()[2:])
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    xs, ys = zip(*points, strict=True)
    assert [x - xs[0] for x in xs] == pytest.approx([(xs[-1] - xs[0]) * x / 3 for x, _ in LINE], abs=0.01)
    assert ys[0] == min(ys) and ys[3] == max(ys)  # 3.0 is on top, 0.5 at the bottom
    assert (ys[2] - ys[0]) / (ys[1] - ys[0]) == pytest.approx((3 - 2) / (3 - 1), abs=0.001)


def test_gaps_constant_lines_and_single_points() -> None:
    gaps = [(0.0, 1.0), (1.0, math.nan), (2.0, 2.0), (3.0, math.inf), (4.0, 1.0), (5.0, 2.0)]
    svg = chart(curve(a=gaps))
    assert "nan" not in ET.tostring(svg, "unicode") and "inf" not in ET.tostring(svg, "unicode")
    assert len(markers(svg)) == 4
    assert sum(len(coordinates(path)) for path in lines_of(svg)) <= 4
    assert len(markers(chart(curve(a=[(0, 7.0), (5, 7.0)])))) == 2
    assert len(markers(chart(curve(a=[(3, 0.0)])))) == 1
    with pytest.raises(AssertionError, match="no finite point"):
        chart(curve(a=[(math.nan, 1)]))
    assert curve().group_size() == 1 and not curve().has_finite_points()


def test_long_lines_are_averaged_and_say_so() -> None:
    line = [(float(i), float(i % 2)) for i in range(1000)]
    assert curve(a=line).group_size() == 4 and 1000 / 4 <= MAX_POINTS
    means = group_means(line, 4)
    assert means[0] == (1.5, 0.5) and means[-1] == (997.5, 0.5) and len(means) == 250
    assert group_means(LINE, 1) == LINE
    assert math.isnan(group_means([(0, 1), (1, math.nan)], 2)[0][1])
    assert not markers(chart(curve(a=line)))


def test_labels_hide_no_point_and_no_other_label() -> None:
    line = [(0.9 + 0.01 * i, 30.0 + (i - 3) ** 2) for i in range(8)]
    near = [(x + 0.001, y + 0.5) for x, y in line]  # so near that not every label finds room
    names = [f"guidance {i}" for i in range(8)]
    labeled = Curve(
        title="t", x="CLIP", y="FID", lines={"a": line, "b": near}, labels={"a": names, "b": names}
    )
    svg = chart(labeled)
    texts = [text for text in svg.iter("text") if (text.text or "").startswith("guidance")]
    places = [
        tuple(map(float, re.findall(r"translate\(([\d.]+) ([\d.]+)\)", text.attrib["transform"])[0]))
        if "translate" in text.attrib.get("transform", "")
        else (float(text.attrib["x"]), float(text.attrib["y"]))
        for text in texts
    ]
    circles = [(float(use.attrib["x"]), float(use.attrib["y"])) for use in markers(svg)]
    assert 4 <= len(places) < 16 and len(circles) == 16
    width, height = 4.0, 8.0  # of a letter, in the chart's units
    for i, (x, y) in enumerate(places):
        wide = width * len(texts[i].text or "")
        assert not any(x < cx < x + wide and y - height < cy < y for cx, cy in circles)
        for j, (other_x, other_y) in enumerate(places[:i]):
            other_wide = width * len(texts[j].text or "")
            apart = x + wide <= other_x or other_x + other_wide <= x or abs(y - other_y) >= height
            assert apart, (texts[i].text, texts[j].text)


def test_labels_must_be_as_many_as_points() -> None:
    with pytest.raises(AssertionError, match="1 labels, 4 points"):
        Curve(title="t", x="x", y="y", lines={"a": LINE}, labels={"a": ["one"]})


def test_lines_differ_without_color() -> None:
    looks = [(order % SERIES, dash(order)) for order in range(2 * SERIES)]
    assert len(set(looks)) == 2 * SERIES and len({dash(order) for order in range(3)}) == 3
    svg = chart(curve(**{str(order): LINE for order in range(10)}))
    styles = [path.attrib["style"] for path in lines_of(svg)]
    assert len(styles) == 10 and len(set(styles)) == 10


def test_colors_are_the_pages_and_ids_are_the_charts_own() -> None:
    first, second = curve_svg(curve(a=LINE), "c1"), curve_svg(curve(a=LINE), "c2")
    assert not re.search(r"(?:fill|stroke): #", first), "a color that no dark page can change"
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r'href="#([^"]+)"', first)) <= ids[0]
    assert "url(" not in first and "<style" not in first and "xlink" not in first


def test_names_are_text_and_the_same_curve_gives_the_same_bytes() -> None:
    attack = Curve(title='<b>"', x="$x_1$ <i>", y="<script>", lines={"a": [(0.0, 1.0), (1e6, 2.0)]})
    text = curve_svg(attack, "c1")
    assert text == curve_svg(attack, "c1")
    assert "<script" not in text and "<i>" not in text and "<b>" not in text
    svg = ET.fromstring(text)
    assert svg.attrib["aria-label"] == '<b>": <script> over $x_1$ <i>'
    texts = {element.text for element in svg.iter("text")}
    assert {"$x_1$ <i>", "<script>", "1,000,000"} <= texts
    alone = chart(Curve(title="Score", x="images", y="Score", lines={"student": LINE}))
    assert "Score" not in {element.text for element in alone.iter("text")}  # it stands above the chart


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_curve_as_a_file(suffix: str, tmp_path: Path) -> None:
    plot_curve(curve(a=LINE, b=LINE), tmp_path / "deep" / f"curve.{suffix}")
    assert (tmp_path / "deep" / f"curve.{suffix}").stat().st_size > 1000
    with pytest.raises(UserError, match=r"cannot write .*; choose another --out"):
        plot_curve(curve(a=LINE), Path("/proc/none") / f"curve.{suffix}")
