"""`d2g lpips overfit`: a small version of the supplement's single-sample experiment."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tiny
from d2g.core.distributed import checkpoint
from d2g.core.errors import SettingError, UserError
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode, encode, from_uint8
from labeled import save_classes
from latent_lpips import load_lpips
from latent_lpips.training.config import OverfitConfig
from latent_lpips.training.crops import center_crop_resized
from latent_lpips.training.overfit import overfit_latents
from latent_lpips.weights import save_lpips


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classes(tmp_path_factory.mktemp("overfit") / "data", 2)


def config(data: Path, teacher: Path, **settings: Any) -> OverfitConfig:
    default = OverfitConfig(
        data=str(data),
        latents=str(teacher),
        weights=str(teacher / "latent_lpips"),
        families=("none", "bg"),
        count=2,
        size=32,
        steps=40,
        lr=0.05,
        report_steps=10,
        checkpoint_steps=15,
    )
    return replace(default, **settings)


def test_it_converges_and_reports_its_files(data: Path, teacher: Path, tmp_path: Path) -> None:
    """60 steps, because rounding grows: a change of 1e-6 to the first noise moves the distance under `bg`
    after 40 steps to between 0.77 and 0.81 of the first one, and after 60 to 0.71 (docs/LOG.md)."""
    result = overfit_latents(config(data, teacher, steps=60), tmp_path)
    assert set(result.final) == {"none", "bg"} and set(result.order) == set(result.final)
    assert result.images == ["00.png", "01.png"]
    for families, final in result.final.items():
        lines = read_stats(tmp_path / families)
        assert [line["nimg"] for line in lines] == [0, 10, 20, 30, 40, 50, 60]
        assert final["latent_lpips"] == lines[-1]["latent_lpips"] < 0.75 * lines[0]["latent_lpips"]
    first = [read_stats(tmp_path / families)[0] for families in ("none", "bg")]
    assert first[0]["latent_lpips"] == first[1]["latent_lpips"]  # both start from the same noise
    with Image.open(result.decoded) as decoded, Image.open(result.plot) as plot:
        assert decoded.size == (2 * 34, 3 * 34) and plot.size[0] > 500
    assert (tmp_path / "curves.svg").read_text().count("<path") > 4


def test_reported_errors_match_the_saved_latents(data: Path, teacher: Path, tmp_path: Path) -> None:
    result = overfit_latents(config(data, teacher, families=("none",)), tmp_path)
    last = checkpoint.latest(tmp_path / "none" / "checkpoints")
    assert last is not None and last.nimg == 40
    x, vae = last.tensors("latents")["x"], pretrained.load_vae(str(teacher))
    pictures = [center_crop_resized(Image.open(data / "blue" / f"0{i}.png"), 32, 1.0) for i in range(2)]
    with torch.no_grad():
        target = encode(vae, from_uint8(torch.stack(pictures)))
        distance = load_lpips(teacher / "latent_lpips")(x, target).mean().item()
        error = (decode(vae, x).clamp(-1, 1) - decode(vae, target).clamp(-1, 1)).square().mean() / 4
    assert result.final["none"]["latent_lpips"] == pytest.approx(distance, rel=1e-4)
    assert result.final["none"]["pixel_mse"] == pytest.approx(error.item(), rel=1e-3)


@pytest.mark.slow
def test_resumed_and_extended_runs_equal_an_unbroken_one(data: Path, teacher: Path, tmp_path: Path) -> None:
    uninterrupted, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    result = overfit_latents(config(data, teacher, families=("bg",)), uninterrupted)
    overfit_latents(config(data, teacher, families=("bg",), steps=17), resumed)
    repeated = overfit_latents(config(data, teacher, families=("bg",)), resumed)
    assert repeated.final == result.final
    lines = [
        [{k: v for k, v in line.items() if k != "time"} for line in read_stats(folder / "bg")]
        for folder in (uninterrupted, resumed)
    ]
    assert lines[0] == lines[1]
    assert overfit_latents(config(data, teacher, families=("bg",)), resumed).final == result.final
    with pytest.raises(UserError, match=r"another config: lr \(0.05 -> 0.1\)"):
        overfit_latents(config(data, teacher, families=("bg",), lr=0.1), resumed)


def test_bad_input_is_refused(data: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 6 pictures, expected 9; set count"):
        overfit_latents(config(data, teacher, count=9), tmp_path)
    with pytest.raises(UserError, match="size is 30 pixels"):
        overfit_latents(config(data, teacher, size=30), tmp_path)
    with pytest.raises(SettingError, match="families"):
        config(data, teacher, families=("bx",))
    with pytest.raises(SettingError, match="families"):
        config(data, teacher, families=("b", "b"))
    with pytest.raises(SettingError, match="weights is not set; give --weights"):
        overfit_latents(config(data, teacher, weights=""), tmp_path)
    broken = load_lpips(teacher / "latent_lpips", fold=False)
    next(broken.trunk.parameters()).fill_(torch.nan)
    save_lpips(broken, tmp_path / "broken", {})
    with pytest.raises(FloatingPointError, match="overfit none: loss is nan at step 0; lower lr"):
        overfit_latents(config(data, teacher, weights=str(tmp_path / "broken")), tmp_path)


def test_other_inputs_under_the_same_names_are_refused(data: Path, teacher: Path, tmp_path: Path) -> None:
    for name, source in (("data", data), ("weights", teacher / "latent_lpips"), ("vae", teacher / "vae")):
        shutil.copytree(source, tmp_path / name)
    same = config(tmp_path / "data", tmp_path / "vae", weights=str(tmp_path / "weights"))
    same = replace(same, families=("b",), steps=2)
    out = tmp_path / "out"
    overfit_latents(same, out)
    # The same content is accepted wherever it lies.
    (tmp_path / "moved").symlink_to(tmp_path)
    names = {"data": "data", "latents": "vae", "weights": "weights"}
    moved = {name: str(tmp_path / "moved" / folder) for name, folder in names.items()}
    overfit_latents(replace(same, **moved), out)
    assert json.loads((out / "b" / "config.json").read_text())["data"] == moved["data"]

    metric = load_lpips(tmp_path / "weights", fold=False)
    metric.heads[0][0] += 0.5
    save_lpips(metric, tmp_path / "weights", {})
    with pytest.raises(UserError, match="another config: metric"):
        overfit_latents(same, out)
    shutil.copytree(teacher / "latent_lpips", tmp_path / "weights", dirs_exist_ok=True)

    shutil.copy(data / "red" / "00.png", tmp_path / "data" / "blue" / "00.png")
    with pytest.raises(UserError, match="another config: pictures"):
        overfit_latents(same, out)
    shutil.copytree(data, tmp_path / "data", dirs_exist_ok=True)

    tiny.save_teacher(tmp_path / "other", seed=1)
    shutil.copytree(tmp_path / "other" / "vae", tmp_path / "vae", dirs_exist_ok=True)
    with pytest.raises(UserError, match="another config: autoencoder"):
        overfit_latents(same, out)


def test_reports_without_a_checkpoint_are_dropped_and_fewer_steps_are_refused(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    settings = config(data, teacher, families=("none",))
    result = overfit_latents(settings, tmp_path)
    shutil.rmtree(tmp_path / "none" / "checkpoints")
    assert overfit_latents(settings, tmp_path).final == result.final
    assert [line["nimg"] for line in read_stats(tmp_path / "none")] == [0, 10, 20, 30, 40]
    with pytest.raises(
        UserError, match="a run of 40 steps, more than the 30 asked for; ask for 40 or more, or"
    ):
        overfit_latents(replace(settings, steps=30), tmp_path)
