"""eval.networks.dinov2 and transformers_vision: tiny DINOv2 models loaded from saved folders."""

import io
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from d2g.core.errors import UserError
from d2g.core.seeds import generator
from d2g.vision.normalization import IMAGENET
from d2g.vision.transformers_vision import load_clip_model, load_dinov2_model
from eval.networks.base import normalize_channels
from eval.networks.dinov2 import interpolated, load_dinov2
from eval.networks.registry import FEATURES


def save_dinov2(folder: Path, image_size: int) -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=image_size, patch_size=14
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(config).eval()
    model.save_pretrained(folder)
    return model


def random_images(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator(count))


@torch.no_grad()
def test_features_are_the_normed_class_token(tmp_path: Path) -> None:
    model = save_dinov2(tmp_path, 224)
    net = load_dinov2(tmp_path)
    images = random_images(2, 224)
    expected = model(pixel_values=normalize_channels(images, IMAGENET)).pooler_output
    assert (net.name, net.dim) == ("dinov2", 32)
    torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-6)
    assert expected.std() > 0.1
    small = random_images(3, 50)
    one_by_one = torch.cat([net(image[None]) for image in small])
    torch.testing.assert_close(net(small), one_by_one, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_position_embeddings_of_518_px_are_interpolated_as_in_metas_code(tmp_path: Path) -> None:
    model = save_dinov2(tmp_path, 518)
    net = FEATURES["dinov2"](tmp_path, "cpu")
    images = random_images(2, 224)
    positions = model.embeddings.position_embeddings
    patches = positions[:, 1:].reshape(1, 37, 37, 32).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(patches, scale_factor=16.1 / 37, mode="bicubic")
    assert resized.shape == (1, 32, 16, 16)
    model.embeddings.position_embeddings = torch.nn.Parameter(
        torch.cat([positions[:, :1], resized.permute(0, 2, 3, 1).reshape(1, 256, 32)], 1)
    )
    expected = model(pixel_values=normalize_channels(images, IMAGENET)).pooler_output
    torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-6)


def test_interpolation_samples_at_metas_shifted_positions() -> None:
    """Away from the borders, row i is sampled at (i + 1/2) * 37 / 16.1 - 1/2. PyTorch's bicubic filter
    changes a ramp by up to 0.05.
    """
    ramp = torch.arange(37.0).view(37, 1).expand(37, 37).reshape(1, 37 * 37, 1)
    got = interpolated(torch.cat([torch.full((1, 1, 1), -5.0), ramp], 1), 16)
    assert got.shape == (1, 257, 1) and got[0, 0, 0] == -5
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    row = got[0, 1:, 0].view(16, 16)[:, 5]
    torch.testing.assert_close(row[2:-2], expected[2:-2], atol=0.06, rtol=0)
    unshifted = (torch.arange(16) + 0.5) * 37 / 16 - 0.5
    assert (row - unshifted)[13] < -0.1
    same = torch.randn(1, 17, 3, generator=generator(0))
    assert interpolated(same, 4) is same


def test_missing_foreign_and_damaged_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: no such folder; give one"):
        load_dinov2(tmp_path / "gone")
    with pytest.raises(UserError, match="as a hub id it cannot be fetched"):
        load_dinov2("nobody/nothing")
    vision = CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    CLIPVisionModel(vision).save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match="is a clip_vision_model model; expected dinov2"):
        load_dinov2(tmp_path / "clip")
    with pytest.raises(UserError, match="expected clip"):
        load_clip_model(str(tmp_path / "clip"))
    save_dinov2(tmp_path / "cut", 28)
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="cut does not load as Dinov2Model"):
        load_dinov2(tmp_path / "cut")
    save_dinov2(tmp_path / "patch", 28)
    config = json.loads((tmp_path / "patch" / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "patch" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lacks weights of Dinov2Model: encoder.layer.2"):
        load_dinov2(tmp_path / "patch")


def test_code_in_a_folder_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask on standard input."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    marker = tmp_path / "marker"
    (tmp_path / "own.py").write_text(
        "from transformers import PretrainedConfig\n"
        f"open({str(marker)!r}, 'w')\n"
        "class Own(PretrainedConfig): model_type = 'own'\n"
    )
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="contains custom code"):
        load_clip_model(str(tmp_path))
    with pytest.raises(UserError, match="contains custom code"):
        load_dinov2_model(str(tmp_path))
    assert not marker.exists()
