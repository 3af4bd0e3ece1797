"""distill.monitoring.collapse: constructed logs with one problem each, and a real run that collapses."""

import math
import random
from pathlib import Path
from typing import Any

import pytest

from d2g.core.errors import SettingError, UserError
from d2g.core.tracking.run_directory import read_stats
from distill.monitoring.collapse import Collapse, Finding, Limits, findings, handle_findings
from distill.training.train import train
from jobs import distill_config

HEALTHY = {
    "loss/d": 1.2, "loss/g": 0.4, "loss/e_latent_lpips": 0.3, "grad/g": 1.0, "grad/d": 0.5,
    "d/auc": 0.7, "logit/real": 0.3, "logit/fake": -0.3, "latent/spread": 0.9,
}  # fmt: skip


def log(count: int, **late: Any) -> list[dict[str, float]]:
    """Build `count` healthy reports. `late`: values of key a/b in the last reports, passed as a__b=[...]."""
    lines: list[dict[str, float]] = [{"nimg": 10 * i, **HEALTHY} for i in range(count)]
    for name, values in late.items():
        for line, value in zip(lines[-len(values) :], values, strict=True):
            line[name.replace("__", "/")] = value
    return lines


def kinds(lines: list[dict[str, float]], limits: Limits | None = None) -> list[str]:
    return [finding.kind for finding in findings(lines, limits)]


