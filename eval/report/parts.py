"""The parts a report is made of: numbers, tables, lists of facts, and pictures as HTML."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from eval.report.gallery import Pictures, Ranking, Thumbnail, thumbnail

_LAZY = 12  # images of one block beyond which the browser may lay it out when it comes into view
_FEW = 5  # columns of pictures that still fit a phone; more are scrolled


def shown(value: float, interval: Sequence[float] | None = None) -> tuple[str, str]:
    """A value and its interval ("" where none), rounded to the interval's second digit."""
    if interval is None or not math.isfinite(value):
        return number(value), ""
    half = (interval[1] - interval[0]) / 2
    decimals = _decimals(half, 2) if 0 < half < math.inf else 4
    decimals = min(max(decimals, 0), 7)
    value_text, low, high = (f"{part:,.{decimals}f}" for part in (value, *interval))
    return _minus(value_text), _minus(f"[{low}, {high}]")


def number(value: float) -> str:
    """Four digits, or whole with thousands apart."""
    if not math.isfinite(value):
        return _minus(str(value))
    return _minus(f"{value:,.0f}" if abs(value) >= 9_999.5 else f"{value:.4g}")


def _minus(text: str) -> str:
    return text.replace("-", "\u2212") if "e-" not in text else text


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, label: str, caption: str = "", kind: str = ""
) -> str:
    """A table of ready HTML cells; the first of each row is its header. A narrow screen may scroll it."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return scrolling(
        label, f'<table class="{kind}">{above}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    )


def column(values: Sequence[float]) -> list[str]:
    """Numbers to be compared, with decimals alike: three digits of the smallest and of their spread, but no
    more than five of the largest.
    """
    sizes = [abs(value) for value in values if value]
    if not sizes or not all(map(math.isfinite, values)) or min(sizes) < 1e-7:
        return [number(value) for value in values]
    finest = min(size for size in (*sizes, max(values) - min(values)) if size)
    decimals = max(0, min(_decimals(finest, 3), _decimals(max(sizes), 5)))
    return [_minus(f"{value:,.{decimals}f}") for value in values]


def _decimals(size: float, digits: int) -> int:
    """Decimals that show `digits` digits of a positive number."""
    return digits - 1 - math.floor(math.log10(size))


def said(text: str) -> str:
    """Text with `code` in it, as HTML."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def scrolling(label: str, content: str) -> str:
    """A box that scrolls sideways where `content` is wider than the screen, by keyboard too."""
    return f'<div class="wrap" role="region" aria-label="{escape(label)}" tabindex="0">{content}</div>'


def facts(lines: Mapping[str, str], kind: str = "") -> str:
    """Names and ready HTML values; with a `kind`, pairs that stay together when set in columns."""
    pairs = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{v}</dd></div>" if kind else f"<dt>{escape(k)}</dt><dd>{v}</dd>"
        for k, v in lines.items()
    )
    return f'<dl class="{kind}">{pairs}</dl>' if pairs else ""


def all_pictures(blocks: Sequence[Pictures], side: int, section: str = "") -> str:
    """Blocks one after another; one that is titled like its section needs no heading of its own."""
    return "".join(_pictures(block, side, heading=block.title != section) for block in blocks if len(block))


def ranked_pictures(ranking: Ranking, side: int) -> str:
    """Worst beside best where the screen is wide enough."""
    ends = "".join(f"<div>{_pictures(end, side)}</div>" for end in (ranking.worst, ranking.best))
    return f'<div class="pair">{ends}</div>' if len(ranking.worst.columns) > 1 else ends


def _pictures(block: Pictures, side: int, heading: bool = True) -> str:
    title = f"<h3>{escape(block.title)}</h3>" if heading else ""
    text = f"<p>{said(block.text)}</p>" if block.text else ""
    content = _gallery(block, side) if len(block.columns) == 1 else _beside(block, side)
    large = ' class="large"' if len(block) * len(block.columns) > _LAZY else ""
    return f"<div{large}>{title}{text}{content}</div>"


def _gallery(block: Pictures, side: int) -> str:
    (name,) = block.columns
    items, small = [], True
    for row in range(len(block)):
        prompt = f'<span dir="auto">{escape(block.prompts[row])}</span>' if block.prompts else ""
        notes = [block.notes[row]] if block.notes else []
        notes += [block.captions[name][row]] if name in block.captions else []
        below = prompt + "".join(f"<small>{escape(note)}</small>" for note in notes)
        caption = f"<figcaption>{below}</figcaption>" if below else ""
        picture = thumbnail(block.columns[name][row], side)
        small = small and picture.pixelated
        items.append(f"<li><figure>{_image(picture, block, name, row)}{caption}</figure></li>")
    return f'<ul class="{"gallery" if small else "gallery large-images"}">{"".join(items)}</ul>'


def _beside(block: Pictures, side: int) -> str:
    """Prompts down, columns across: on a phone each prompt goes above its row of pictures."""
    first = "Prompt" if block.prompts else "Image"
    rows = []
    for row in range(len(block)):
        prompt = escape(block.prompts[row]) if block.prompts else str(row)
        note = f"<small>{escape(block.notes[row])}</small>" if block.notes else ""
        cells = []
        for name in block.columns:
            below = f"<small>{escape(block.captions[name][row])}</small>" if name in block.captions else ""
            picture = thumbnail(block.columns[name][row], side)
            cells.append(f"<td>{_image(picture, block, name, row)}{below}</td>")
        rows.append(f'<tr><th scope="row" dir="auto">{prompt}{note}</th>{"".join(cells)}</tr>')
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in block.columns)
    kind = "beside few" if len(block.columns) <= _FEW else "beside"
    return scrolling(
        block.title,
        f'<table class="{kind}" style="--n:{len(block.columns)}">'
        f'<thead><tr><th scope="col">{first}</th>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>",
    )


def _image(picture: Thumbnail, block: Pictures, name: str, row: int) -> str:
    words = f"{name}: {block.prompts[row]}" if block.prompts else f"{name}, image {row}"
    kind = ' class="pixelated"' if picture.pixelated else ""
    return (
        f'<img{kind} src="{picture.url}" width="{picture.width}" height="{picture.height}" loading="lazy" '
        f'decoding="async" alt="{escape(words)}">'
    )
