"""eval.report.html: the text of the report, and how headless Chromium renders it."""

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor

from browser import Browser, chromium
from d2g.core.errors import UserError
from d2g.core.seeds import generator
from eval.metrics.nearest import nearest_neighbors
from eval.report.charts import Curve
from eval.report.gallery import Pictures, beside_nearest, rank_images
from eval.report.html import (
    MAX_BYTES,
    THUMBNAIL_SIDES,
    Latency,
    MetricRow,
    ReportData,
    render_report,
    write_report,
)
from eval.report.numbers import format_column, format_value

HOSTILE_PROMPTS = (
    "<script>document.title = 'taken'</script>",
    '"><img src="http://example.com/x.png" onerror="alert(1)">',
    "w" * 400,
    "\u05d7\u05ea\u05d5\u05dc \u05e9\u05d7\u05d5\u05e8 <b>bold</b> & \ud800 \x00 \x1b[31m \U0001f431",
)
"""Prompts that must appear as plain text and must not break the page or the file."""


def smooth_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    rows = torch.rand(count, 3, 4, 4, generator=generator(seed)) * 255
    return torch.nn.functional.interpolate(rows, size=(height, width), mode="bilinear").to(torch.uint8)


def full_report() -> ReportData:
    """The data of a report with every section, every kind of image, and hostile prompts."""
    small, wide, prompts = smooth_images(4, 28, 28), smooth_images(4, 160, 320), list(HOSTILE_PROMPTS)
    training = smooth_images(20, 28, 28, seed=1)
    nearest = nearest_neighbors(small.flatten(1), training.flatten(1).split(6), k=7)
    steps = [(float(i), 1 / (1 + i)) for i in range(700)]
    return ReportData(
        title="Student & <teacher>",
        summary="Measured on `4 images`.",
        protocol="coco2014-30k",
        protocol_sha256="0a" * 32,
        settings={"images": 30_000, "neighbours": (3, 5), "clip_prefix": "", "flip": True},
        sources={"student": "runs/" + "deep/" * 40, "teacher": "<sd15>"},
        models={"features": {"name": "inception", "sha256": "0b" * 32}},
        counts={"images": 30_000, "reference": 40_504},
        notes=["few images: `fid` is biased <upwards>"],
        metrics=[
            MetricRow(
                name="FID",
                values={"student": 9.288, "teacher": 8.6},
                intervals={"student": (9.11, 9.46)},
                better="lower",
            ),
            MetricRow(name="Recall", values={"student": 0.41}, better="higher", note="k = 3"),
        ],
        beside=[
            Pictures(title="Same noise", columns={"student": wide, "teacher": small}, prompts=prompts),
            Pictures(title="Nine", columns={f"step {i}": small for i in range(9)}, notes=["n"] * 4),
        ],
        grids=[
            Pictures(title="Small", columns={"student": small.repeat(5, 1, 1, 1)}),
            Pictures(
                title="Wide", columns={"student": wide}, prompts=prompts, captions={"student": ["c"] * 4}
            ),
        ],
        rankings=[
            rank_images("CLIP score", [0.1, 0.4, 0.2, 0.3], {"student": wide}, prompts, better="higher"),
            rank_images("LPIPS", [1, 4, 2, 3], {"student": small, "teacher": small}, prompts, better="lower"),
        ],
        nearest=[beside_nearest(nearest, small, training, prompts, features="pixel")],
        curves=[
            Curve(
                title="FID against CLIP score",
                x="CLIP score",
                y="FID",
                lines={"student": [(0.3, 12.0), (0.31, 9.5)], "teacher": [(0.29, 14.0), (0.33, 9.0)]},
                labels={"student": ["guidance 1", "guidance 2"]},
            ),
            Curve(title="Losses", x="images", y="loss", lines={"loss/g": steps}),
            Curve(title="Broken", x="images", y="loss", lines={"loss/d": [(0.0, float("nan"))]}),
        ],
        latency=[
            Latency(
                name="teacher", milliseconds=1213.3, parts={"text": 2.0, "UNet": 1201.0, "decoder": 10.0}
            ),
            Latency(name="student", milliseconds=11.2, batch=64, parts={"UNet": 9.1, "decoder": 2.0}),
        ],
        timings={"generate": 120.5, "measure": 60.25},
        environment={"torch": "2.9", "command": "d2g eval run --student runs/gan"},
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, full_report())
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as chromium_browser:
        yield chromium_browser


