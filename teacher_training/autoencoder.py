"""A small AutoencoderKL, by default with Stable Diffusion's downscaling of 8, trained with pixel losses, and
with those of autoencoder_losses.py if they are asked for.
"""

from typing import Any

import torch
from torch import Tensor

from d2g.core.progress import Progress, quiet
from d2g.core.tracking.run_directory import RunLog
from d2g.core.transfer import device_of, to_device
from d2g.diffusion.latents import from_uint8
from d2g.diffusion.pretrained import new_vae
from teacher_training.autoencoder_losses import FeatureDistance, PatchDiscriminator, open_discriminator
from teacher_training.config import AutoencoderConfig
from teacher_training.data import random_rows
from teacher_training.loop import LossFn, Previews, fit_modules


def build_autoencoder(config: AutoencoderConfig, size: int) -> Any:
    """Build an untrained AutoencoderKL for images of `size` pixels."""
    levels = len(config.channels)
    return new_vae(
        sample_size=size,
        latent_channels=config.latent_channels,
        block_out_channels=config.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def reconstruction_loss(pixels: Tensor, decoded: Tensor, square_weight: float, edge_weight: float) -> Tensor:
    """Absolute plus weighted squared error of pixels, plus the weighted absolute error of pixel differences.

    Inputs are [B, 3, H, W]; errors are means. The squared part finds the colors of small objects early. With
    the absolute error alone, objects were still gray after 30,000 images (docs/LOG.md).
    """
    error = decoded - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + square_weight * error.square().mean() + edge_weight * edges


def autoencoder_loss(
    vae: Any,
    images: Tensor,
    config: AutoencoderConfig,
    perceptual: FeatureDistance | None = None,
    discriminator: PatchDiscriminator | None = None,
) -> LossFn:
    """The loss of an autoencoder on uint8 images [N, 3, S, S]: reconstruction, KL, and the terms given."""

    def loss_of(rows: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = from_uint8(to_device(images[rows], device_of(vae)))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        rec = reconstruction_loss(pixels, decoded, config.square_weight, config.edge_weight)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        parts = {"loss/rec": rec, "loss/kl": kl}
        # The optional terms; the adversarial one follows the size of the others.
        if perceptual is not None:
            parts["loss/perceptual"] = perceptual(pixels, decoded).mean()
            rec = rec + config.perceptual_weight * parts["loss/perceptual"]
        loss = rec + config.kl_weight * kl
        if discriminator is not None and discriminator.active:
            term, values = discriminator.term(rec, pixels, decoded)
            loss, parts = loss + term, {**parts, **values}
        return loss, parts

    return loss_of


def train_autoencoder(
    images: Tensor,
    config: AutoencoderConfig,
    log: RunLog,
    seed: int,
    progress: Progress = quiet,
    previews: Previews | None = None,
    perceptual: FeatureDistance | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Train on uint8 images [N, 3, S, S] and return the VAE, on the CPU.

    perceptual: as `open_perceptual` opens it. The config of the VAE gets the scaling_factor that makes
    scaled latents have unit variance.
    """
    torch.manual_seed(seed)
    vae = build_autoencoder(config, images.shape[-1]).to(device, memory_format=torch.channels_last)
    discriminator = open_discriminator(vae, config)
    loss_of = autoencoder_loss(vae, images, config, perceptual, discriminator)
    fit_modules(
        "vae", log, {"vae": vae}, loss_of, len(images), config.fit, seed, progress, previews, discriminator
    )
    # Scale latents to unit variance. The pictures may be sorted: take them from all.
    with torch.no_grad():
        sample = from_uint8(images[random_rows(len(images), 1024)])
        raw = torch.cat([vae.encode(rows.to(device)).latent_dist.mode() for rows in sample.split(64)])
    vae.register_to_config(scaling_factor=round(1.0 / raw.std().item(), 5))
    return vae.to("cpu")
