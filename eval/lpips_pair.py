"""LatentLPIPS between two image files."""

from pathlib import Path

import torch

from core import pretrained
from core.errors import UserError
from core.latents import encode, from_uint8
from core.seeds import generator
from eval.images import read_image
from latent_lpips.config import AugmentConfig
from latent_lpips.metric import ELatentLPIPS
from latent_lpips.weights import load_lpips


@torch.no_grad()
def image_distance(
    a: Path, b: Path, teacher: str, weights: Path | None, augment: str, draws: int, seed: int
) -> float:
    """(E-)LatentLPIPS of two images of one size in the latent space of `teacher`'s VAE.

    `augment` other than "none" averages over `draws` transforms. Raises UserError for unreadable files,
    images of two sizes or a size that the VAE cannot take.
    """
    vae = pretrained.load_vae(teacher)
    step = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = []
    for path in (a, b):
        pixels = read_image(path)[None]
        if pixels.shape[2] % step or pixels.shape[3] % step:
            raise UserError(f"{path} is {pixels.shape[3]}x{pixels.shape[2]}; expected multiples of {step}")
        latents.append(encode(vae, from_uint8(pixels)))
    if latents[0].shape != latents[1].shape:
        raise UserError(f"{a} and {b} differ in size; make them one size")
    metric = load_lpips(weights or pretrained.resolve(teacher) / "latent_lpips", latents[0].shape[1])
    if augment == "none":
        return float(metric(*latents))
    augmented = ELatentLPIPS(metric, AugmentConfig(families=augment), draws=draws)
    return float(augmented(*latents, generator=generator(seed)))
