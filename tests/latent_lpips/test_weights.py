import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from d2g.core.errors import UserError
from latent_lpips.config import LPIPSConfig
from latent_lpips.distance import LatentLPIPS
from latent_lpips.weights import load_lpips, read_lpips_meta, save_lpips

CONFIG = LPIPSConfig(width=1 / 16)


@pytest.fixture(scope="module")
def metric() -> LatentLPIPS:
    torch.manual_seed(0)
    metric = LatentLPIPS(CONFIG)
    for module in metric.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    for head in metric.heads:
        head.uniform_(0, 2)
    return metric


@pytest.fixture
def folder(metric: LatentLPIPS, tmp_path: Path) -> Path:
    save_lpips(metric, tmp_path / "lpips", {"seed": 3})
    return tmp_path / "lpips"


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, 8, generator=rng), torch.randn(3, 4, 8, 8, generator=rng)


def test_roundtrip_is_exact_unfolded_and_close_folded(metric: LatentLPIPS, folder: Path) -> None:
    reloaded = load_lpips(folder, fold=False)
    assert all(torch.equal(v, metric.state_dict()[k]) for k, v in reloaded.state_dict().items())
    assert torch.equal(reloaded(*pair()), metric(*pair()))
    fast = load_lpips(folder / "lpips.safetensors")
    assert fast.config.norm == "none"
    torch.testing.assert_close(fast(*pair()), metric(*pair()), rtol=1e-5, atol=1e-5)
    assert read_lpips_meta(folder) == {"seed": 3}
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "lpips.safetensors"]


def test_a_folded_metric_roundtrips(folder: Path, tmp_path: Path) -> None:
    fast = load_lpips(folder)
    save_lpips(fast, tmp_path / "fast", {})
    assert torch.equal(load_lpips(tmp_path / "fast")(*pair()), fast(*pair()))


def test_precision_is_set_at_loading_and_not_saved(folder: Path, tmp_path: Path) -> None:
    low = load_lpips(folder, precision="bf16")
    assert low.precision == "bf16" and load_lpips(folder).precision == "fp32"
    torch.testing.assert_close(low(*pair()), load_lpips(folder)(*pair()), rtol=1e-2, atol=1e-4)
    with pytest.raises(UserError, match="rounded to bf16; load it with fp32 to save it"):
        save_lpips(low, tmp_path / "low", {})


def test_half_precision_halves_the_file_and_loads_as_fp32(metric: LatentLPIPS, tmp_path: Path) -> None:
    for name, dtype in (("full", torch.float32), ("half", torch.float16)):
        save_lpips(metric, tmp_path / name, {}, dtype=dtype)
    full, half = ((tmp_path / n / "lpips.safetensors").stat().st_size for n in ("full", "half"))
    assert half < 0.6 * full
    loaded = load_lpips(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(*pair()), metric(*pair()), rtol=1e-2, atol=1e-3)


def test_saved_keys_are_those_of_torchvision(folder: Path) -> None:
    keys = load_file(folder / "lpips.safetensors")
    assert {"features.0.weight", "features.1.running_var", "features.40.bias", "heads.4"} <= set(keys)
    assert {key.split(".")[0] for key in keys} == {"features", "heads"}


def test_another_latent_space_is_refused(folder: Path) -> None:
    assert load_lpips(folder, 4).config.channels == 4
    with pytest.raises(UserError, match=r"latents of 4 channels, expected 16 .*give weights trained in the"):
        load_lpips(folder, 16)


@pytest.mark.parametrize("name", ["lpips.safetensors", "config.json"])
def test_a_missing_file_is_reported(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"no {name}, expected a LatentLPIPS folder.*d2g lpips train"):
        load_lpips(folder)


@pytest.mark.parametrize("name", ["lpips.safetensors", "config.json"])
def test_a_truncated_file_is_reported(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{name}(: not readable| is damaged)"):
        load_lpips(folder)


def test_inconsistent_files_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["network"]["width"] = 0.125
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"'heads.0' is \(4,\), config.json says \(8,\)"):
        load_lpips(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        load_lpips(folder)


@pytest.mark.parametrize("change", ["missing", "extra", "negative"])
def test_loading_is_strict(folder: Path, change: str) -> None:
    state = load_file(folder / "lpips.safetensors")
    if change == "missing":
        del state["features.3.bias"]
    elif change == "extra":
        state["features.99.bias"] = torch.zeros(1)
    else:
        state["heads.2"] = -state["heads.2"]
    save_file(state, folder / "lpips.safetensors")
    expected = {
        "missing": "lacks tensor 'features.3.bias'",
        "extra": "has the unknown tensor 'features.99.bias'",
        "negative": "head 2 holds the weight -",
    }
    with pytest.raises(UserError, match=expected[change]):
        load_lpips(folder)


def test_an_unwritable_folder_is_reported(metric: LatentLPIPS, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/lpips: .*could not be written.*give another folder"):
        save_lpips(metric, tmp_path / "file" / "lpips", {})
