"""Latent spaces, and the only place where latents are scaled and decoded. Everywhere else, latents are
scaled latents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.errors import UserError

PIXELS_AT_ONCE = 8 * 512**2
"""Pixels that are encoded or decoded at once: SD's autoencoder takes 6 GiB for them in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSpace:
    """An autoencoder's latent space: scaled = (raw - shift) * scale. `downscale`: pixels per latent."""

    channels: int
    downscale: int
    scale: float
    shift: float = 0.0

    def scaled(self, raw: Tensor) -> Tensor:
        """Raw VAE latents -> scaled latents (the U-Net's space, about unit variance)."""
        return (raw - self.shift) * self.scale

    def raw(self, scaled: Tensor) -> Tensor:
        """Scaled latents -> raw latents, as the VAE's decoder takes them."""
        return scaled / self.scale + self.shift


class PixelSpace(nn.Module):
    """The autoencoder of a teacher in pixel space: `encode` and `decode` return their input.

    For latents that no autoencoder decodes, as of the first stage of a cascade, `decode` shows the first
    three channels: a picture to look at, not to measure.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            latent_channels=channels, block_out_channels=(1,), scaling_factor=1.0, shift_factor=None
        )
        # Callers take device and dtype from the first parameter.
        self.placeholder = nn.Parameter(torch.zeros(()), requires_grad=False)

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        """The pixels, unchanged, as an output of diffusers' autoencoders."""
        return SimpleNamespace(latents=pixels)

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """The pixels, unchanged, as an output of diffusers' autoencoders."""
        return SimpleNamespace(sample=latents[:, :3])


def latent_space(vae: Any) -> LatentSpace:
    """The latent space of a diffusers AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel or
    PaellaVQModel, from its config.

    Raises UserError for latents that are normalized per channel, which one scale and shift cannot describe.
    """
    config = vae.config
    if getattr(config, "latents_mean", None) is not None or getattr(config, "latents_std", None) is not None:
        raise UserError(
            "the VAE has latents_mean and latents_std, a scale per channel; expected one scaling_factor"
        )
    if "Paella" in type(vae).__name__:  # raw latents are scaled latents times its scale_factor
        downscale = config.up_down_scale_factor * 2 ** (config.levels - 1)
        return LatentSpace(
            channels=config.latent_channels, downscale=downscale, scale=1 / config.scale_factor
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
    """Pixels [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, H/f, W/f], fp32, computed in the VAE's dtype
    and on its device.

    The mean of the posterior; with a generator, or one per row, a sample of it. Pixels that need no gradient
    are encoded PIXELS_AT_ONCE at a time, unless one generator draws for all rows.
    """
    if isinstance(generator, torch.Generator):
        return _encode_rows(vae, pixels, generator)
    rows, first = list[Tensor](), 0
    for part in _few_rows(pixels):
        own = None if generator is None else generator[first : first + len(part)]
        rows.append(_encode_rows(vae, part, own))
        first += len(part)
    return _joined(rows)


def _encode_rows(
    vae: Any, pixels: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None
) -> Tensor:
    pixels = pixels / 2 + 0.5 if _unit_range(vae) else pixels
    first = next(vae.parameters())
    output = vae.encode(pixels.to(first.device, first.dtype))
    if hasattr(output, "latent"):  # AutoencoderDC has no posterior
        return latent_space(vae).scaled(output.latent.float())
    if hasattr(output, "latents"):  # AutoencoderTiny and VQModel have no posterior either
        return latent_space(vae).scaled(output.latents.float())
    raw = output.latent_dist.mode() if generator is None else output.latent_dist.sample(generator)
    return latent_space(vae).scaled(raw.float())


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents [B, C, h, w] -> pixels [B, 3, H, W] of about [-1, 1], fp32. Differentiable.

    Latents that need no gradient are decoded PIXELS_AT_ONCE at a time.
    """
    parts = _few_rows(latents, latent_space(vae).downscale)
    return _joined([_decode_rows(vae, part) for part in parts])


def _few_rows(x: Tensor, downscale: int = 1) -> Sequence[Tensor]:
    """Split x [B, C, h, w] into batches of PIXELS_AT_ONCE, with `downscale` pixels per place along a side."""
    # Where there is a graph, all rows stay in memory. Compiled and exported code takes any number of rows.
    if x.requires_grad or torch.compiler.is_compiling():
        return [x]
    rows = max(1, PIXELS_AT_ONCE // (x.shape[2] * x.shape[3] * downscale**2))
    return list(torch.split(x, rows))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _decode_rows(vae: Any, latents: Tensor) -> Tensor:
    first = next(vae.parameters())
    raw = latent_space(vae).raw(latents)
    pixels: Tensor = vae.decode(raw.to(first.device, first.dtype)).sample.float()
    return 2 * pixels - 1 if _unit_range(vae) else pixels


def _unit_range(vae: Any) -> bool:
    """Whether an autoencoder's pixels are in [0, 1], as those of Stable Cascade's VQGAN."""
    return "Paella" in type(vae).__name__


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> uint8, rounded to nearest, clipped (as diffusers' image processor does)."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images -> fp32 pixels in [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def decode_uint8(vae: Any, latents: Tensor, batch_size: int = 64) -> Iterator[Tensor]:
    """Any number of scaled latents [N, C, h, w] -> batches of uint8 images [b, 3, H, W] on the CPU."""
    for rows in latents.split(batch_size):
        yield to_uint8(decode(vae, rows)).cpu()
