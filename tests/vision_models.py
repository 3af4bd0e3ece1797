"""Tiny image networks with random weights, saved as transformers saves them."""

from pathlib import Path
from typing import Any

import torch

import tiny
from d2g.diffusion.pretrained import new_tokenizer

SIZES: dict[str, Any] = dict(
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=16,
    image_size=16,
    patch_size=4,
)
VITS = ("vit", "deit", "dinov2", "dinov3_vit", "clip_vision_model")


def save_clip_model(folder: Path) -> str:
    """A CLIP for 16 px images and tiny.CAPTIONS, with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(5)
    tokenizer = new_tokenizer(tiny.CAPTIONS, folder, 320, 16)
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = {**tower, "image_size": 16, "patch_size": 4}
    net = CLIPModel(CLIPConfig(text_config={**tower, **text}, vision_config=vision, projection_dim=8))
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    net.save_pretrained(folder)
    return str(folder)


def save_vit(kind: str, folder: Path) -> str:
    """A vision transformer of 4 blocks on 16 px images with patches of 4 px; `kind`: its model type."""
    import transformers

    torch.manual_seed(3)
    name = {
        "vit": "ViTModel",
        "deit": "DeiTModel",
        "dinov2": "Dinov2Model",
        "dinov3_vit": "DINOv3ViTModel",
        "clip_vision_model": "CLIPVisionModel",
    }[kind]
    more = {"dinov2": {"mlp_ratio": 1}, "dinov3_vit": {"num_register_tokens": 2}}.get(kind, {})
    config = transformers.AutoConfig.for_model(kind, **SIZES, **more)
    options = {"add_pooling_layer": False} if kind in ("vit", "deit") else {}
    model = getattr(transformers, name)(config, **options)
    for parameter in model.parameters():  # larger than transformers' 0.02, so that every path matters
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    model.save_pretrained(folder)
    return str(folder)
