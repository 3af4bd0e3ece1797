"""The input of a discriminator on pixels: a crop of the latents, decoded, augmented, resized, as features.

All operations have second derivatives, which the exact gradient penalty needs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2g.diffusion.latents import decode, latent_space
from d2g.vision.crops import crop_rows, crop_view
from distill.models.feature_networks import FeatureNetwork
from latent_lpips.augment import AugmentParams, apply_transforms

DRAWS = 9
"""Number of random integers per row: crop (2), color (3), translation (2), cutout (2)."""
RANGE = 2**24
"""The integers lie in [0, RANGE), exact in fp32. They are integers because FSDP2 casts floats to bf16."""
MAX_SHIFT = 1 / 8
"""Largest translation as a share of the side (DiffAugment)."""


class PixelFeatures(nn.Module):
    """The frozen networks between latents and heads: the autoencoder's decoder and the feature networks.

    size: side in pixels of the images that the feature networks take. augment: augmentations by name
    (`diff_augment`).
    """

    def __init__(
        self, vae: Any, networks: Sequence[FeatureNetwork], size: int, augment: Sequence[str]
    ) -> None:
        super().__init__()
        self.vae, self.networks = vae, nn.ModuleList(networks)
        self.size, self.augment = size, tuple(augment)
        self.side = size // latent_space(vae).downscale  # of the crop, in latents

    def forward(self, latents: Tensor, draws: Tensor) -> dict[str, Tensor]:
        """Scaled latents [B, C, h, w] and random integers [B, DRAWS] -> feature maps [B, C_d, h_d, w_d] by
        name."""
        uniform = draws.to(latents.device).float() / RANGE
        # Compute in bf16 where the run does: under DDP autocast is on, under FSDP2 the inputs are bf16.
        half = latents.dtype == torch.bfloat16 or torch.is_autocast_enabled(latents.device.type)
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=half):
            pixels = decode(self.vae, crop_view(latents, self.side, uniform))
            pixels = diff_augment(pixels, self.augment, uniform[:, 2:])
            if pixels.shape[2:] != (self.size, self.size):
                pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
            maps = [feature_map for network in self.networks for feature_map in network(pixels)]
        return dict(zip(self.names, maps, strict=True))

    @property
    def names(self) -> list[str]:
        """Names of the maps: block3, or net0_block3 if there are several networks."""
        several = len(self.networks) > 1
        return [
            f"net{number}_block{depth}" if several else f"block{depth}"
            for number, network in enumerate(self.networks)
            for depth in network.depths  # type: ignore[union-attr]
        ]

    @property
    def widths(self) -> list[int]:
        """Channels of the maps, in the order of `names`."""
        return [width for network in self.networks for width in network.widths]  # type: ignore[union-attr]

    def layers(self) -> list[nn.Module]:
        """Blocks of the decoder, for activation checkpointing."""
        decoder: Any = getattr(self.vae, "decoder", None)
        return [*getattr(decoder, "up_blocks", ())]


def diff_augment(pixels: Tensor, names: Sequence[str], uniform: Tensor) -> Tensor:
    """Apply DiffAugment (Zhao et al. 2020) with its published strengths.

    The order is color, translation, cutout; only those in `names` are applied. pixels: [B, 3, H, W], about
    [-1, 1]. uniform: [B, 7] in [0, 1) for brightness, contrast, saturation, shift down and right, and center
    of the cutout (x, y). Pixels that are shifted in, or cut out, are 0.
    """
    if "color" in names:
        pixels = apply_transforms(pixels, _transforms("c", uniform))
    if "translation" in names:
        pixels = _translate(pixels, uniform[:, 3:5])
    if "cutout" in names:
        pixels = apply_transforms(pixels, _transforms("o", uniform))
    return pixels


def _transforms(letters: str, uniform: Tensor) -> AugmentParams:
    """Color ("c") or cutout ("o") of DiffAugment as transforms of E-LatentLPIPS; others are identities."""
    zero, one, no_shift = torch.zeros_like(uniform[:, 0]), torch.ones_like(uniform[:, 0]), uniform[:, :2] * 0
    return AugmentParams(
        letters=letters,
        **dict.fromkeys(("flip", "quarter", "rotate_pre", "rotate_post"), zero),
        **dict.fromkeys(("scale", "stretch"), one),
        **dict.fromkeys(("integer_shift", "shift"), no_shift),
        brightness=uniform[:, 0] - 0.5,
        contrast=uniform[:, 1] + 0.5,
        saturation=2 * uniform[:, 2],
        center=uniform[:, 5:7],
        cutout=0.5,
    )


def _translate(pixels: Tensor, uniform: Tensor) -> Tensor:
    """Shift each row by whole pixels, at most MAX_SHIFT of the side, over zeros. uniform [B, 2] in [0, 1)."""
    height, width = pixels.shape[2:]
    max_shift = [round(side * MAX_SHIFT) for side in (height, width)]
    # Crop the padded image. The crop at (max_shift, max_shift) is the image itself.
    top, left = ((u * (2 * shift + 1)).long() for u, shift in zip(uniform.unbind(1), max_shift, strict=True))
    padded = F.pad(pixels, (max_shift[1], max_shift[1], max_shift[0], max_shift[0]))
    return crop_rows(padded, top, left, height, width)
