"""eval.report.charts: coordinates of lines, gaps at values that are not finite, escaped names."""

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from d2g.core.errors import UserError
from eval.report.charts import MAX_POINTS, SERIES, Curve, curve_svg, dash, group_means, plot_curve

LINE = [(0.0, 3.0), (1.0, 1.0), (2.0, 2.0), (3.0, 0.5)]


def parse_svg(curve: Curve) -> ET.Element:
    return ET.fromstring(curve_svg(curve, "c1"))


def lines_of(svg: ET.Element) -> list[ET.Element]:
    """The paths of the series: those in a series color outside of marker definitions."""
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


def loss_curve(**lines: list[tuple[float, float]]) -> Curve:
    return Curve(title="t", x="images", y="loss", lines=lines)


def test_coordinates_of_a_line_are_linear_in_its_values() -> None:
    svg = parse_svg(loss_curve(a=LINE))
    (path,) = lines_of(svg)
    points = coordinates(path)
    assert len(points) == len(LINE)
    width, height = (float(number) for number in svg.attrib["viewBox"].split()[2:])
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    xs, ys = zip(*points, strict=True)
    assert [x - xs[0] for x in xs] == pytest.approx([(xs[-1] - xs[0]) * x / 3 for x, _ in LINE], abs=0.01)
    assert ys[0] == min(ys) and ys[3] == max(ys)  # 3.0 is on top, 0.5 at the bottom
    assert (ys[2] - ys[0]) / (ys[1] - ys[0]) == pytest.approx((3 - 2) / (3 - 1), abs=0.001)


def test_values_that_are_not_finite_constant_lines_and_single_points() -> None:
    gaps = [(0.0, 1.0), (1.0, math.nan), (2.0, 2.0), (3.0, math.inf), (4.0, 1.0), (5.0, 2.0)]
    svg = parse_svg(loss_curve(a=gaps))
    assert "nan" not in ET.tostring(svg, "unicode") and "inf" not in ET.tostring(svg, "unicode")
    assert len(markers(svg)) == 4
    assert sum(len(coordinates(path)) for path in lines_of(svg)) <= 4
    assert len(markers(parse_svg(loss_curve(a=[(0, 7.0), (5, 7.0)])))) == 2
    assert len(markers(parse_svg(loss_curve(a=[(3, 0.0)])))) == 1
    with pytest.raises(AssertionError, match="no finite point"):
        parse_svg(loss_curve(a=[(math.nan, 1)]))
    assert loss_curve().group_size() == 1 and not loss_curve().has_finite_points()


def test_long_lines_are_averaged_in_groups() -> None:
    line = [(float(i), float(i % 2)) for i in range(1000)]
    assert loss_curve(a=line).group_size() == 4 and 1000 / 4 <= MAX_POINTS
    means = group_means(line, 4)
    assert means[0] == (1.5, 0.5) and means[-1] == (997.5, 0.5) and len(means) == 250
    assert group_means(LINE, 1) == LINE
    assert math.isnan(group_means([(0, 1), (1, math.nan)], 2)[0][1])
    assert not markers(parse_svg(loss_curve(a=line)))


def test_labels_do_not_overlap_points_or_other_labels() -> None:
    line = [(0.9 + 0.01 * i, 30.0 + (i - 3) ** 2) for i in range(8)]
    near = [(x + 0.001, y + 0.5) for x, y in line]  # so near that some labels have no room
    names = [f"guidance {i}" for i in range(8)]
    labeled = Curve(
        title="t", x="CLIP", y="FID", lines={"a": line, "b": near}, labels={"a": names, "b": names}
    )
    svg = parse_svg(labeled)
    texts = [text for text in svg.iter("text") if (text.text or "").startswith("guidance")]
    places = [
        tuple(map(float, re.findall(r"translate\(([\d.]+) ([\d.]+)\)", text.attrib["transform"])[0]))
        if "translate" in text.attrib.get("transform", "")
        else (float(text.attrib["x"]), float(text.attrib["y"]))
        for text in texts
    ]
    circles = [(float(use.attrib["x"]), float(use.attrib["y"])) for use in markers(svg)]
    assert 4 <= len(places) < 16 and len(circles) == 16
    width, height = 4.0, 8.0  # of a letter, in units of the chart
    for i, (x, y) in enumerate(places):
        label_width = width * len(texts[i].text or "")
        assert not any(x < cx < x + label_width and y - height < cy < y for cx, cy in circles)
        for j, (other_x, other_y) in enumerate(places[:i]):
            other_width = width * len(texts[j].text or "")
            apart = x + label_width <= other_x or other_x + other_width <= x or abs(y - other_y) >= height
            assert apart, (texts[i].text, texts[j].text)


def test_each_point_needs_a_label() -> None:
    with pytest.raises(AssertionError, match="1 labels, 4 points"):
        Curve(title="t", x="x", y="y", lines={"a": LINE}, labels={"a": ["one"]})


def test_lines_can_be_told_apart_by_color_and_dash() -> None:
    styles_of_lines = [(order % SERIES, dash(order)) for order in range(2 * SERIES)]
    assert len(set(styles_of_lines)) == 2 * SERIES and len({dash(order) for order in range(3)}) == 3
    svg = parse_svg(loss_curve(**{str(order): LINE for order in range(10)}))
    styles = [path.attrib["style"] for path in lines_of(svg)]
    assert len(styles) == 10 and len(set(styles)) == 10


def test_colors_come_from_the_page_and_ids_are_unique() -> None:
    first, second = curve_svg(loss_curve(a=LINE), "c1"), curve_svg(loss_curve(a=LINE), "c2")
    assert not re.search(r"(?:fill|stroke): #", first), "a fixed color that a dark page cannot change"
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r'href="#([^"]+)"', first)) <= ids[0]
    assert "url(" not in first and "<style" not in first and "xlink" not in first


def test_names_are_escaped_and_rendering_is_deterministic() -> None:
    attack = Curve(title='<b>"', x="$x_1$ <i>", y="<script>", lines={"a": [(0.0, 1.0), (1e6, 2.0)]})
    text = curve_svg(attack, "c1")
    assert text == curve_svg(attack, "c1")
    assert "<script" not in text and "<i>" not in text and "<b>" not in text
    svg = ET.fromstring(text)
    assert svg.attrib["aria-label"] == '<b>": <script> over $x_1$ <i>'
    texts = {element.text for element in svg.iter("text")}
    assert {"$x_1$ <i>", "<script>", "1,000,000"} <= texts
    single = parse_svg(Curve(title="Score", x="images", y="Score", lines={"student": LINE}))
    assert "Score" not in {element.text for element in single.iter("text")}  # the title of the chart says it


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_plot_curve_writes_a_file(suffix: str, tmp_path: Path) -> None:
    plot_curve(loss_curve(a=LINE, b=LINE), tmp_path / "deep" / f"curve.{suffix}")
    assert (tmp_path / "deep" / f"curve.{suffix}").stat().st_size > 1000
    with pytest.raises(UserError, match=r"cannot write .*; choose another --out"):
        plot_curve(loss_curve(a=LINE), Path("/proc/none") / f"curve.{suffix}")


def test_a_folder_with_dollar_signs_is_no_formula(tmp_path: Path) -> None:
    plot_curve(loss_curve(**{"runs/$MODEL_$SEED": LINE}), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").is_file()
