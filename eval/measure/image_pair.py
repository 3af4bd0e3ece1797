"""The perceptual distance between two image files, in a latent space or in pixels."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.errors import UserError
from d2g.core.seeds import generator
from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode, from_uint8, latent_space
from eval.images.folders import read_image
from latent_lpips.distance import ELatentLPIPS, PerceptualDistance
from latent_lpips.lpips import PixelLPIPS
from latent_lpips.weights import load_lpips


@torch.no_grad()
def image_distance(
    a: Path, b: Path, teacher: str, weights: Path | None, augment: str, draws: int, seed: int
) -> float:
    """(E-)LatentLPIPS of two images of one size in the latent space of `teacher`'s VAE.

    With an `augment` other than "none" it is the mean over `draws` random transforms from `seed`. Raises
    UserError for unreadable files, images of different sizes or a size that the VAE cannot take.
    """
    vae = pretrained.load_vae(teacher)
    images = _read_pair(a, b, latent_space(vae).downscale)
    first, second = (encode(vae, pixels) for pixels in images)
    metric = load_lpips(weights or pretrained.resolve(teacher) / "latent_lpips", first.shape[1])
    return _distance(metric, first, second, augment, draws, seed)


@torch.no_grad()
def pixel_distance(
    a: Path, b: Path, net: Any, weights: Path | None, augment: str, draws: int, seed: int
) -> float:
    """LPIPS of two images of one size with the network `net` (vgg, alex or squeeze).

    `weights`: torchvision's file; None: PyTorch's hub folder. `augment` and errors are those of
    `image_distance`.
    """
    first, second = _read_pair(a, b, 1)
    return _distance(PixelLPIPS(net, weights), first, second, augment, draws, seed)


def _read_pair(a: Path, b: Path, step: int) -> list[Tensor]:
    """Read both images as pixels [1, 3, H, W] in [-1, 1]. Their sides must be multiples of `step`."""
    images = []
    for path in (a, b):
        pixels = read_image(path)[None]
        if pixels.shape[2] % step or pixels.shape[3] % step:
            raise UserError(f"{path} is {pixels.shape[3]}x{pixels.shape[2]}; expected multiples of {step}")
        images.append(from_uint8(pixels))
    if images[0].shape != images[1].shape:
        raise UserError(f"{a} and {b} differ in size; make them one size")
    return images


def _distance(metric: PerceptualDistance, a: Tensor, b: Tensor, augment: str, draws: int, seed: int) -> float:
    return float(ELatentLPIPS(metric, augment, draws)(a, b, generator=generator(seed)))
