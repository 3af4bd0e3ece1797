"""Detection of training failures in the reports of a run, with advice on what to change.

All checks are pure functions of the lines of stats.jsonl. So a run, `d2g distill watch` and a later analysis
of the same file agree. A loss or gradient that is not finite stops a run by itself
(`distill.training.train`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from d2g.core.errors import SettingError, UserError
from d2g.core.logs import logger
from distill.losses.regression.registry import REGRESSION_LOSSES
from distill.monitoring.best_point import best_of, validations

Line = Mapping[str, float]
"""One line of stats.jsonl: `nimg`, and values by name."""
Mode = Literal["off", "warn", "stop"]


class Collapse(UserError):
    """Training has collapsed. The message says what was detected, and what to change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Thresholds of the checks. Durations are counted in reports, whatever their distance in images."""

    reports: int = 5  # consecutive reports that must agree
    won_auc: float = 0.999  # D has won: at least this share of (real, student) pairs in the right order,
    won_loss: float = 0.02  # and at most this loss
    blind_auc: float = 0.02  # D is blind: the share is within this distance of 0.5,
    blind_gap: float = 0.02  # and the mean logits are within this distance of each other
    spread: float = 0.5  # G collapses: variance over a batch below this fraction of its best earlier value
    wide: float = 1.5  # G is too diverse: variance over a batch above this multiple of the teacher's
    mostly: float = 0.9  # D mostly wins: in this share of 4 * reports
    rise: float = 2.0  # G diverges: regression loss above this multiple of its best earlier value
    contrast: float = 1.25  # images are saturated: contrast above this multiple of the teacher's
    color: float = 0.5  # colors shift: channel means this many standard deviations from the teacher's
    validations: int = 5  # quality stalls: this many validations without a new best value
    grid: float = 1.5  # steps at the borders of latent cells are this many times the teacher's

    def __post_init__(self) -> None:
        if self.reports < 1 or self.validations < 1 or not (0 < self.spread < 1 < self.rise):
            raise SettingError(
                f"collapse limits: reports {self.reports}, validations {self.validations}, spread "
                f"{self.spread}, rise {self.rise}; expected 1 or more, 1 or more, between 0 and 1, above 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One detected problem. A `fatal` one ends the run in mode "stop"; others only warn."""

    kind: str
    text: str
    fatal: bool


REGRESSION = tuple(sorted(loss.log_key for loss in REGRESSION_LOSSES.values()))
"""Log keys of the regression losses; a report has those of its run."""


def findings(lines: Sequence[Line], limits: Limits | None = None) -> list[Finding]:
    """Problems at the last of a run's reports. `lines`: its reports, oldest first."""
    limits = limits or Limits()
    checks = (
        not_finite,
        d_collapse,
        d_mostly_wins,
        d_blind,
        d_ignores_captions,
        g_collapse,
        g_too_diverse,
        g_regression,
        saturation,
        color_shift,
        grid_artifacts,
        frozen_weights,
        quality_stalls,
    )
    return [finding for check in checks if (finding := check(lines, limits)) is not None]


def handle_findings(
    problems: Iterable[Finding],
    mode: Mode,
    reported: set[str],
    warn: Callable[[str], None] | None = None,
) -> None:
    """Warn once per kind of finding, or raise Collapse for a fatal one in mode "stop". "off" does nothing.

    `reported`: kinds that were warned of before; updated in place. `warn`: receives the text of a warning;
    by default it is logged.
    """
    if mode == "off":
        return
    for finding in problems:
        if finding.fatal and mode == "stop":
            raise Collapse(f"{finding.text}, or go on with --set train.on_collapse=warn")
        if finding.kind not in reported:
            reported.add(finding.kind)
            (warn or logger.warning)(finding.text)


