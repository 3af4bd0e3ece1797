"""`d2g lpips train | calibrate | score | overfit | triplets`, through the command line."""

from pathlib import Path
from typing import Any

import pytest

from labeled import save_classes
from latent_lpips import load_lpips

WORKS = ["train", "calibrate", "score", "overfit", "triplets"]


@pytest.fixture
def lpips(d2g: Any) -> Any:
    """`lpips(words…)`: `d2g lpips words… --json` in this process."""
    return lambda *words: d2g("lpips", *words, "--json")


def sets(**settings: object) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def test_from_pictures_to_a_calibrated_scored_metric(lpips: Any, teacher: Path, tmp_path: Path) -> None:
    """All five, each on what the one before it left."""
    data = save_classes(tmp_path / "data", 8)
    summary = lpips("triplets", "--data", data, "--out", tmp_path / "judged", *sets(size=16, val=0.25)).json
    assert summary["train"]["jpeg"] == 18 and summary["val"]["jpeg"] == 6

    small = sets(size=16, width=0.0625, crops=1, batch=8, epochs=2, grid=1)
    common = ("--latents", teacher, "--preset", "small")
    trained = lpips("train", "--data", data, "--out", tmp_path / "trunk", *common, *small).json
    assert 0 <= trained["top1"] <= 1 and trained["classes"] == 3

    judged = ("--data", tmp_path / "judged", "--latents", teacher, "--preset", "small")
    words = ("--weights", tmp_path / "trunk", "--out", tmp_path / "heads", *sets(**{"heads.epochs": 2}))
    fitted = lpips("calibrate", *judged, *words).json
    assert 0 <= fitted["accuracy"] <= 1 and load_lpips(tmp_path / "heads").config.channels == 4

    file = tmp_path / "scores" / "score.json"
    words = ("--weights", tmp_path / "heads", "--baselines", "l2,ssim", "--out", file, *sets(resamples=20))
    scored = lpips("score", *judged, *words).json
    assert scored["two_afc"]["mean"] == pytest.approx(fitted["accuracy"], abs=0.02)
    assert set(scored["baselines"]) == {"l2", "ssim"} and file.is_file()

    words = ("--weights", tmp_path / "heads", "--families", "none,b", "--steps", 3, *sets(size=16, count=1))
    final = lpips("overfit", "--data", data, *common, *words, "--out", tmp_path / "fit").json["final"]
    assert set(final) == {"none", "b"} and final["b"]["pixel_mse"] > 0


@pytest.mark.parametrize("command", WORKS)
def test_dry_runs_touch_nothing_and_presets_are_named(
    lpips: Any, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = lpips(command, "--dry-run", "--seed", 7).json
    assert plan["config"]["seed"] == 7 and "out" in plan and list(tmp_path.iterdir()) == []
    said = lpips(command, "--preset", "smal")
    hint = "known: patches, pictures" if command == "triplets" else "did you mean 'small'?"
    assert said.code == 2 and hint in said.stderr
    said = lpips(command, "--set", "sed=1")
    assert said.code == 2 and "did you mean 'seed'?" in said.stderr
    said = lpips(command)
    assert said.code == 2 and "is not set; give --" in said.stderr and list(tmp_path.iterdir()) == []


def test_failures_are_one_line(lpips: Any, teacher: Path, tmp_path: Path) -> None:
    said = lpips("train", "--data", tmp_path / "no", "--latents", teacher, "--out", tmp_path / "out")
    assert said.code == 1 and said.stderr.strip().splitlines()[-1].startswith("error: ")
    said = lpips("score", "--pixels", "vg", "--data", tmp_path)
    assert said.code == 2 and "expected vgg, alex or squeeze" in said.stderr
    said = lpips("train", "--data", tmp_path, "--latents", tmp_path, "--out", tmp_path / "out")
    assert said.code == 1 and "no model_index.json" in said.stderr
