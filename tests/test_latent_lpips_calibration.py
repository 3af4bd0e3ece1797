"""`d2g lpips calibrate`: heads from judgements in BAPPS' layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from core.errors import SettingError, UserError
from jobs import d2g_ranks
from labelled import save_judgements
from latent_lpips import load
from latent_lpips.calibration import calibrate_folder
from latent_lpips.config import CalibrateConfig
from latent_lpips.recipes import HeadsConfig, PatchConfig
from latent_lpips.weights import read_meta, save


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bapps")
    for number, name in enumerate(("train/cnn", "train/noise", "val/cnn", "val/noise")):
        save_judgements(root / name, 12, seed=number)
    return root


def config(data: Path, teacher: Path, **settings: Any) -> HeadsConfig:
    made = HeadsConfig(
        data=str(data),
        latents=str(teacher),
        weights=str(teacher / "latent_lpips"),
        heads=CalibrateConfig(lr=0.05, epochs=20, batch=8, held_out=0.25),
        patch=PatchConfig(batch=5),
    )
    return replace(made, **settings)


def test_heads_are_fitted_and_the_trunk_is_not(data: Path, teacher: Path, tmp_path: Path) -> None:
    result = calibrate_folder(config(data, teacher), tmp_path / "out")
    assert result.accuracy > 0.8 and set(result.by_split) == {"cnn", "noise"}
    assert (result.train, result.held_out) == (24, 24)
    assert result.accuracy == pytest.approx(sum(result.by_split.values()) / 2)
    before, after = load(teacher / "latent_lpips"), load(tmp_path / "out")
    pairs = zip(before.trunk.parameters(), after.trunk.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    heads = torch.cat(list(after.heads))
    assert heads.min() >= 0 and heads.std() > 0.01
    assert (heads == 0).float().mean().item() == pytest.approx(result.zeros)
    meta = read_meta(tmp_path / "out")
    assert meta["calibrated"] and meta["two_afc"] == result.accuracy and meta["note"] == "random"


def test_a_killed_run_goes_on_from_its_features(data: Path, teacher: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    calibrate_folder(config(data, teacher), whole)
    calibrate_folder(config(data, teacher), broken)
    (shard,) = (broken / "run" / "features").glob("2-cnn-*.npy")
    kept = {f.name: f.stat().st_mtime_ns for f in (broken / "run" / "features").glob("*.npy") if f != shard}
    shard.unlink()
    (broken / "lpips.safetensors").unlink()
    calibrate_folder(config(data, teacher), broken)
    assert {n: (broken / "run" / "features" / n).stat().st_mtime_ns for n in kept} == kept
    left, right = (load_file(folder / "lpips.safetensors") for folder in (whole, broken))
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_two_processes_equal_one(data: Path, teacher: Path, tmp_path: Path) -> None:
    one = config(data, teacher)
    calibrate_folder(one, tmp_path / "one")
    words = ["lpips", "calibrate", "--preset", "small", "--json", "--data", one.data]
    words += ["--latents", one.latents, "--weights", one.weights, "--out", str(tmp_path / "two")]
    for setting in ("heads.lr=0.05", "heads.epochs=20", "heads.batch=8", "patch.batch=5"):
        words += ["--set", setting]
    for ended in d2g_ranks(words, tmp_path):
        assert ended.code == 0, ended.err
    left, right = (load_file(tmp_path / name / "lpips.safetensors") for name in ("one", "two"))
    for key, value in left.items():
        torch.testing.assert_close(right[key], value, rtol=1e-4, atol=1e-6)


def test_a_bare_folder_is_split_and_upsampled_and_the_scale_set(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    bare = config(data / "train" / "cnn", teacher, patch=PatchConfig(upsample=32), unrelated=0.5)
    result = calibrate_folder(bare, tmp_path / "out")
    assert (result.train, result.held_out, result.by_split) == (9, 3, {})
    flat = torch.cat(list(load(tmp_path / "out").heads))
    other = calibrate_folder(replace(bare, unrelated=None), tmp_path / "plain")
    plain = torch.cat(list(load(tmp_path / "plain").heads))
    torch.testing.assert_close(flat / flat.sum(), plain / plain.sum())
    assert other.accuracy == result.accuracy and not torch.allclose(flat, plain)


def test_bad_input(data: Path, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SettingError, match="weights is not set; give --weights"):
        calibrate_folder(HeadsConfig(data="x", latents="y"), out)
    tiny.save_lpips(tmp_path / "wide", channels=16)
    with pytest.raises(UserError, match="weights take latents of 16 channels, expected 4"):
        calibrate_folder(config(data, teacher, weights=str(tmp_path / "wide")), out)
    with pytest.raises(UserError, match=r"a patch .* is 18 pixels"):
        calibrate_folder(config(data, teacher, patch=PatchConfig(upsample=18)), out)
    calibrate_folder(config(data, teacher), tmp_path / "first")
    with pytest.raises(UserError, match=r"another config: seed \(0 -> 1\)"):
        calibrate_folder(config(data, teacher, seed=1), tmp_path / "first")
    (shard,) = (tmp_path / "first" / "run" / "features").glob("0-cnn-*.npy")
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"0-cnn-00000.*npy is damaged"):
        calibrate_folder(config(data, teacher), tmp_path / "first")


def test_heads_are_fitted_anew_whatever_they_were(data: Path, teacher: Path, tmp_path: Path) -> None:
    other = load(teacher / "latent_lpips", fold=False)
    for head in other.heads:
        head[::2] = 0
    save(other, tmp_path / "other", {})
    plain = calibrate_folder(config(data, teacher), tmp_path / "a")
    again = calibrate_folder(config(data, teacher, weights=str(tmp_path / "other")), tmp_path / "b")
    assert again.before == plain.before > 0.6
    pairs = zip(load(tmp_path / "a").heads, load(tmp_path / "b").heads, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
