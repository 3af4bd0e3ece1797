"""`d2g lpips calibrate`: fitting heads to judgments in the layout of BAPPS."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from d2g.core.errors import SettingError, UserError
from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode
from jobs import d2g_ranks, succeed
from labeled import save_judgments
from latent_lpips import load_lpips
from latent_lpips.config import CalibrateConfig
from latent_lpips.training.bapps import image_batches, open_split
from latent_lpips.training.calibrate import calibrate_folder
from latent_lpips.training.config import HeadsConfig, PatchConfig, ScoreConfig
from latent_lpips.training.score import score_folder
from latent_lpips.weights import read_lpips_meta, save_lpips


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bapps")
    for number, name in enumerate(("train/cnn", "train/noise", "val/cnn", "val/noise")):
        save_judgments(root / name, 12, seed=number)
    return root


def config(data: Path, teacher: Path, **settings: Any) -> HeadsConfig:
    default = HeadsConfig(
        data=str(data),
        latents=str(teacher),
        weights=str(teacher / "latent_lpips"),
        heads=CalibrateConfig(lr=0.05, epochs=20, batch=8, held_out=0.25),
        patch=PatchConfig(batch=5),
    )
    return replace(default, **settings)


def test_only_heads_are_fitted(data: Path, teacher: Path, tmp_path: Path) -> None:
    result = calibrate_folder(config(data, teacher), tmp_path / "out")
    assert result.accuracy > 0.8 and set(result.by_split) == {"cnn", "noise"}
    assert (result.train, result.held_out) == (24, 24)
    assert result.accuracy == pytest.approx(sum(result.by_split.values()) / 2)
    before, after = load_lpips(teacher / "latent_lpips"), load_lpips(tmp_path / "out")
    pairs = zip(before.trunk.parameters(), after.trunk.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    heads = torch.cat(list(after.heads))
    assert heads.min() >= 0 and heads.std() > 0.01
    assert (heads == 0).float().mean().item() == pytest.approx(result.zeros)
    meta = read_lpips_meta(tmp_path / "out")
    assert meta["calibrated"] and meta["two_afc"] == result.accuracy and meta["note"] == "random"


def test_a_killed_run_continues_with_its_cached_features(data: Path, teacher: Path, tmp_path: Path) -> None:
    uninterrupted, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    calibrate_folder(config(data, teacher), uninterrupted)
    calibrate_folder(config(data, teacher), resumed)
    shard = min((resumed / "run" / "features").glob("cnn-*.npy"))
    mtimes = {
        f.name: f.stat().st_mtime_ns for f in (resumed / "run" / "features").glob("*.npy") if f != shard
    }
    shard.unlink()
    (resumed / "lpips.safetensors").unlink()
    calibrate_folder(config(data, teacher), resumed)
    assert {n: (resumed / "run" / "features" / n).stat().st_mtime_ns for n in mtimes} == mtimes
    left, right = (load_file(folder / "lpips.safetensors") for folder in (uninterrupted, resumed))
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_two_processes_equal_one(data: Path, teacher: Path, tmp_path: Path) -> None:
    one = config(data, teacher)
    calibrate_folder(one, tmp_path / "one")
    words = ["lpips", "calibrate", "--preset", "small", "--json", "--data", one.data]
    words += ["--latents", one.latents, "--weights", one.weights, "--out", str(tmp_path / "two")]
    for setting in ("heads.lr=0.05", "heads.epochs=20", "heads.batch=8", "patch.batch=5"):
        words += ["--set", setting]
    succeed(*d2g_ranks(words, tmp_path))
    left, right = (load_file(tmp_path / name / "lpips.safetensors") for name in ("one", "two"))
    for key, value in left.items():
        torch.testing.assert_close(right[key], value, rtol=1e-4, atol=1e-6)


def test_a_folder_without_parts_is_split_upsampled_and_sets_the_scale(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    bare = config(data / "train" / "cnn", teacher, patch=PatchConfig(upsample=32), unrelated=0.5)
    result = calibrate_folder(bare, tmp_path / "out")
    assert (result.train, result.held_out, result.by_split) == (9, 3, {"cnn": result.accuracy})
    flat = torch.cat(list(load_lpips(tmp_path / "out").heads))
    other = calibrate_folder(replace(bare, unrelated=None), tmp_path / "plain")
    plain = torch.cat(list(load_lpips(tmp_path / "plain").heads))
    torch.testing.assert_close(flat / flat.sum(), plain / plain.sum())
    assert other.accuracy == result.accuracy and not torch.allclose(flat, plain)


def test_no_picture_is_on_both_sides_of_the_split(data: Path, teacher: Path, tmp_path: Path) -> None:
    """Twelve judgments of four pictures: BAPPS names its files PICTURE.PATCH.png or the like."""
    split = tmp_path / "split"
    for folder in sorted((data / "train" / "cnn").iterdir()):
        (split / folder.name).mkdir(parents=True)
        for number, file in enumerate(sorted(folder.iterdir())):
            shutil.copy(file, split / folder.name / f"{number % 4}.{number}{file.suffix}")
    result = calibrate_folder(config(split, teacher), tmp_path / "out")
    assert (result.train, result.held_out) == (9, 3)
    # Twelve judgments of one picture leave nothing to hold out.
    for file in split.rglob("*.*.*"):
        file.rename(file.with_name(f"0{file.name[1:]}"))
    with pytest.raises(UserError, match="the number of distinct pictures is 1; expected at least 2"):
        calibrate_folder(config(split, teacher), tmp_path / "one")


def test_bad_input_is_refused(data: Path, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SettingError, match="weights is not set; give --weights"):
        calibrate_folder(HeadsConfig(data="x", latents="y"), out)
    tiny.save_lpips(tmp_path / "wide", channels=16)
    with pytest.raises(UserError, match="weights take latents of 16 channels, expected 4"):
        calibrate_folder(config(data, teacher, weights=str(tmp_path / "wide")), out)
    with pytest.raises(UserError, match=r"a patch .* is 18 pixels"):
        calibrate_folder(config(data, teacher, patch=PatchConfig(upsample=18)), out)
    calibrate_folder(config(data, teacher), tmp_path / "first")
    with pytest.raises(UserError, match=r"another config: patch.upsample \(0 -> 32\)"):
        calibrate_folder(config(data, teacher, patch=PatchConfig(upsample=32)), tmp_path / "first")
    shard = min((tmp_path / "first" / "run" / "features").glob("cnn-*.npy"))
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"cnn-.*-00000.*npy is damaged"):
        calibrate_folder(config(data, teacher), tmp_path / "first")


def test_fitting_does_not_depend_on_earlier_heads(data: Path, teacher: Path, tmp_path: Path) -> None:
    other = load_lpips(teacher / "latent_lpips", fold=False)
    for head in other.heads:
        head[::2] = 0
    save_lpips(other, tmp_path / "other", {})
    plain = calibrate_folder(config(data, teacher), tmp_path / "a")
    refitted = calibrate_folder(config(data, teacher, weights=str(tmp_path / "other")), tmp_path / "b")
    assert refitted.before == plain.before > 0.6
    pairs = zip(load_lpips(tmp_path / "a").heads, load_lpips(tmp_path / "b").heads, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_other_fits_reuse_cached_features(data: Path, teacher: Path, tmp_path: Path) -> None:
    """Features do not depend on heads, seed and batch size, but on the contents of files, also of files with
    equal name and size.
    """
    shutil.copytree(data, tmp_path / "data")
    out, first = tmp_path / "out", config(tmp_path / "data", teacher)

    def stamps() -> dict[str, int]:
        return {f.name: f.stat().st_mtime_ns for f in (out / "run" / "features").iterdir()}

    calibrate_folder(first, out)
    before, plain = stamps(), read_lpips_meta(out)
    heads = replace(first.heads, lr=0.01)
    calibrate_folder(replace(first, seed=1, heads=heads, patch=PatchConfig(batch=7)), out)
    assert stamps() == before and read_lpips_meta(out)["heads"]["lr"] == 0.01 != plain["heads"]["lr"]
    assert plain["patch"] == {"load": 0, "upsample": 0}
    changed = tmp_path / "data" / "val" / "cnn" / "p0" / "003.png"
    known = changed.stat()
    os.utime(changed, ns=(known.st_atime_ns, known.st_mtime_ns + 1))
    calibrate_folder(first, out)
    assert len(set(stamps()) - set(before)) == 2  # the shard and the metadata of one split


def test_accuracy_is_the_mean_of_the_scores_of_splits(data: Path, teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    save_judgments(tmp_path / "data" / "val" / "third", 3, seed=9)
    settings = config(tmp_path / "data", teacher)
    fitted = calibrate_folder(settings, tmp_path / "out")
    scored = score_folder(
        ScoreConfig(data=settings.data, latents=settings.latents, weights=fitted.out, resamples=0)
    )
    assert fitted.by_split == {k: pytest.approx(v) for k, v in scored.two_afc.items() if k != "mean"}
    assert fitted.accuracy == pytest.approx(scored.two_afc["mean"])
    assert fitted.accuracy == pytest.approx(sum(fitted.by_split.values()) / 3)


def test_weights_of_another_latent_space_are_refused(data: Path, teacher: Path, tmp_path: Path) -> None:
    trunk = load_lpips(teacher / "latent_lpips", fold=False)
    save_lpips(trunk, tmp_path / "own", {"autoencoder": "mine", "autoencoder_sha256": "abc" * 20})
    with pytest.raises(
        UserError, match=r"belong to the latents of mine \(sha256 abcabcabcabc\), got .*teacher"
    ):
        calibrate_folder(config(data, teacher, weights=str(tmp_path / "own")), tmp_path / "out")
    save_lpips(trunk, tmp_path / "sd15", {"scaling_factor": 0.18215, "shift_factor": 0.0})
    with pytest.raises(UserError, match=r"take latents of scale 0.18215 and shift 0, .* has 0.7 and 0; give"):
        calibrate_folder(config(data, teacher, weights=str(tmp_path / "sd15")), tmp_path / "out")
    save_lpips(trunk, tmp_path / "same", {"scaling_factor": 0.7, "shift_factor": 0.0})
    calibrate_folder(config(data, teacher, weights=str(tmp_path / "same")), tmp_path / "out")
    calibrated = str(tmp_path / "out")  # records its autoencoder
    assert calibrate_folder(config(data, teacher, weights=calibrated), tmp_path / "again").accuracy > 0.5


def test_non_finite_or_empty_data_is_refused(data: Path, teacher: Path, tmp_path: Path) -> None:
    wild = config(data, teacher, heads=CalibrateConfig(lr=1e30))
    with pytest.raises(UserError, match=r"heads.*; lower the learning rate \(1e\+30\)"):
        calibrate_folder(wild, tmp_path / "wild")
    assert not (tmp_path / "wild" / "config.json").exists()
    broken = load_lpips(teacher / "latent_lpips", fold=False)
    next(broken.trunk.parameters())[0] = torch.nan
    save_lpips(broken, tmp_path / "broken", {})
    with pytest.raises(UserError, match="features of split cnn are not finite"):
        calibrate_folder(config(data, teacher, weights=str(tmp_path / "broken")), tmp_path / "out")
    shutil.copytree(data / "train", tmp_path / "data" / "train")
    (tmp_path / "data" / "val").mkdir()
    with pytest.raises(UserError, match="data/val holds no 2AFC judgments"):
        calibrate_folder(config(tmp_path / "data", teacher), tmp_path / "empty")


def test_the_scale_is_set_on_shuffled_references(teacher: Path, tmp_path: Path) -> None:
    """Neighboring judgments share their reference image, and a distance of 0 must not affect the scale."""
    bare = tmp_path / "pairs"
    save_judgments(bare, 16)
    for number in range(0, 16, 2):
        shutil.copy(bare / "ref" / f"{number:03d}.png", bare / "ref" / f"{number + 1:03d}.png")
    calibrate_folder(config(bare, teacher, unrelated=1.0), tmp_path / "out")
    metric, vae = load_lpips(tmp_path / "out"), pretrained.load_vae(str(teacher))
    with torch.no_grad():
        latents = encode(vae, next(image_batches(open_split(bare), 0, 16))[0])[::2]
        mean_distance = metric(latents, latents.roll(1, 0)).mean().item()
    assert 0.8 < mean_distance < 1.4  # about 2 if every other pair were equal
