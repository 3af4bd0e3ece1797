"""Watchmen over a run's reports: what went wrong with the two networks, and what to try.

Pure functions of the lines of stats.jsonl, so that a run, `d2g distill watch` and a look at last year's run
all say the same. Losses that are not finite stop a run by themselves (`distill.training.train`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from d2g.core.errors import SettingError, UserError
from d2g.core.logs import logger

Line = Mapping[str, float]
Mode = Literal["off", "warn", "stop"]


class Collapse(UserError):
    """Training goes on to nothing: what was seen, and what to try."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When a watchman speaks. Counted in reports, whatever their distance in images."""

    reports: int = 5  # in a row that must agree
    won_auc: float = 0.999  # D: at least this share of (real, fake) pairs in order,
    won_loss: float = 0.02  # and no more loss than this
    blind_auc: float = 0.02  # D: the share is this near to 0.5,
    blind_gap: float = 0.02  # and the mean logits this near to each other
    spread: float = 0.5  # G: variance over a batch below this share of the run's own best, or the teacher's
    rise: float = 2.0  # G: regression loss above this many times the run's own best

    def __post_init__(self) -> None:
        if self.reports < 1 or not (0 < self.spread < 1 < self.rise):
            raise SettingError(
                f"sentinels: reports {self.reports}, spread {self.spread}, rise {self.rise}; expected 1 or "
                "more, between 0 and 1, above 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong. `fatal`: "stop" stops at it; others are only told."""

    kind: str
    text: str
    fatal: bool


REGRESSION = ("loss/e_latent_lpips", "loss/latent_lpips", "loss/lpips", "loss/mse", "loss/pseudo_huber")
"""The student's distance to the teacher, by the names it may have in a report."""


def findings(lines: Sequence[Line], limits: Limits | None = None) -> list[Finding]:
    """What is wrong at the last of a run's reports, oldest first in `lines`."""
    limits = limits or Limits()
    watchmen = (not_finite, d_collapse, d_blind, g_collapse, g_regression)
    return [found for watch in watchmen if (found := watch(lines, limits)) is not None]


def act(
    found: Iterable[Finding], mode: Mode, told: set[str], tell: Callable[[str], None] | None = None
) -> None:
    """Warn of each kind once (`told` remembers), or stop at a fatal one with Collapse. "off" does nothing.

    `tell`: takes the line of a warning; logged if None.
    """
    if mode == "off":
        return
    for finding in found:
        if finding.fatal and mode == "stop":
            raise Collapse(f"{finding.text}, or go on with --set train.on_collapse=warn")
        if finding.kind not in told:
            told.add(finding.kind)
            (tell or logger.warning)(finding.text)


def not_finite(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """A loss, gradient or measure of the last report, or of a validation with it, is NaN or infinite."""
    last = [line for line in lines if line["nimg"] == lines[-1]["nimg"]]
    bad = [name for line in last for name, value in line.items() if not math.isfinite(value)]
    if not bad:
        return None
    text = f"{_at(lines)}: {', '.join(bad[:3])} not finite; lower the learning rate, or set optim.clip_norm"
    return Finding(kind="not_finite", text=text, fatal=True)


def d_collapse(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """D tells all real from all generated rows without effort: the student gets no gradient from it."""
    last = _last(lines, ("d/auc", "loss/d"), limits.reports)
    if not last or not all(
        line["d/auc"] >= limits.won_auc and line["loss/d"] <= limits.won_loss for line in last
    ):
        return None
    text = (
        f"{_at(lines)}: the discriminator has won: in {len(last)} reports it orders {last[-1]['d/auc']:.1%} "
        f"of real and generated rows, loss/d {last[-1]['loss/d']:.2g}; try a lower gan.optim.lr, a larger "
        "gan.r1_gamma, or gan.noise_augment=uniform"
    )
    return Finding(kind="d_collapse", text=text, fatal=True)


def d_blind(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """D tells real from generated no better than a coin. Never fatal: every D starts so, and a perfect
    student would leave it so.
    """
    last = _last(lines, ("d/auc", "logit/real", "logit/fake"), 2 * limits.reports)
    if not last or not all(
        abs(line["d/auc"] - 0.5) <= limits.blind_auc
        and abs(line["logit/real"] - line["logit/fake"]) <= limits.blind_gap
        for line in last
    ):
        return None
    text = (
        f"{_at(lines)}: the discriminator is blind: in {len(last)} reports its logits of real and generated "
        f"rows are {last[-1]['logit/real']:.3f} and {last[-1]['logit/fake']:.3f}; try a higher "
        "gan.optim.lr or a smaller gan.r1_gamma"
    )
    return Finding(kind="d_blind", text=text, fatal=False)


def g_collapse(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """The student's latents of a batch become alike. Against the run's own best, for one-step students
    start blurred and alike; but never above the teacher's, as those that start wild have to come down.
    """
    then, now = _best_and_now(lines, "latent/spread", limits.reports, max)
    if now is None or not now < limits.spread * min(then, 1.0):
        return None
    text = (
        f"{_at(lines)}: the student collapses: its latents vary {now:.2f} times as much over a batch as the "
        f"teacher's, {then:.2f} before; go back to a checkpoint before it, and try a lower optim.lr, a "
        "smaller gan.weight or a larger gan.mix_fraction"
    )
    return Finding(kind="g_collapse", text=text, fatal=True)


def g_regression(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """The student leaves the teacher's latents: its regression loss rises far above the run's own best."""
    for name in REGRESSION:
        then, now = _best_and_now(lines, name, limits.reports, min)
        if now is not None and now > limits.rise * then:
            text = (
                f"{_at(lines)}: the student leaves the teacher: {name} is {now:.3g}, {then:.3g} before; try "
                "a lower optim.lr, optim.clip_norm, or a smaller gan.weight"
            )
            return Finding(kind="g_regression", text=text, fatal=True)
    return None


def _last(lines: Sequence[Line], names: Sequence[str], count: int) -> list[Line]:
    """The last `count` lines that have all the names (validations and steps of one network have not), if
    there are so many."""
    having = [line for line in lines if all(name in line for name in names)]
    return having[-count:] if len(having) >= count else []


def _best_and_now(
    lines: Sequence[Line], name: str, count: int, better: Callable[[list[float]], float]
) -> tuple[float, float | None]:
    """The best median over four times `count` reports, and the best of the last `count`, after those.

    One step's loss is noisy: the best of short windows would be luck, and the last reports must all agree.
    """
    values = [line[name] for line in lines if name in line and math.isfinite(line[name])]
    width = 4 * count
    windows = [values[i : i + width] for i in range(0, len(values) - count - width + 1)]
    if not windows:
        return math.nan, None
    return better([median(window) for window in windows]), better(values[-count:])


def _at(lines: Sequence[Line]) -> str:
    return f"image {int(lines[-1]['nimg']):,}"
