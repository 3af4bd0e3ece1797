"""`d2g lpips train | calibrate | score | overfit | triplets`, through the command line."""

from pathlib import Path
from typing import Any

import pytest

from labeled import save_classes
from latent_lpips import load_lpips

COMMANDS = ["train", "calibrate", "score", "overfit", "triplets"]


@pytest.fixture
def lpips(d2g: Any) -> Any:
    """`lpips(*args)` runs `d2g lpips ARGS --json` in this process."""
    return lambda *args: d2g("lpips", *args, "--json")


def sets(**settings: object) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def test_triplets_train_calibrate_score_and_overfit(lpips: Any, teacher: Path, tmp_path: Path) -> None:
    """All five commands; each uses the output of the ones before it."""
    data = save_classes(tmp_path / "data", 8)
    summary = lpips(
        "triplets", "--data", data, "--out", tmp_path / "judgments", *sets(size=16, val=0.25)
    ).json
    assert summary["train"]["jpeg"] == 18 and summary["val"]["jpeg"] == 6

    small = sets(size=16, width=0.0625, crops=1, batch=8, epochs=2, grid=1)
    common = ("--latents", teacher, "--preset", "small")
    trained = lpips("train", "--data", data, "--out", tmp_path / "trunk", *common, *small).json
    assert 0 <= trained["top1"] <= 1 and trained["classes"] == 3

    judgments = ("--data", tmp_path / "judgments", "--latents", teacher, "--preset", "small")
    args = ("--weights", tmp_path / "trunk", "--out", tmp_path / "heads", *sets(**{"heads.epochs": 2}))
    fitted = lpips("calibrate", *judgments, *args).json
    assert 0 <= fitted["accuracy"] <= 1 and load_lpips(tmp_path / "heads").config.channels == 4

    file = tmp_path / "scores" / "score.json"
    args = ("--weights", tmp_path / "heads", "--baselines", "l2,ssim", "--out", file, *sets(resamples=20))
    scored = lpips("score", *judgments, *args).json
    assert scored["two_afc"]["mean"] == pytest.approx(fitted["accuracy"], abs=0.02)
    assert set(scored["baselines"]) == {"l2", "ssim"} and file.is_file()

    args = ("--weights", tmp_path / "heads", "--families", "none,b", "--steps", 3, *sets(size=16, count=1))
    final = lpips("overfit", "--data", data, *common, *args, "--out", tmp_path / "fit").json["final"]
    assert set(final) == {"none", "b"} and final["b"]["pixel_mse"] > 0


@pytest.mark.parametrize("command", COMMANDS)
def test_dry_runs_write_nothing_and_wrong_names_are_errors(
    lpips: Any, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = lpips(command, "--dry-run", "--seed", 7).json
    assert plan["config"]["seed"] == 7 and "out" in plan and list(tmp_path.iterdir()) == []
    result = lpips(command, "--preset", "smal")
    hint = "known: patches, pictures" if command == "triplets" else "did you mean 'small'?"
    assert result.code == 2 and hint in result.stderr
    result = lpips(command, "--set", "sed=1")
    assert result.code == 2 and "did you mean 'seed'?" in result.stderr
    result = lpips(command)
    assert result.code == 2 and "is not set; give --" in result.stderr and list(tmp_path.iterdir()) == []


def test_errors_are_one_line(lpips: Any, teacher: Path, tmp_path: Path) -> None:
    result = lpips("train", "--data", tmp_path / "no", "--latents", teacher, "--out", tmp_path / "out")
    assert result.code == 1 and result.stderr.strip().splitlines()[-1].startswith("error: ")
    result = lpips("score", "--pixels", "vg", "--data", tmp_path)
    assert result.code == 2 and "expected vgg, alex or squeeze" in result.stderr
    result = lpips("train", "--data", tmp_path, "--latents", tmp_path, "--out", tmp_path / "out")
    assert result.code == 1 and "no model_index.json" in result.stderr
