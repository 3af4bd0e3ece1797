"""Tiny models, saved and loaded by the real code. A complete teacher folder takes half a second."""

from pathlib import Path
from typing import Any

import torch

from d2g.diffusion.pretrained import new_conditioner, new_tokenizer, new_unet, new_vae, save_pipeline
from latent_lpips import weights as lpips_weights
from latent_lpips.config import LPIPSConfig
from latent_lpips.distance import LatentLPIPS
from pairgen.config import PairConfig

CAPTIONS = [
    "a red cube",
    "a blue sphere",
    "two green cones",
    "a yellow torus, pink background",
    "a purple cylinder",
    "a cyan cube left of a red cone",
]


def save_teacher(folder: Path, seed: int = 0, latent_channels: int = 4, **scheduler: Any) -> str:
    """Save a Stable Diffusion teacher with random weights (16 px, 4x4 latents) and its latent_lpips/."""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer(CAPTIONS, folder / "tokenizer", 320, 12)
    text = new_conditioner(tokenizer, width=16, layers=1, heads=2)
    vae = new_vae(
        sample_size=16,
        latent_channels=latent_channels,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=0.7,
    )
    unet = new_unet(
        sample_size=4,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    save_pipeline(folder, unet=unet, vae=vae, conditioner=text, **scheduler)
    save_lpips(folder / "latent_lpips", latent_channels)
    return str(folder)


def save_lpips(folder: Path, channels: int = 4) -> None:
    """Save a narrow LatentLPIPS with random weights."""
    torch.manual_seed(7)
    metric = LatentLPIPS(LPIPSConfig(channels=channels, width=1 / 16))
    lpips_weights.save_lpips(metric, folder, {"note": "random"})


def save_prompts(path: Path) -> str:
    """Save CAPTIONS as a prompt file."""
    path.write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    return str(path)


def pair_config(teacher: str, prompts: str, **settings: Any) -> PairConfig:
    """The config of a small job: 12 pairs of 4 DDIM steps in shards of 5."""
    defaults: dict[str, Any] = dict(
        num_pairs=12, steps=4, guidance=3.0, shard_size=5, batch_size=4, dtype="float32"
    )
    return PairConfig(teacher=teacher, prompts=prompts, **{**defaults, **settings})