# Tests in the browser.


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_renders_without_problems(page: Path, browser: Browser, width: int, dark: bool) -> None:
    state = browser.open(page, width=width, dark=dark)
    assert state.problems == []
    assert state.title == "Student & <teacher>" and state.headings[0] == (1, "Student & <teacher>")
    sections = [text for level, text in state.headings if level == 2]
    assert sections == [
        "Metrics", "Same noise, same prompt", "Images", "Worst and best", "Nearest training images", "Curves",
        "Latency", "Time taken", "Setting",
    ]  # fmt: skip
    assert state.images == 4 * 2 + 4 * 9 + 20 + 4 + 4 + 8 + 4 * 8
    for prompt in HOSTILE_PROMPTS[:3]:
        assert prompt in state.text  # as plain text, not as markup
    light = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", light)[0]) < 40) == dark


def test_colors_have_enough_contrast(page: Path, browser: Browser) -> None:
    """WCAG 2: the contrast with the background is at least 4.5 for text and 3 for graphics."""
    ratio = """(name => {
      const probe = document.body.appendChild(document.createElement("i"));
      const light = value => { probe.style.color = value;
        const parts = getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map(Number)
          .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]; };
      const [a, b] = [light(`var(--${name})`), light("var(--paper)")].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05); })"""
    for dark in (False, True):
        browser.open(page, width=800, dark=dark)
        for name in ("ink", "dim", "link", *(f"s{i}" for i in range(8))):
            assert browser.evaluate(f'{ratio}("{name}")') >= 4.5, (name, dark)
        assert (
            browser.evaluate(f'{ratio}("rule")') < 2
        )  # rules have low contrast, which also shows that the ratio is not always high


def test_image_rendering_and_scrolling_of_wide_tables(page: Path, browser: Browser) -> None:
    browser.open(page, width=400)
    rendering = "[...document.images].map(i => [i.naturalWidth, getComputedStyle(i).imageRendering])"
    assert {tuple(pair) for pair in browser.evaluate(rendering)} == {(28, "pixelated"), (256, "auto")}
    count_scrolling = (
        "[...document.querySelectorAll('.wrap')].filter(w => w.scrollWidth > w.clientWidth + 1).length"
    )
    assert browser.evaluate(count_scrolling) > 0
    assert browser.evaluate("getComputedStyle(document.querySelector('.wrap')).overflowX") == "auto"
    browser.open(page, width=400, media="print")
    assert browser.evaluate("getComputedStyle(document.querySelector('.wrap')).overflowX") == "visible"


def test_printing_uses_a_light_background_in_dark_mode(page: Path, browser: Browser) -> None:
    browser.open(page, width=1400, dark=True)
    printed = browser.pdf()
    assert printed.startswith(b"%PDF") and len(printed) > 20_000
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 21, 19)"
    browser.open(page, width=1400, dark=True, media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 251)"


def test_the_browser_reports_every_kind_of_problem(browser: Browser, tmp_path: Path) -> None:
    """The checks of browser.py find each problem of a page that has all of them."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><title>bad</title><h1>a</h1><h3 id=x>b</h3><main>"
        "<img src='data:image/png;base64,AAAA' alt=broken><img src='http://127.0.0.1:9/x.png'>"
        "<table><tr><th>no scope</table><a href='#nowhere'>a</a><i id=x></i>"
        "<div style='width:1500px'>wide</div></main><script>console.error('ouch'); throw Error('oh')</script>"
    )
    problems = " ".join(browser.open(bad, width=1400).problems)
    for kind in (
        "broken_image",
        "no_label",
        "no_scope",
        "broken_link",
        "duplicate_id",
        "outside",
        "overflow",
    ):
        assert f"{kind}:" in problems, kind
    assert all(
        part in problems for part in ("ouch", "thrown:", "request: http://127.0.0.1:9", "headings: levels")
    )


# Tests of the HTML text.


def test_the_page_has_no_scripts_and_loads_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    sources = re.findall(
        r"""\s(?:src|href)\s*=\s*["']([^"']{0,30})""", _without_prompts(text, HOSTILE_PROMPTS)
    )
    assert all(source.startswith(("data:image/", "data:,", "#")) for source in sources)
    tags = _Tags()
    tags.feed(text)
    assert not tags.names & {"script", "iframe", "object", "b"} and "img" in tags.names
    assert not any(name.startswith("on") for name in tags.attributes)
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text) and "\ufffd" in text
    assert page.stat().st_size < 400_000


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names, self.attributes, self.open = set[str](), set[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)


def _without_prompts(text: str, prompts: tuple[str, ...]) -> str:
    from html import escape

    for prompt in prompts:
        text = text.replace(escape(prompt), "")
    return text