def not_finite(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """A value of the last report, or of a validation at the same image, is NaN or infinite."""
    last = [line for line in lines if line["nimg"] == lines[-1]["nimg"]]
    bad = [name for line in last for name, value in line.items() if not math.isfinite(value)]
    if not bad:
        return None
    text = f"{_at(lines)}: {', '.join(bad[:3])} not finite; lower the learning rate, or set optim.clip_norm"
    return Finding(kind="not_finite", text=text, fatal=True)


def d_collapse(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """D separates real and generated rows with a large margin, so the student gets no gradient from it."""
    last = _last_with(lines, ("d/auc", "loss/d"), limits.reports)
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


def d_mostly_wins(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """D orders nearly all rows correctly in nearly all reports, though its loss is not small in each."""
    last = _last_with(lines, ("d/auc",), 4 * limits.reports)
    wins = sum(line["d/auc"] >= limits.won_auc for line in last)
    if not last or wins < limits.mostly * len(last):
        return None
    text = (
        f"{_at(lines)}: the discriminator wins in {wins} of {len(last)} reports, so the student learns "
        "little from it; try a lower gan.optim.lr, a larger gan.r1_gamma, or gan.noise_augment=uniform"
    )
    return Finding(kind="d_mostly_wins", text=text, fatal=False)


def d_ignores_captions(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """D scores mismatched real rows like matching ones, although it tells generated rows apart.

    Medians over the last reports, because few rows of a batch are mismatched.
    """
    names = ("d/auc", "logit/real", "logit/fake", "logit/mismatched")
    last = _last_with(lines, names, 4 * limits.reports)
    if not last:
        return None
    auc, real, fake, mismatched = (median([line[name] for line in last]) for name in names)
    if auc < 0.5 + limits.blind_auc or real - mismatched > limits.blind_gap + 0.1 * abs(real - fake):
        return None
    text = (
        f"{_at(lines)}: the discriminator does not read the caption: over {len(last)} reports the logit of "
        f"mismatched rows is {mismatched:.3f}, of real ones {real:.3f}; try a larger gan.mix_fraction"
    )
    return Finding(kind="d_ignores_captions", text=text, fatal=False)


def d_blind(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """D cannot tell real from generated rows. Not fatal: a new D cannot, nor can D of a perfect student."""
    last = _last_with(lines, ("d/auc", "logit/real", "logit/fake"), 2 * limits.reports)
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
    """The student's latents of a batch become alike.

    The reference is the best earlier value of the run, because one-step students start blurred and alike. It
    is at most the teacher's spread, because a student that starts with a larger one must come down.
    """
    best, now = _best_and_now(lines, "latent/spread", limits.reports, max)
    if now is None or not now < limits.spread * min(best, 1.0):
        return None
    text = (
        f"{_at(lines)}: the student collapses: its latents vary {now:.2f} times as much over a batch as the "
        f"teacher's, {best:.2f} before; go back to a checkpoint before it, and try a lower optim.lr, a "
        "smaller gan.weight or a larger gan.mix_fraction"
    )
    return Finding(kind="g_collapse", text=text, fatal=True)


def g_too_diverse(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """The student's latents vary more over a batch than the teacher's, after they varied about as much."""
    best, now = _best_and_now(lines, "latent/spread", limits.reports, min)
    if now is None or not best < limits.wide < now:
        return None
    text = (
        f"{_at(lines)}: the student's latents vary {now:.2f} times as much over a batch as the teacher's, "
        f"{best:.2f} before; try a lower optim.lr or a smaller gan.weight"
    )
    return Finding(kind="g_too_diverse", text=text, fatal=False)


def g_regression(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """The regression loss rises far above its best earlier value: the student leaves the teacher."""
    for name in REGRESSION:
        best, now = _best_and_now(lines, name, limits.reports, min)
        if now is not None and now > limits.rise * best:
            text = (
                f"{_at(lines)}: the student leaves the teacher: {name} is {now:.3g}, {best:.3g} before; try "
                "a lower optim.lr, optim.clip_norm, or a smaller gan.weight"
            )
            return Finding(kind="g_regression", text=text, fatal=True)
    return None


def saturation(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """The student's images have more contrast than the teacher's, after they had about the same."""
    for name in ("latent/contrast", "preview/contrast"):
        best, now = _best_and_now(lines, name, limits.reports, min)
        if now is not None and best < limits.contrast < now:
            text = (
                f"{_at(lines)}: the student's images are saturated: {name} is {now:.2f} times the teacher's, "
                f"{best:.2f} before; try a smaller gan.weight, or a larger gan.r1_gamma"
            )
            return Finding(kind="saturation", text=text, fatal=False)
    return None


def color_shift(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """The mean color of the student's images leaves the teacher's, after it was near it."""
    best, now = _best_and_now(lines, "latent/color", limits.reports, min)
    if now is None or not best < limits.color < now:
        return None
    text = (
        f"{_at(lines)}: the student's colors shift: a channel's mean is {now:.2f} standard deviations from "
        f"the teacher's, {best:.2f} before; try a smaller gan.weight or a lower optim.lr"
    )
    return Finding(kind="color_shift", text=text, fatal=False)


def grid_artifacts(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """The previews of the student have edges at the borders of latent cells (every 8 pixels for SD)."""
    last = _last_with(lines, ("preview/grid",), limits.reports)
    if not last or not all(line["preview/grid"] > limits.grid for line in last):
        return None
    text = (
        f"{_at(lines)}: the student's images have a grid: steps at the borders of latent cells are "
        f"{last[-1]['preview/grid']:.2f} times the teacher's; try a smaller gan.weight, or "
        "gan.noise_augment=small"
    )
    return Finding(kind="grid_artifacts", text=text, fatal=False)


def frozen_weights(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """The student's weights do not move: their average is equal to them, bit for bit."""
    last = _last_with(lines, ("ema/drift",), 2)
    if not last or any(line["ema/drift"] > 0 for line in last):
        return None
    text = (
        f"{_at(lines)}: the student's weights do not move; check optim.lr, optim.warmup_images, "
        "optim.decay_images and the weights of the losses"
    )
    return Finding(kind="frozen_weights", text=text, fatal=True)


def quality_stalls(lines: Sequence[Line], limits: Limits) -> Finding | None:
    """The metric that selects the best checkpoint has had no new best value in the last validations.

    There must be twice as many validations, because early values vary a lot.
    """
    name, points = validations(lines)
    if len(points) < 2 * limits.validations:
        return None
    nimg, value = best_of(name, points)
    if nimg > points[-limits.validations - 1][0]:
        return None
    text = (
        f"{_at(lines)}: quality stalls: {name} was best at image {nimg:,} with {value:.4g}, and not in the "
        f"last {limits.validations} validations; train.keep_best=true keeps the best checkpoint, and a lower "
        "optim.lr may help"
    )
    return Finding(kind="quality_stalls", text=text, fatal=False)


def _last_with(lines: Sequence[Line], names: Sequence[str], count: int) -> list[Line]:
    """The last `count` lines that have all the names, or [] if there are fewer.

    Validations, and steps that update one network only, write lines without some of the names.
    """
    complete = [line for line in lines if all(name in line for name in names)]
    return complete[-count:] if len(complete) >= count else []


def _best_and_now(
    lines: Sequence[Line], name: str, count: int, better: Callable[[list[float]], float]
) -> tuple[float, float | None]:
    """Best earlier median over `4 * count` reports, and the best of the last `count` reports after them.

    Returns (nan, None) if there are too few reports. Single losses are noisy: the best of short windows would
    be luck. Taking the best of the last reports means that all of them must agree.
    """
    values = [line[name] for line in lines if name in line and math.isfinite(line[name])]
    width = 4 * count
    windows = [values[i : i + width] for i in range(0, len(values) - count - width + 1)]
    if not windows:
        return math.nan, None
    return better([median(window) for window in windows]), better(values[-count:])


def _at(lines: Sequence[Line]) -> str:
    return f"image {int(lines[-1]['nimg']):,}"
