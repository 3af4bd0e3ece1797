"""report.html: one self-contained page of an evaluation. No script, no network, no other file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from d2g.core.atomic_files import write_atomically
from d2g.core.errors import UserError
from eval.report.gallery import Pictures, Ranking
from eval.report.parts import all_pictures, facts, ranked_pictures, said
from eval.report.style import STYLE
from eval.report.svg import Curve
from eval.report.tables import Latency as Latency
from eval.report.tables import Metric as Metric
from eval.report.tables import curves_section, latency_section, metrics_section, timings_section

MAX_BYTES = 24 * 2**20
"""A page stays below this: what a mail takes and a phone opens."""

SIDES = (256, 192, 128)
"""Thumbnail sides in pixels, tried in turn until the page is small enough."""

# C0 and C1 controls but for tab and newline, and halves of surrogate pairs: no HTML file may hold them.
_UNSPEAKABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


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
        "metrics": ("Metrics" if data.metrics else "Notes", metrics_section(data.metrics, data.notes)),
        "beside": ("Same noise, same prompt", all_pictures(data.beside, side, "Same noise, same prompt")),
        "images": ("Images", all_pictures(data.grids, side, "Images")),
        "ranking": ("Worst and best", "".join(ranked_pictures(ranking, side) for ranking in data.rankings)),
        "nearest": ("Nearest training images", all_pictures(data.nearest, side, "Nearest training images")),
        "curves": ("Curves", curves_section(data.curves)),
        "latency": ("Latency", latency_section(data.latency)),
        "timings": ("Time taken", timings_section(data.timings)),
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
        name: "<br>".join(
            f"{escape(key)} <code>{escape(str(value))}</code>" for key, value in facts.items() if value
        )
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