def test_a_section_appears_only_if_it_has_data() -> None:
    empty = render_report(ReportData(title="only"))
    assert "<h1>only</h1>" in empty and "<h2" not in empty and "<nav" not in empty
    full_data = full_report()
    section_of = {
        "notes": "Notes", "metrics": "Metrics", "beside": "Same noise, same prompt", "grids": "Images",
        "rankings": "Worst and best", "nearest": "Nearest training images", "curves": "Curves",
        "latency": "Latency", "timings": "Time taken", "settings": "Setting", "models": "Setting",
        "environment": "Setting",
    }  # fmt: skip
    for field in fields(ReportData):
        if field.name == "title":
            continue
        page = render_report(replace(ReportData(title="one"), **{field.name: getattr(full_data, field.name)}))
        sections = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
        assert sections == ([section_of[field.name]] if field.name in section_of else []), field.name
        # The digest is shown only together with the name of the protocol; every other field changes the page.
        assert (page == empty.replace("only", "one")) == (field.name == "protocol_sha256"), field.name
    tags = _Tags()
    tags.feed(render_report(full_data))
    assert tags.open == []


def test_numbers_are_formatted_in_their_cells() -> None:
    text = render_report(full_report())
    cells = (
        r'<th scope="row">FID&nbsp;<abbr title="lower is better">.</abbr></th><td>9.29<small>\[9.11, 9.46\]'
    )
    assert re.search(cells + r"</small></td><td>8.600</td></tr>", text)
    assert re.search(r'Recall&nbsp;.*?<small>k = 3</small></th><td>0.410</td><td><span class="dim"', text)
    assert "30,000 images, 40,504 reference" in text and "0a" * 32 in text
    assert "<td>108\u00d7</td>" in text and "<td>1\u00d7</td>" in text  # 1213.3 ms / 11.2 ms
    assert '<th scope="row">total</th><td>180.8</td>' in text
    # A bar is stacked from parts. The width of a part is its share of the latency of the slowest sampler.
    bars = [
        re.findall(r'class="s(\d)" style="width:([\d.]+)%"', bar) for bar in text.split('class="bar"')[1:]
    ]
    assert bars[0] == [("0", "0.165"), ("1", "98.986"), ("2", "0.824")]  # 2, 1201 and 10 of 1213.3 ms
    assert bars[1] == [("1", "0.750"), ("2", "0.165")]
    assert "Each point is the mean of 3 reports." in text and "No point of this curve is finite." in text
    assert "<dt>neighbours</dt><dd>3, 5</dd>" in text and "<dt>flip</dt><dd>True</dd>" in text


@pytest.mark.parametrize(
    ("value", "interval", "expected"),
    [
        (65.1276, (61.9, 68.4), ("65.1", "[61.9, 68.4]")),
        (0.90154, (0.8979, 0.9052), ("0.9015", "[0.8979, 0.9052]")),
        (12345.6, (12000.0, 12700.0), ("12,346", "[12,000, 12,700]")),
        (-0.012, (-0.03, 0.006), ("\u22120.012", "[\u22120.030, 0.006]")),
        (1.0, (1.0, 1.0), ("1.0000", "[1.0000, 1.0000]")),
        (float("nan"), (0.0, 1.0), ("nan", "")),
        (float("-inf"), None, ("\u2212inf", "")),
        (798.695, None, ("798.7", "")),
        (123456.0, None, ("123,456", "")),
        (1.5e-7, None, ("1.5e-07", "")),
    ],
)
def test_values_are_rounded_by_the_width_of_their_interval(
    value: float, interval: tuple[float, float] | None, expected: tuple[str, str]
) -> None:
    assert format_value(value, interval) == expected


def test_the_numbers_of_a_column_have_equally_many_decimals() -> None:
    assert format_column([798.695, 85.27, 25.004]) == ["798.7", "85.3", "25.0"]
    assert format_column([0.8804, 0.8812]) == ["0.88040", "0.88120"]
    assert format_column([0.9312, 0.9308, 0.88]) == ["0.9312", "0.9308", "0.8800"]
    assert format_column([0.5, 0.0, 0.25]) == ["0.500", "0.000", "0.250"]
    assert (
        format_column([1.0, float("nan")]) == ["1", "nan"]
        and format_column([]) == []
        and format_column([0.0]) == ["0"]
    )


def test_thumbnails_shrink_until_the_page_is_below_the_size_limit(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (1, 3, 300, 300), generator=generator(3), dtype=torch.uint8)
    data = ReportData(title="large", grids=[Pictures(title="noise", columns={"student": noise})])
    sizes = [len(render_report(data, side)) for side in THUMBNAIL_SIDES]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] < MAX_BYTES
    path = tmp_path / "deep" / "report.html"
    for side, size in zip(THUMBNAIL_SIDES, sizes, strict=True):
        write_report(path, data, max_bytes=size)
        assert path.read_text() == render_report(data, side)
    with pytest.raises(UserError, match=r"report\.html would take 0\.\d MiB .* show fewer pictures"):
        write_report(path, data, max_bytes=sizes[-1] - 1)
    assert path.read_text() == render_report(data, THUMBNAIL_SIDES[-1])  # the file is unchanged


def test_rendering_is_deterministic() -> None:
    assert render_report(full_report()) == render_report(full_report())
