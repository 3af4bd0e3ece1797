"""The one place where latents are scaled and pixels are made. Everywhere else latents are *scaled*
latents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSpace:
    """A VAE's latent space: scaled = (raw - shift) * scale; `downscale` pixels per latent position."""

    channels: int
    downscale: int
    scale: float
    shift: float = 0.0

    def scaled(self, raw: Tensor) -> Tensor:
        """Raw VAE latents -> scaled latents (the U-Net's space, about unit variance)."""
        return (raw - self.shift) * self.scale

    def raw(self, scaled: Tensor) -> Tensor:
        """Scaled latents -> what the VAE's decoder takes."""
        return scaled / self.scale + self.shift


class PixelSpace(nn.Module):
    """The autoencoder of a teacher that works in pixels: nothing to encode, nothing to decode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            latent_channels=channels, block_out_channels=(1,), scaling_factor=1.0, shift_factor=None
        )
        self.where = nn.Parameter(torch.zeros(()), requires_grad=False)  # a device and a dtype, as VAEs have

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        """Pixels, as they are."""
        return SimpleNamespace(latents=pixels)

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """Pixels, as they are."""
        return SimpleNamespace(sample=latents)


def latent_space(vae: Any) -> LatentSpace:
    """The latent space of a diffusers AutoencoderKL, AutoencoderTiny or VQModel, read from its config.

    Raises UserError for spaces normalised channel by channel, which one scale and shift cannot say.
    """
    config = vae.config
    if getattr(config, "latents_mean", None) is not None or getattr(config, "latents_std", None) is not None:
        raise UserError(
            "the VAE has latents_mean and latents_std, a scale per channel; expected one scaling_factor"
        )
    levels = getattr(config, "block_out_channels", None) or config.encoder_block_out_channels
    return LatentSpace(
        channels=int(config.latent_channels),
        downscale=2 ** (len(levels) - 1),
        scale=float(getattr(config, "scaling_factor", None) or 1.0),
        shift=float(getattr(config, "shift_factor", None) or 0.0),
    )


def encode(
    vae: Any, pixels: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, H/f, W/f]: the posterior's mean, or a sample
    of it when a generator is given, or one for each row. Computed in the VAE's dtype, returned in fp32."""
    output = vae.encode(pixels.to(next(vae.parameters()).dtype))
    if hasattr(output, "latents"):  # deterministic: AutoencoderTiny's are scaled already, VQModel's are not
        latents: Tensor = output.latents.float()
        return latents if "Tiny" in type(vae).__name__ else latent_space(vae).scaled(latents)
    raw = output.latent_dist.mode() if generator is None else output.latent_dist.sample(generator)
    return latent_space(vae).scaled(raw.float())


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents [B, C, h, w] -> pixels [B, 3, H, W], about [-1, 1], fp32. Differentiable."""
    first = next(vae.parameters())
    raw = latents if "Tiny" in type(vae).__name__ else latent_space(vae).raw(latents)
    pixels: Tensor = vae.decode(raw.to(first.device, first.dtype)).sample.float()
    return pixels


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> uint8, rounded to nearest, clipped (as diffusers' image processor does)."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images -> fp32 pixels in [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def decode_uint8(vae: Any, latents: Tensor, batch_size: int = 64) -> Iterator[Tensor]:
    """Scaled latents, any number of rows -> uint8 image batches [b, 3, H, W] on the CPU."""
    for rows in latents.split(batch_size):
        yield to_uint8(decode(vae, rows)).cpu()
