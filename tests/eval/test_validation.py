"""eval.runner.validation: metrics computed during training equal those of `d2g eval run`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from d2g.core.distributed.checkpoint import complete_points
from d2g.core.errors import SettingError
from d2g.core.seeds import noise
from d2g.core.tracking.run_directory import read_stats
from distill.monitoring.best_point import HIGHER_IS_BETTER, SELECTION_METRICS
from distill.sampling import load_student
from distill.training.train import train
from eval.protocols.config import EvalRun
from eval.protocols.protocol import PROTOCOLS
from eval.runner.run import run_evaluation
from eval.runner.validation import validation_hook
from eval_jobs import config
from jobs import distill_config, make_pairs


def test_validation_numbers_equal_those_of_an_evaluation(job: Path, teacher: Path) -> None:
    run = config(job)
    validate = validation_hook(run, str(teacher))
    student = load_student(str(job / "run"))
    expected = run_evaluation(replace(run, student=str(job / "run")))

    def sample_latents(seed: int, prompts: Sequence[str]) -> Tensor:
        return student.latents(noise(seed, range(len(prompts)), student.student.latent_shape), prompts)

    for _ in range(2):
        numbers = validate(sample_latents, 16)
        assert numbers.keys() == {"val/fid", "val/clip_score", "val/precision", "val/recall"}
        assert numbers == {
            key: pytest.approx(expected[key.removeprefix("val/")], rel=1e-4) for key in numbers
        }


def test_a_run_reports_validation_and_keeps_the_best_checkpoint(
    job: Path, teacher: Path, tmp_path: Path
) -> None:
    settings = (
        "train.images=16",
        "train.validate_images=8",
        "train.validate_pairs=3",
        "train.keep_best=true",
    )
    distillation = distill_config(teacher, make_pairs(teacher, tmp_path), *settings)
    train(
        distillation, tmp_path / "run", validate=validation_hook(config(job, metrics=("fid",)), str(teacher))
    )
    lines = [line for line in read_stats(tmp_path / "run") if "val/fid" in line]
    assert [line["nimg"] for line in lines] == [8, 16] and all("val/psnr" in line for line in lines)
    best = min(lines, key=lambda line: line["val/fid"])["nimg"]
    assert (tmp_path / "run" / "checkpoints" / f"{int(best):09d}").is_dir()


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("prompts", "--validate folder has no prompts of its own; give --validate-prompts FILE"),
        ("reference", "--validate folder measures fid, which needs real images; give --validate-reference"),
    ],
)
def test_what_a_validation_lacks_is_an_error_before_the_first_step(
    job: Path, teacher: Path, tmp_path: Path, lacking: str, message: str
) -> None:
    run = replace(config(job), metrics=("fid",), **{lacking: None})  # type: ignore[arg-type]
    settings = ("train.images=8", "train.validate_images=8", "train.validate_pairs=3")
    distillation = distill_config(teacher, make_pairs(teacher, tmp_path), *settings)
    with pytest.raises(SettingError, match=message):
        train(distillation, tmp_path / "run", validate=validation_hook(run, str(teacher)))
    assert not (tmp_path / "run" / "stats.jsonl").exists()


def test_paired_metrics_are_refused_in_validation() -> None:
    with pytest.raises(SettingError, match="'psnr' compares images pair by pair"):
        validation_hook(EvalRun(protocol=PROTOCOLS["folder"], metrics=("psnr", "fid")), "miniature")


def test_only_validations_that_measure_the_same_select_the_best_checkpoint(
    job: Path, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that validates with other numbers of images, then without `--validate`."""
    pairs, out, run = make_pairs(teacher, tmp_path), tmp_path / "run", config(job, metrics=("fid",))

    def best_checkpoints(images: int, num: int | None) -> list[int]:
        """Train to `images`, with a validation at the end, and return the checkpoints other than the last."""
        settings = ("train.validate_pairs=3", "train.keep_best=true", "train.keep_checkpoints=1")
        length = (f"train.images={images}", "train.validate_images=8")
        validate = None if num is None else validation_hook(replace(run, num=num), str(teacher))
        caplog.clear()
        with caplog.at_level("INFO"):
            train(distill_config(teacher, pairs, *settings, *length), out, validate=validate)
        return [nimg for nimg in complete_points(out / "checkpoints") if nimg != images]

    def set_value(nimg: int, name: str, value: float) -> None:
        """Change a value that was reported."""
        lines = read_stats(out)
        for line in lines:
            if line["nimg"] == nimg and name in line:
                line[name] = value
        (out / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    said = "the settings of the validation have changed"
    # The best FID so far is by far the best.
    best_checkpoints(8, 4)
    set_value(8, "val/fid", 1e-3)
    assert best_checkpoints(16, 4) == [8] and said not in caplog.text, "the same measure"
    # The number of images changes.
    best_checkpoints(24, 6)
    assert f"24 images: {said} (images (4 -> 6), " in caplog.text and "no longer count as best" in caplog.text
    set_value(24, "val/fid", 2e-3)
    # FID is not measured any more.
    best_checkpoints(32, None)
    assert f"32 images: {said}" in caplog.text and "metric ('val/fid' -> 'val/" in caplog.text
    metric = next(name for name in SELECTION_METRICS if name in read_stats(out)[-1])
    set_value(32, metric, 1e9 if metric in HIGHER_IS_BETTER else -1e9)
    assert best_checkpoints(40, None) == [32] and said not in caplog.text
