"""Numbers for people: as many digits as the interval supports, separated thousands, a real minus sign."""

import math
from collections.abc import Sequence

from eval.protocols.metric import Better


def format_value(value: float, interval: Sequence[float] | None = None) -> tuple[str, str]:
    """A value and its interval ("" without one), both rounded to the second digit of the interval's width."""
    if interval is None or not math.isfinite(value):
        return format_number(value), ""
    half_width = (interval[1] - interval[0]) / 2
    decimals = _decimals(half_width, 2) if 0 < half_width < math.inf else 4
    decimals = min(max(decimals, 0), 7)
    text, low, high = (f"{part:,.{decimals}f}" for part in (value, *interval))
    return _minus(text), _minus(f"[{low}, {high}]")


def format_number(value: float) -> str:
    """Four significant digits; from 10,000 on a whole number with separated thousands."""
    if not math.isfinite(value):
        return _minus(str(value))
    return _minus(f"{value:,.0f}" if abs(value) >= 9_999.5 else f"{value:.4g}")


def format_column(values: Sequence[float]) -> list[str]:
    """Numbers to compare, all with the same decimals: three digits of the smallest and of their spread, but
    at most five of the largest.
    """
    sizes = [abs(value) for value in values if value]
    if not sizes or not all(map(math.isfinite, values)) or min(sizes) < 1e-7:
        return [format_number(value) for value in values]
    finest = min(size for size in (*sizes, max(values) - min(values)) if size)
    decimals = max(0, min(_decimals(finest, 3), _decimals(max(sizes), 5)))
    return [_minus(f"{value:,.{decimals}f}") for value in values]


def format_setting(value: object) -> str:
    """A setting of a protocol as text."""
    if isinstance(value, list | tuple):
        return ", ".join(format_setting(part) for part in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value) or "none"


def arrow(better: Better) -> tuple[str, str]:
    """The arrow beside a metric's name, and what it means."""
    return {
        "lower": ("\u2193", "lower is better"),
        "higher": ("\u2191", "higher is better"),
        "": ("", ""),
    }[better]


def _decimals(size: float, digits: int) -> int:
    """Decimals that show `digits` significant digits of a positive number."""
    return digits - 1 - math.floor(math.log10(size))


def _minus(text: str) -> str:
    return text.replace("-", "\u2212") if "e-" not in text else text