def test_a_healthy_run_has_no_findings() -> None:
    for count in (0, 1, 4, 5, 12, 200):
        assert findings(log(count)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_reported(value: float) -> None:
    (finding,) = findings(log(3, val__psnr=[value]))
    assert finding.kind == "not_finite" and finding.fatal
    assert finding.text.startswith("image 20: val/psnr not finite; ")
    assert kinds([*log(3, val__psnr=[value]), {"nimg": 30, **HEALTHY}]) == [], "only the last report counts"


def test_d_collapse_is_detected() -> None:
    lines = log(12, d__auc=[1.0] * 5, loss__d=[0.01] * 5)
    assert kinds(lines) == ["d_collapse"] and findings(lines)[0].fatal
    assert "gan.optim.lr" in findings(lines)[0].text and "100.0%" in findings(lines)[0].text
    assert kinds(log(12, d__auc=[1.0] * 4, loss__d=[0.01] * 4)) == [], "four reports are not five"
    assert kinds(log(12, d__auc=[1.0] * 4, loss__d=[0.01] * 4), Limits(reports=4)) == ["d_collapse"]
    assert kinds(log(12, d__auc=[1.0] * 5)) == [], "AUC is 1, but D's loss is not small"
    assert kinds(log(12, loss__d=[0.01] * 5)) == [], "a low loss with AUC below 1"
    assert kinds(log(12, d__auc=[1.0, 1.0, 0.9, 1.0, 1.0], loss__d=[0.01] * 5)) == []


def test_a_discriminator_that_wins_in_nearly_all_reports_is_reported() -> None:
    wins = [1.0] * 18 + [0.9, 1.0]
    assert kinds(log(40, d__auc=wins)) == ["d_mostly_wins"]
    assert "19 of 20 reports" in findings(log(40, d__auc=wins))[0].text
    assert kinds(log(40, d__auc=[1.0] * 17 + [0.9] * 3)) == [], "17 of 20 are not 18"
    assert kinds(log(19, d__auc=[1.0] * 19)) == [], "19 reports are not 20"


def test_a_discriminator_that_ignores_captions_is_reported() -> None:
    def run(mismatched: float, **late: Any) -> list[dict[str, float]]:
        return log(24, logit__mismatched=[mismatched] * 24, **late)

    assert kinds(run(0.3)) == ["d_ignores_captions"], "mismatched rows have the logit of real ones"
    assert kinds(run(0.23)) == ["d_ignores_captions"] and kinds(run(0.2)) == []
    assert kinds(run(-0.3)) == [], "they have the logit of fake ones"
    assert kinds(run(0.3, d__auc=[0.51] * 24)) == [], "a new discriminator knows nothing yet"
    assert kinds(log(24)) == [], "a run without mix-and-match"


def test_a_student_that_is_more_diverse_than_the_teacher_is_reported() -> None:
    assert kinds(log(40, latent__spread=[1.6] * 5)) == ["g_too_diverse"]
    assert kinds(log(40, latent__spread=[1.6] * 4 + [1.4])) == []
    assert kinds(log(40, latent__spread=[1.6] * 40)) == [], "a student that starts wild must come down"


def test_validation_lines_do_not_interrupt_a_streak() -> None:
    """Validation reports are separate lines without losses."""
    for late in ({"d__auc": [1.0] * 5, "loss__d": [0.01] * 5}, {"latent__spread": [0.1] * 5}):
        lines = log(30, **late)
        psnr = [{"nimg": line["nimg"], "val/psnr": 9 + line["nimg"]} for line in lines]
        mixed = [part for pair in zip(lines, psnr, strict=True) for part in pair]
        assert kinds(mixed) == kinds(lines) and len(kinds(lines)) == 1
    assert kinds([*log(3, val__psnr=[math.nan]), {"nimg": 20, "val/fid": 9.0}]) == ["not_finite"]


def test_a_blind_discriminator_is_only_a_warning() -> None:
    lines = log(20, d__auc=[0.5] * 10, logit__real=[0.01] * 10, logit__fake=[0.0] * 10)
    (finding,) = findings(lines)
    assert finding.kind == "d_blind" and not finding.fatal
    handle_findings([finding], "stop", set(), lambda text: None)
    assert kinds(log(20, d__auc=[0.5] * 9, logit__real=[0.01] * 9, logit__fake=[0.0] * 9)) == []
    assert kinds(log(20, d__auc=[0.5] * 10)) == [], "the mean logits of real and fake differ"


def test_g_collapse_is_detected() -> None:
    lines = log(30, latent__spread=[0.9, 0.7, 0.4, 0.4, 0.3, 0.2, 0.2])
    assert kinds(lines) == ["g_collapse"] and "0.40 times" in findings(lines)[0].text
    assert kinds(log(24, latent__spread=[0.1] * 5)) == [], "too few reports for a reference value"
    rising = log(30)
    for number, line in enumerate(rising):
        line["latent/spread"] = 0.05 + 0.04 * number  # a student starts with blurred, similar images
    assert kinds(rising) == []
    falling = log(60)
    for number, line in enumerate(falling):
        line["latent/spread"] = 1.0 + 12 * 0.9**number  # a high spread at the start, as for the miniature
    assert not any(kinds(falling[:end]) for end in range(len(falling) + 1))
    assert kinds([*falling, *log(5, latent__spread=[0.4] * 5)]) == ["g_collapse"]
    assert kinds(log(30, latent__spread=[0.1] * 4)) == [], "four reports are not five"


@pytest.mark.parametrize("name", ["loss/e_latent_lpips", "loss/mse"])
def test_rising_regression_loss_is_detected(name: str) -> None:
    lines = [{**line, name: line["loss/e_latent_lpips"]} for line in log(30)]
    assert kinds(lines) == []
    for line in lines[-5:]:
        line[name] = 0.65
    assert kinds(lines) == ["g_regression"] and findings(lines)[0].text.count(name) == 1
    for line in lines[-5:]:
        line[name] = 0.55
    assert kinds(lines) == [], "a small rise is no finding"


@pytest.mark.parametrize("name", ["latent/contrast", "preview/contrast"])
def test_saturation_is_detected(name: str) -> None:
    lines = [{**line, name: 0.97} for line in log(30)]
    assert kinds(lines) == []
    for line in lines[-5:]:
        line[name] = 1.4
    (finding,) = findings(lines)
    assert finding.kind == "saturation" and not finding.fatal and f"{name} is 1.40" in finding.text
    saturated = [{**line, name: 1.4} for line in log(30)]
    assert kinds(saturated) == [], "contrast that is high from the start is no finding"


def test_color_shift_is_detected() -> None:
    lines = [{**line, "latent/color": 0.1} for line in log(30)]
    assert kinds(lines) == []
    for line in lines[-5:]:
        line["latent/color"] = 0.7
    assert kinds(lines) == ["color_shift"] and "0.70 standard deviations" in findings(lines)[0].text


def test_grid_artifacts_are_detected() -> None:
    assert kinds(log(12, preview__grid=[1.6] * 4)) == [], "four reports are not five"
    assert kinds(log(12, preview__grid=[1.6] * 5)) == ["grid_artifacts"]
    assert kinds(log(12, preview__grid=[1.1] * 5)) == []


def test_frozen_weights_are_detected() -> None:
    assert kinds(log(3, ema__drift=[0.0])) == [], "one report"
    assert kinds(log(3, ema__drift=[0.0, 1e-9])) == []
    (finding,) = findings(log(3, ema__drift=[0.0, 0.0]))
    assert finding.kind == "frozen_weights" and finding.fatal


def test_quality_that_stalls_is_reported() -> None:
    def run(name: str, values: list[float]) -> list[dict[str, float]]:
        validations = [{"nimg": 10 * i, name: value} for i, value in enumerate(values)]
        return sorted([*log(len(values)), *validations], key=lambda line: line["nimg"])

    fell = [90.0, 70.0, 60.0, 50.0, 44.0]
    lines = run("val/fid", [*fell, 45.0, 47.0, 44.0, 46.0, 45.0])
    assert kinds(lines) == ["quality_stalls"] and not findings(lines)[0].fatal
    assert "val/fid was best at image 40 with 44, and not in the last 5" in findings(lines)[0].text
    assert kinds(run("val/fid", [*fell, 45.0, 47.0, 44.0, 46.0, 43.9])) == [], "a new best one"
    assert kinds(run("val/fid", [*fell, 45.0, 47.0, 44.0, 46.0])) == [], "four validations are not five"
    assert kinds(run("val/fid", [44.0, 45.0, 46.0, 47.0, 48.0, 49.0])) == [], "six are too few to say"
    rising = [10.0, 11.0, 12.0, 13.0, 14.0, 14.1, 14.2, 14.3, 14.4, 14.5]
    assert kinds(run("val/psnr", rising)) == [] and kinds(run("val/psnr", rising[::-1])) == ["quality_stalls"]


def test_noisy_losses_give_no_findings() -> None:
    """1000 log-normal reports with a deviation of 0.33: the minimum lies far below the median."""
    rng = random.Random(0)
    lines = [
        {"nimg": i, **{name: rng.lognormvariate(0, 0.33) for name in ("loss/mse", "latent/spread")}}
        for i in range(1000)
    ]
    assert not any(findings(lines[:end]) for end in range(25, 1001, 25))


def test_on_collapse_stop_warn_and_off(caplog: pytest.LogCaptureFixture) -> None:
    detected = [Finding(kind="g_collapse", text="image 10: it collapses; try less", fatal=True)]
    messages: list[str] = []
    reported: set[str] = set()
    for _ in range(3):
        handle_findings(detected, "warn", reported, messages.append)
        handle_findings(detected, "off", set(), messages.append)
    assert messages == ["image 10: it collapses; try less"], "once"
    with pytest.raises(Collapse, match=r"try less, or go on with --set train\.on_collapse=warn"):
        handle_findings(detected, "stop", reported, messages.append)
    assert issubclass(Collapse, UserError)
    handle_findings(detected, "warn", set())
    assert caplog.messages == ["image 10: it collapses; try less"]


def test_invalid_limits_are_refused() -> None:
    for settings in ({"reports": 0}, {"validations": 0}, {"spread": 1.5}, {"rise": 0.9}):
        with pytest.raises(SettingError, match="collapse limits: reports"):
            Limits(**settings)


def test_a_real_diverging_run_is_detected(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    """No findings in a normal run, although it starts with a high spread; then a run whose learning rate
    keeps growing."""
    settings = ("regression.losses=mse", "train.on_collapse=off")
    rising = ("train.images=40", "optim.lr=10", "optim.warmup_images=400", f"init={tmp_path / 'healthy'}")
    train(
        distill_config(teacher, pairs, *settings, "train.images=100", "optim.lr=1e-3"), tmp_path / "healthy"
    )
    train(distill_config(teacher, pairs, *settings, *rising), tmp_path / "diverging")
    healthy, limits = read_stats(tmp_path / "healthy"), Limits(reports=3)
    assert healthy[0]["latent/spread"] > 10 and healthy[-1]["loss/mse"] < 0.5 * healthy[0]["loss/mse"]
    assert not any(kinds(healthy[:end], limits) for end in range(1, len(healthy) + 1))
    combined = [
        *healthy,
        *({**line, "nimg": line["nimg"] + 100} for line in read_stats(tmp_path / "diverging")),
    ]
    assert "g_regression" in kinds(combined, limits), combined
