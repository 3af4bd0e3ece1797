"""eval.networks.dreamsim against the package dreamsim, on small files in the published format."""

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dreamsim import dreamsim
from dreamsim.feature_extraction import load_clip_as_dino, load_open_clip_as_dino
from dreamsim.feature_extraction.vision_transformer import VisionTransformer
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.core.seeds import generator
from eval.images.resize import to_pil
from eval.metrics.paired import cosine_distance, encoded
from eval.networks.dreamsim import DINO, load_dreamsim

WIDTH, DEPTH, JOINT, RANK = 64, 12, 24, 3  # the package reads block 11, so at least 12 blocks are needed


def small_vit(patch_size: int = 16, **_: Any) -> VisionTransformer:
    """The package's ViT-B with a smaller width."""
    return VisionTransformer(
        patch_size=patch_size,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=1,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


def random_state(net: nn.Module, seed: int) -> dict[str, Tensor]:
    stream = generator(seed)
    return {
        name: torch.randn(tensor.shape, generator=stream) * (0.3 if tensor.ndim > 1 else 0.2)
        + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, tensor in net.state_dict().items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked files of the published zip, and the backbone that torch.hub downloads beside them."""
    folder = tmp_path_factory.mktemp("dreamsim")
    (folder / "checkpoints").mkdir()
    torch.save(random_state(small_vit(), 0), folder / "checkpoints" / DINO)
    head = {f"module.head.mlp.{i}.{part}": torch.zeros(1) for i in (0, 2, 4) for part in ("weight", "bias")}
    head["module.head.last_layer.weight"] = torch.zeros(1)
    torch.save({"student": head}, folder / "dino_vitb16_pretrain.pth")
    for seed, name in enumerate(("clip", "open_clip"), start=1):
        net = small_vit()
        net.pos_drop = nn.LayerNorm(WIDTH)
        state = random_state(net, seed)
        proj = torch.randn(WIDTH, JOINT, generator=generator(seed, 1))
        torch.save({"state_dict": {**state, "proj": proj}}, folder / f"{name}_vitb16_pretrain.pth.tar")
    lora = folder / "ensemble_lora"
    LoraConfig(r=RANK, lora_alpha=1.5, lora_dropout=0.3, target_modules=["qkv"]).save_pretrained(lora)
    stream, adapter = generator(7), {}
    for branch in range(3):
        for block in range(DEPTH):
            key = f"base_model.model.extractor_list.{branch}.model.blocks.{block}.attn.qkv"
            adapter[f"{key}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=stream) * 0.3
            adapter[f"{key}.lora_B.weight"] = torch.randn(3 * WIDTH, RANK, generator=stream) * 0.3
    save_file(adapter, lora / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def published(folder: Path) -> tuple[Any, Any]:
    """The model and preprocessing of package dreamsim, from the same files; small ViTs replace its ViT-B."""

    def hub(repository: str, name: str) -> nn.Module:
        assert (repository, name) == ("facebookresearch/dino:main", "dino_vitb16")
        net = small_vit()
        net.load_state_dict(torch.load(folder / "checkpoints" / DINO))
        return net

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # its DINO head uses the old weight_norm, and it applies the adapter twice
        patch.setattr(torch.hub, "load", hub)
        patch.setattr(torch.hub, "set_dir", lambda _: None)
        patch.setattr(load_clip_as_dino, "vit_base", small_vit)
        patch.setattr(load_open_clip_as_dino, "vit_base", small_vit)
        model, preprocess = dreamsim(pretrained=True, device="cpu", cache_dir=str(folder))
    return model, preprocess


def random_images(count: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator(count))


@torch.no_grad()
def test_embeddings_and_distances_equal_those_of_dreamsim(folder: Path, published: tuple[Any, Any]) -> None:
    model, preprocess = published
    net = load_dreamsim(folder)
    assert (net.name, net.dim) == ("dreamsim", WIDTH + 2 * JOINT)
    for size in ((224, 224), (96, 64)):
        images = random_images(4, *size)
        pixels = torch.cat([preprocess(to_pil(image)) for image in images])
        expected = model.embed(pixels)
        got = net(images)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        published_distance = model(pixels[:2], pixels[2:])
        distance = encoded(net, cosine_distance)(images[:2], images[2:])
        torch.testing.assert_close(distance.float(), published_distance, rtol=0, atol=1e-6)
        assert (published_distance > 1e-3).all()


@torch.no_grad()
def test_the_adapter_changes_the_embeddings(published: tuple[Any, Any]) -> None:
    """Without the adapter the package's own embeddings differ, so the test above also tests the adapter."""
    model, _ = published
    pixels = torch.rand(2, 3, 224, 224, generator=generator(0))
    with model.disable_adapter():
        plain = model.embed(pixels)
    assert (plain - model.embed(pixels)).abs().max() > 1e-2


def test_uniform_images_of_different_sizes_have_distance_zero(folder: Path) -> None:
    net = load_dreamsim(folder)
    grey = torch.full((1, 3, 50, 70), 99, dtype=torch.uint8)
    larger = torch.full((1, 3, 300, 20), 99, dtype=torch.uint8)
    assert encoded(net, cosine_distance)(grey, larger).item() == pytest.approx(0, abs=1e-6)
    assert np.array(to_pil(grey[0]).resize((224, 224), Image.Resampling.BICUBIC)).std() == 0


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no DreamSim in .*: fetch dreamsim_ensemble_checkpoint.zip"):
        load_dreamsim(tmp_path)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != DINO:
            copy = tmp_path / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=f"no {DINO} in .*: fetch DINO's ViT-B/16 backbone"):
        load_dreamsim(tmp_path)
    (tmp_path / DINO).write_bytes((folder / "checkpoints" / DINO).read_bytes())
    assert load_dreamsim(tmp_path).sha256 == load_dreamsim(folder).sha256
    adapter = tmp_path / "ensemble_lora" / "adapter_model.safetensors"
    save_file({"base_model.model.mlp.lora_A.weight": torch.zeros(2)}, adapter)
    with pytest.raises(UserError, match=r"unknown tensor 'base_model.model.mlp.lora_A.weight'"):
        load_dreamsim(tmp_path)
    config = tmp_path / "ensemble_lora" / "adapter_config.json"
    assert json.loads(config.read_text())["r"] == RANK
    config.unlink()
    with pytest.raises(UserError, match=r"lacks adapter_config.json and adapter_model.safetensors"):
        load_dreamsim(tmp_path)
    (tmp_path / "clip_vitb16_pretrain.pth.tar").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"clip_vitb16_pretrain.pth.tar is damaged"):
        load_dreamsim(tmp_path)
