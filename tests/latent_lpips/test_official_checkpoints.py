"""Checkpoint files of the authors: golden values of their package, strict loading, safety, conversion."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import authors
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g_cli.main import app
from latent_lpips import ELatentLPIPS
from latent_lpips.config import LPIPSConfig
from latent_lpips.official_checkpoints import OFFICIAL_SPACES, read_official_checkpoint
from latent_lpips.weights import convert_official_checkpoint, load_lpips, read_lpips_meta

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "elatentlpips.json").read_text())
WIDTH = 1 / 16


@pytest.fixture(scope="module")
def calibrated_files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Calibrated checkpoint files of full width, by seed."""
    folder = tmp_path_factory.mktemp("full")
    seeds = {case["weights"]: case["channels"] for case in GOLDEN["cases"]}
    return {
        seed: authors.tuned_file(folder / f"{seed}.pth", channels, seed) for seed, channels in seeds.items()
    }


@pytest.fixture
def calibrated_file(tmp_path: Path) -> Path:
    return authors.tuned_file(tmp_path / "sd15_latest_vgg16_tuned.pth", 4, 1, WIDTH)


def pair(channels: int = 4) -> tuple[Tensor, Tensor]:
    return noise(3, (0, 1), (channels, 8, 8)), noise(3, (2, 3), (channels, 8, 8))


@pytest.mark.parametrize("fold", [False, True])
def test_distances_equal_the_authors_package(calibrated_files: dict[int, Path], fold: bool) -> None:
    """Distances equal those of elatentlpips 0.2 without augmentation to 1e-5 in fp32; `made_by` in the golden
    file describes how they were computed.
    """
    metrics = {seed: load_lpips(file, fold=fold) for seed, file in calibrated_files.items()}
    for case in GOLDEN["cases"]:
        shape, metric = (case["channels"], *case["size"]), metrics[case["weights"]]
        pred, target = (noise(3, rows, shape) for rows in ((0, 1), (2, 3)))
        if case.get("normalize"):
            pred, target = (OFFICIAL_SPACES[case["space"]].scaled(x) for x in (pred, target))
        distance = ELatentLPIPS(metric, "none", l1=float(case.get("l1", False)))(pred, target)
        assert distance.tolist() == pytest.approx(case["distance"], rel=1e-5), case["space"]


def test_golden_values_cover_all_published_latent_spaces() -> None:
    assert {case["space"] for case in GOLDEN["cases"]} == set(OFFICIAL_SPACES)


