"""2AFC and JND scores, their intervals and the baselines, against published implementations."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.image import structural_similarity_index_measure

from d2g.core.errors import SettingError, UserError
from labeled import save_differences, save_judgments
from latent_lpips import load_lpips
from latent_lpips.training.bapps import open_split, picture_numbers
from latent_lpips.training.baselines import pixel_squared_error, ssim, ssim_distance
from latent_lpips.training.config import PatchConfig, ScoreConfig
from latent_lpips.training.score import (
    bootstrap_intervals,
    human_agreement,
    jnd_score,
    score_folder,
    two_afc_score,
)
from latent_lpips.weights import save_lpips


def published_jnd(distances: np.ndarray, same: np.ndarray) -> float:
    """The computation of lpips.trainer.score_jnd_dataset, with its voc_ap."""
    same = same[np.argsort(distances, kind="stable")]
    true, false = np.cumsum(same), np.cumsum(1 - same)
    return float(lpips.voc_ap(true / same.sum(), true / (true + false)))


@given(st.integers(0, 10_000), st.integers(2, 60))
def test_jnd_is_the_published_average_precision(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    distances, same = rng.random(count), rng.choice([0.0, 1 / 3, 2 / 3, 1.0], count)
    same[0] = 1.0
    ours = jnd_score(torch.from_numpy(distances)[:, None], torch.from_numpy(same))
    assert ours == pytest.approx(published_jnd(distances, same), abs=1e-9)


def test_jnd_of_perfect_uninformative_and_invalid_rankings() -> None:
    same = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert jnd_score(torch.tensor([[0.1], [0.2], [0.3], [0.4]]), same) == 1.0
    assert jnd_score(torch.tensor([[0.4], [0.3], [0.2], [0.1]]), same) == pytest.approx(0.5)
    assert np.isnan(jnd_score(torch.rand(3, 1), torch.zeros(3)))


def test_two_afc_closed_form() -> None:
    d = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
    answers = torch.tensor([0.25, 0.75, 0.9])
    each = [two_afc_score(d[i : i + 1], answers[i : i + 1]) for i in range(3)]
    assert each == pytest.approx([0.75, 0.75, 0.5])
    assert two_afc_score(d, answers) == pytest.approx(2 / 3)


def intervals_of_one_split(d: torch.Tensor, resamples: int, seed: int) -> dict[str, list[float]]:
    one = torch.arange(len(d))
    return bootstrap_intervals(
        {"a": d}, {"a": torch.ones(len(d))}, {"a": one}, two_afc_score, resamples, seed
    )


def test_confidence_intervals_have_their_nominal_coverage_and_are_repeatable() -> None:
    """With 150 judgments and a true score of 0.8, about 95 % of the intervals contain 0.8."""
    held, first = 0, None
    for world in range(60):
        right = torch.rand(150, generator=torch.Generator().manual_seed(world)) < 0.8
        d = torch.stack([right.double(), 1 - right.double()], 1)
        result = intervals_of_one_split(d, 200, 0)
        first = first or (d, result)
        held += result["a"][0] <= 0.8 <= result["a"][1]
    assert 52 <= held <= 60
    assert first is not None
    assert intervals_of_one_split(first[0], 200, 0) == first[1] != intervals_of_one_split(first[0], 200, 1)
    assert intervals_of_one_split(first[0], 0, 0) == {}


def test_bootstrap_resamples_images_jointly_in_all_splits() -> None:
    """Ten copies of a judgment do not narrow an interval, and splits with the same images share resamples."""
    right = torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.7
    d = torch.stack([right.double(), 1 - right.double()], 1)
    once = intervals_of_one_split(d, 300, 0)["a"]
    pictures, ones = torch.arange(40).repeat(10), torch.ones(400)
    copied = bootstrap_intervals({"a": d.repeat(10, 1)}, {"a": ones}, {"a": pictures}, two_afc_score, 300, 0)[
        "a"
    ]
    assert copied == pytest.approx(once)

    def mean_of(others: torch.Tensor) -> list[float]:
        both = {"a": d, "b": d.flip(1)}  # the scores of both splits add up to 1 for every image
        pictures = {"a": torch.arange(40), "b": others}
        return bootstrap_intervals(
            both, dict.fromkeys(both, torch.ones(40)), pictures, two_afc_score, 300, 0
        )["mean"]

    assert mean_of(torch.arange(40)) == pytest.approx([0.5, 0.5])
    low, high = mean_of(torch.arange(40, 80))
    assert high - low > 0.1


def test_images_are_identified_by_contents_and_names(tmp_path: Path) -> None:
    save_judgments(tmp_path / "a", 4)
    save_judgments(tmp_path / "b", 4, seed=5)  # the same references
    for name in ("ref", "p0", "p1", "judge"):
        for file in sorted((tmp_path / "a" / name).glob("00[01].*")):
            file.rename(file.with_name(f"x.{file.name}"))
    a, b = (open_split(tmp_path / name) for name in "ab")
    numbers = picture_numbers([a, b])
    by_stem = {paths[0].stem: n for paths, n in zip(a.pictures, numbers["a"].tolist(), strict=True)}
    assert by_stem["x.000"] == by_stem["x.001"] and len(set(by_stem.values())) == 3
    first, second, *rest = numbers["b"].tolist()
    assert first == second == by_stem["x.000"] and rest == [by_stem["002"], by_stem["003"]]
    assert not set(picture_numbers([b])["b"].tolist()) - set(range(4))


def test_human_score_is_the_agreement_of_two_people() -> None:
    assert human_agreement(torch.tensor([0.25])) == pytest.approx(0.625)
    assert human_agreement(torch.tensor([0.0, 0.5, 1.0])) == pytest.approx(2.5 / 3)


def test_non_finite_values_are_refused_or_left_out(data: Path, teacher: Path, tmp_path: Path) -> None:
    broken = load_lpips(teacher / "latent_lpips", fold=False)
    next(broken.trunk.parameters())[0] = torch.nan
    save_lpips(broken, tmp_path / "broken", {})
    settings = ScoreConfig(
        data=str(data), latents=str(teacher), weights=str(tmp_path / "broken"), resamples=20
    )
    with pytest.raises(UserError, match="latent_lpips gives distances that are not finite on noise"):
        score_folder(settings)
    save_differences(tmp_path / "val" / "jnd_set")
    for file in (tmp_path / "val" / "jnd_set" / "same").iterdir():
        np.save(file, np.zeros(1))
    shutil.copytree(data / "jnd" / "val" / "noise", tmp_path / "val" / "noise")
    good = ScoreConfig(
        data=str(tmp_path), latents=str(teacher), weights=str(teacher / "latent_lpips"), resamples=20
    )
    result = score_folder(good)
    assert set(result.jnd) == {"noise", "mean"} == set(result.ci["jnd"])
    assert "NaN" not in json.dumps(asdict(result))


def test_weights_record_their_patch_settings(data: Path, teacher: Path, tmp_path: Path) -> None:
    save_lpips(
        load_lpips(teacher / "latent_lpips", fold=False), tmp_path, {"patch": {"load": 16, "upsample": 32}}
    )
    settings = ScoreConfig(data=str(data), latents=str(teacher), weights=str(tmp_path), resamples=0)
    with pytest.raises(UserError, match=r"set patch.load=16 patch.upsample=32, or calibrate again"):
        score_folder(settings)
    score_folder(replace(settings, patch=PatchConfig(load=16, upsample=32, batch=3)))


def test_ssim_equals_the_published_implementation() -> None:
    a = torch.rand(3, 3, 40, 33) * 2 - 1
    b = (a + 0.3 * torch.randn_like(a)).clamp(-1, 1)
    _, full = structural_similarity_index_measure(
        b.double(), a.double(), data_range=2.0, sigma=1.5, kernel_size=11, return_full_image=True
    )
    theirs = full[:, :, 5:-5, 5:-5].mean((1, 2, 3))  # without its border of reflected pixels
    torch.testing.assert_close(ssim(a, b).double(), theirs, rtol=1e-5, atol=1e-6)
    assert ssim_distance(a, a).abs().max() < 1e-6
    assert pixel_squared_error(a, a + 0.5).tolist() == pytest.approx([0.25] * 3)
    with pytest.raises(UserError, match="SSIM takes images of 11 pixels or more, got 10x40"):
        ssim(a[:, :, :, :10], b[:, :, :, :10])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bapps")
    save_judgments(root / "train" / "noise", 4)
    save_judgments(root / "val" / "noise", 10)
    save_judgments(root / "val" / "other", 6, seed=3)
    save_differences(root / "jnd" / "val" / "noise")
    return root


def test_scores_by_split_with_baselines(data: Path, teacher: Path, tmp_path: Path) -> None:
    config = ScoreConfig(
        data=str(data),
        latents=str(teacher),
        weights=str(teacher / "latent_lpips"),
        baselines=("l2", "ssim"),
        resamples=50,
        patch=PatchConfig(batch=4),
    )
    result = score_folder(config, tmp_path / "score.json")
    assert set(result.two_afc) == {"noise", "other", "mean"} and set(result.jnd) == {"noise", "mean"}
    assert result.baselines["l2"]["two_afc"] == {"noise": 1.0, "other": 1.0, "mean": 1.0}
    assert result.baselines["l2"]["jnd"]["noise"] > 0.85 and result.people["mean"] == 1.0
    assert result.two_afc["mean"] == pytest.approx((result.two_afc["noise"] + result.two_afc["other"]) / 2)
    assert result.judgments == {"two_afc": {"noise": 10, "other": 6}, "jnd": {"noise": 10}}
    low, high = result.ci["two_afc"]["noise"]
    assert 0 <= low <= result.two_afc["noise"] <= high <= 1
    repeated = score_folder(ScoreConfig(**{f: getattr(config, f) for f in config.__slots__}))
    assert repeated.two_afc == result.two_afc and repeated.ci == result.ci
    assert json.loads((tmp_path / "score.json").read_text())["two_afc"] == result.two_afc


def test_pixel_lpips_is_scored_with_a_weights_file(data: Path, teacher: Path, tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    state = {k: v for k, v in squeezenet1_1().state_dict().items() if k.startswith("features")}
    torch.save(state, tmp_path / "squeeze.pth")
    config = ScoreConfig(
        data=str(data / "val" / "noise"),
        latents=str(teacher),
        weights=str(teacher / "latent_lpips"),
        lpips="squeeze",
        lpips_weights=str(tmp_path / "squeeze.pth"),
        resamples=0,
        patch=PatchConfig(load=32),
    )
    result = score_folder(config)
    assert set(result.baselines) == {"lpips_squeeze"} and result.ci == {"two_afc": {}, "jnd": {}}
    assert 0 <= result.baselines["lpips_squeeze"]["two_afc"]["noise"] <= 1 and result.jnd == {}


def test_invalid_settings_are_refused(data: Path, teacher: Path) -> None:
    with pytest.raises(SettingError, match="baselines"):
        ScoreConfig(baselines=("l2", "psnr"))
    with pytest.raises(SettingError, match="lpips_weights is set but lpips is not"):
        ScoreConfig(lpips_weights="x")
    with pytest.raises(SettingError, match="resamples"):
        ScoreConfig(resamples=3)
    weights = str(teacher / "latent_lpips")
    with pytest.raises(SettingError, match="latents is not set; give --latents"):
        score_folder(ScoreConfig(data=str(data), weights=weights))
    small = ScoreConfig(data=str(data), weights=weights, latents=str(teacher), patch=PatchConfig(load=12))
    with pytest.raises(UserError, match=r"a patch .* is 12 pixels; .* multiples of 4, 16 or more"):
        score_folder(small)
