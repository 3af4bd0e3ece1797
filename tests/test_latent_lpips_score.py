"""2AFC and JND scores, their intervals, and the baselines, against published implementations."""

import json
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.image import structural_similarity_index_measure

from core.errors import SettingError, UserError
from labelled import save_differences, save_judgements
from latent_lpips.baselines import squared_error, structural_distance, structural_similarity
from latent_lpips.recipes import PatchConfig, ScoreConfig
from latent_lpips.score import intervals, jnd_score, score_folder, two_afc_rows, two_afc_score


def published_jnd(distances: np.ndarray, same: np.ndarray) -> float:
    """lpips.trainer.score_jnd_dataset's arithmetic around its own voc_ap."""
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


def test_jnd_of_a_perfect_a_blind_and_an_impossible_order() -> None:
    same = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert jnd_score(torch.tensor([[0.1], [0.2], [0.3], [0.4]]), same) == 1.0
    assert jnd_score(torch.tensor([[0.4], [0.3], [0.2], [0.1]]), same) == pytest.approx(0.5)
    assert np.isnan(jnd_score(torch.rand(3, 1), torch.zeros(3)))


def test_two_afc_by_hand() -> None:
    d = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
    answers = torch.tensor([0.25, 0.75, 0.9])
    assert two_afc_rows(d, answers).tolist() == pytest.approx([0.75, 0.75, 0.5])
    assert two_afc_score(d, answers) == pytest.approx(2 / 3)


def test_intervals_cover_as_often_as_they_say_and_repeat() -> None:
    """Of a share of 0.8 in 150 judgements, intervals hold 0.8 in about 95 % of worlds."""
    held, first = 0, None
    for world in range(60):
        right = torch.rand(150, generator=torch.Generator().manual_seed(world)) < 0.8
        d = torch.stack([right.double(), 1 - right.double()], 1)
        found = intervals({"a": d}, {"a": torch.ones(150)}, two_afc_score, 200, 0)
        first = first or (d, found)
        held += found["a"][0] <= 0.8 <= found["a"][1]
    assert 52 <= held <= 60
    assert first is not None
    assert intervals({"a": first[0]}, {"a": torch.ones(150)}, two_afc_score, 200, 0) == first[1]
    assert intervals({"a": first[0]}, {"a": torch.ones(150)}, two_afc_score, 200, 1) != first[1]
    assert intervals({"a": first[0]}, {"a": torch.ones(150)}, two_afc_score, 0, 0) == {}


def test_ssim_is_the_published_one() -> None:
    a = torch.rand(3, 3, 40, 33) * 2 - 1
    b = (a + 0.3 * torch.randn_like(a)).clamp(-1, 1)
    _, full = structural_similarity_index_measure(
        b.double(), a.double(), data_range=2.0, sigma=1.5, kernel_size=11, return_full_image=True
    )
    theirs = full[:, :, 5:-5, 5:-5].mean((1, 2, 3))  # it counts a border of reflected pixels too
    torch.testing.assert_close(structural_similarity(a, b).double(), theirs, rtol=1e-5, atol=1e-6)
    assert structural_distance(a, a).abs().max() < 1e-6
    assert squared_error(a, a + 0.5).tolist() == pytest.approx([0.25] * 3)
    with pytest.raises(UserError, match="SSIM takes images of 11 pixels or more, got 10x40"):
        structural_similarity(a[:, :, :, :10], b[:, :, :, :10])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bapps")
    save_judgements(root / "train" / "noise", 4)
    save_judgements(root / "val" / "noise", 10)
    save_judgements(root / "val" / "other", 6, seed=3)
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
    assert result.judgements == {"two_afc": {"noise": 10, "other": 6}, "jnd": {"noise": 10}}
    low, high = result.ci["two_afc"]["noise"]
    assert 0 <= low <= result.two_afc["noise"] <= high <= 1
    again = score_folder(ScoreConfig(**{f: getattr(config, f) for f in config.__slots__}))
    assert again.two_afc == result.two_afc and again.ci == result.ci
    assert json.loads((tmp_path / "score.json").read_text())["two_afc"] == result.two_afc


def test_lpips_in_pixels_is_scored_with_a_weights_file(data: Path, teacher: Path, tmp_path: Path) -> None:
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


def test_bad_settings(data: Path, teacher: Path) -> None:
    with pytest.raises(SettingError, match="baselines"):
        ScoreConfig(baselines=("l2", "psnr"))
    with pytest.raises(SettingError, match="'lpips_weights' is set but 'lpips' is not"):
        ScoreConfig(lpips_weights="x")
    with pytest.raises(SettingError, match="resamples"):
        ScoreConfig(resamples=3)
    weights = str(teacher / "latent_lpips")
    with pytest.raises(SettingError, match="latents is not set; give --latents"):
        score_folder(ScoreConfig(data=str(data), weights=weights))
    small = ScoreConfig(data=str(data), weights=weights, latents=str(teacher), patch=PatchConfig(load=12))
    with pytest.raises(UserError, match=r"a patch .* is 12 pixels; .* multiples of 4, 16 or more"):
        score_folder(small)