def test_a_calibrated_file_contains_trunk_heads_and_metadata(
    calibrated_file: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    metric, facts = read_official_checkpoint(calibrated_file)
    state = torch.load(calibrated_file, weights_only=True)
    assert torch.equal(metric.trunk.state_dict()["features.40.weight"], state["net.slice5.40.weight"])
    assert torch.equal(metric.heads[3], state["lin3.model.1.weight"].flatten())
    assert metric.config == LPIPSConfig(channels=4, width=WIDTH)
    assert facts | {"sha256": ""} == {
        "source": "elatentlpips, sd15_latest_vgg16_tuned.pth",
        "sha256": "",
        "license": "CC-BY-NC-4.0",
        "calibrated": True,
        "latent_space": "sd15",
        "scaling_factor": 0.18215,
        "shift_factor": 0.0,
    }
    output = capsys.readouterr()
    assert output.out == "" and caplog.text.count("CC-BY-NC-4.0: for non-commercial use only") == 1


def test_a_trunk_file_is_the_uncalibrated_distance(tmp_path: Path, calibrated_file: Path) -> None:
    file = authors.trunk_file(tmp_path / "sd15_latent_vgg16.pth.tar", 4, 1, WIDTH, hidden=8)
    trunk, facts = read_official_checkpoint(file)
    assert not facts["calibrated"] and all(torch.equal(h, torch.ones_like(h)) for h in trunk.heads)
    calibrated, _ = read_official_checkpoint(calibrated_file)  # same seed, same trunk
    shares = zip(trunk.channel_means(*pair()), calibrated.channel_means(*pair()), strict=True)
    assert all(torch.equal(a, b) for a, b in shares)
    assert load_lpips(file)(*pair()).shape == (2,)


@pytest.mark.parametrize(
    ("space", "channels"), [(name, space.channels) for name, space in OFFICIAL_SPACES.items()]
)
def test_every_space_loads_and_another_is_refused(space: str, channels: int, tmp_path: Path) -> None:
    file = authors.tuned_file(tmp_path / f"{space}_latest_vgg16_tuned.pth", channels, 1, WIDTH)
    assert load_lpips(file, channels)(*pair(channels)).min() > 0
    assert read_lpips_meta(file)["latent_space"] == space
    other = "flux" if channels == 4 else "sdxl"
    with pytest.raises(UserError, match=f"takes latents of {channels} channels, {other} has"):
        read_official_checkpoint(file, other)
    with pytest.raises(UserError, match=f"latents of {channels} channels, expected 20 "):
        load_lpips(file, 20)


def test_an_unknown_latent_space_is_a_setting_error(calibrated_file: Path) -> None:
    with pytest.raises(SettingError, match="'sd4' is unknown, expected one of sd15, sd21, sdxl, sd3, flux"):
        read_official_checkpoint(calibrated_file, "sd4")


CHANGES: dict[str, tuple[Any, str]] = {
    "missing": (lambda s: s.pop("net.slice2.7.bias"), "lacks tensor 'features.7.bias'"),
    "headless": (lambda s: [s.pop(k) for k in ("lin4.model.1.weight", "lins.4.model.1.weight")], "'heads.4'"),
    "extra": (
        lambda s: s.update({"net.slice9.99.bias": torch.zeros(1)}),
        "unknown tensor 'features.99.bias'",
    ),
    "foreign": (lambda s: s.update({"optimizer": torch.zeros(1)}), "unknown tensor 'optimizer'"),
    "shape": (lambda s: s.update({"net.slice1.3.bias": torch.zeros(9)}), r"'features.3.bias' is \(9,\)"),
    "copies": (lambda s: s.update({"lins.1.model.1.weight": torch.ones(1, 8, 1, 1)}), "lins and lin differ"),
    "nothing": (lambda s: s.clear(), "has no first convolution; expected an elatentlpips checkpoint"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_loading_is_strict(change: str, calibrated_file: Path) -> None:
    edit, message = CHANGES[change]
    state = torch.load(calibrated_file, weights_only=True)
    edit(state)
    torch.save(state, calibrated_file)
    with pytest.raises(UserError, match=message):
        load_lpips(calibrated_file)


def test_old_files_without_batch_counters_and_copies_load(calibrated_file: Path) -> None:
    expected = load_lpips(calibrated_file)(*pair())
    state = torch.load(calibrated_file, weights_only=True)
    torch.save(
        {k: v for k, v in state.items() if "num_batches" not in k and "lins" not in k}, calibrated_file
    )
    assert torch.equal(load_lpips(calibrated_file)(*pair()), expected)


def test_negative_heads_are_refused(calibrated_file: Path) -> None:
    state = torch.load(calibrated_file, weights_only=True)
    for key in ("lin2.model.1.weight", "lins.2.model.1.weight"):
        state[key][0, 3] = -0.5
    torch.save(state, calibrated_file)
    with pytest.raises(
        UserError, match=r"tuned.pth: head 2 holds the weight -0.5, .*makes negative distances"
    ):
        load_lpips(calibrated_file)


class MaliciousPickle:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused(calibrated_file: Path, tmp_path: Path) -> None:
    torch.save(
        {
            **torch.load(calibrated_file, weights_only=True),
            "lin0.model.1.weight": MaliciousPickle(tmp_path / "ran"),
        },
        calibrated_file,
    )
    with pytest.raises(UserError, match="not a checkpoint of tensors alone"):
        load_lpips(calibrated_file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1, 2]), None])
def test_damage_is_a_one_line_error(content: bytes | None, calibrated_file: Path) -> None:
    data = calibrated_file.read_bytes()
    calibrated_file.write_bytes(data[: len(data) // 2] if content is None else content)
    with pytest.raises(UserError, match=r"tuned.pth: (not a checkpoint|holds a list)") as raised:
        load_lpips(calibrated_file)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="no such file, expected an elatentlpips checkpoint"):
        load_lpips(calibrated_file.with_name("other.pth"))


def test_conversion_keeps_the_distance_and_the_license(calibrated_file: Path, tmp_path: Path) -> None:
    facts = convert_official_checkpoint(calibrated_file, tmp_path / "ours")
    assert facts["channels"] == 4 and read_lpips_meta(tmp_path / "ours")["license"] == "CC-BY-NC-4.0"
    assert torch.equal(load_lpips(tmp_path / "ours")(*pair()), load_lpips(calibrated_file)(*pair()))
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["config.json", "lpips.safetensors"]


def test_the_command_converts(calibrated_file: Path, tmp_path: Path) -> None:
    words = ["lpips", "convert", str(calibrated_file), "--out", str(tmp_path / "ours"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["latent_space"] == "sd15" and "non-commercial" in done.stderr
    assert load_lpips(tmp_path / "ours").config.channels == 4
