"""The losses of the three stages: reconstruction for the VQGAN, epsilon for stage B and stage C."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.transfer import device_of, to_device
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.base import Family
from d2g.diffusion.families.wuerstchen import WuerstchenDecoder, WuerstchenPrior
from d2g.diffusion.latents import from_uint8
from d2g.diffusion.schedule import COSINE_STEPS, CosineSchedule
from teacher_training.autoencoder import reconstruction_loss
from teacher_training.cascade.config import StageBConfig, VQGANConfig
from teacher_training.loop import LossFn

SCHEDULE = CosineSchedule(scaler=1.0, offset=0.008, final_alpha_one=False)
"""The schedule of both stages: DDPMWuerstchenScheduler's defaults."""


class CaptionTable:
    """The text of N rows, encoded once per distinct caption, and the empty prompt.

    hidden [M, L, D] of M captions; rows: the caption of each of the N rows; empty [1, L, D].
    """

    def __init__(self, hidden: Tensor, rows: Tensor, empty: Tensor) -> None:
        self.hidden, self.rows, self.empty = hidden, rows, empty

    def conditioning(self, rows: list[int], dropped: Tensor) -> Conditioning:
        """Text of some rows, the empty prompt where `dropped` [B] is true."""
        hidden = self.hidden[self.rows[rows]].float()
        return Conditioning.from_text(torch.where(dropped.view(-1, 1, 1), self.empty, hidden))


def vqgan_loss(vqgan: Any, images: Tensor, config: VQGANConfig) -> LossFn:
    """Reconstruction of uint8 images [N, 3, S, S] through the codebook, and the errors of quantization.

    Some images skip the codebook, because stage B's latents are not quantized (Wuerstchen, E.1). There is no
    adversarial and no perceptual loss.
    """

    def loss_of(rows: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = from_uint8(to_device(images[rows], device_of(vqgan)))
        latents = vqgan.encode(pixels / 2 + 0.5).latents
        quantized, codebook, _ = vqgan.vquantizer(latents)
        skips = torch.rand(len(rows), 1, 1, 1, generator=generator) < config.quantization_dropout
        skips = to_device(skips, pixels.device)
        decoded = 2 * vqgan.decode(torch.where(skips, latents, quantized)).sample - 1
        rec = reconstruction_loss(pixels, decoded, config.square_weight, config.edge_weight)
        return rec + config.codebook_weight * codebook, {"loss/rec": rec, "loss/codebook": codebook}

    return loss_of


def cascade_loss(
    family: Family,
    network: nn.Module,
    latents: Tensor,
    conditioning: Callable[[list[int], torch.Generator], Conditioning],
) -> LossFn:
    """Squared error of epsilon on scaled latents [N, C, h, w], at times uniform in (0, 1).

    It is weighted by (1 - alpha_bar) / (1 + alpha_bar) (Wuerstchen, 3.2).
    """

    def loss_of(rows: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        device, x0 = device_of(network), latents[rows]
        noise = torch.randn(x0.shape, generator=generator)
        t = COSINE_STEPS * torch.rand(len(rows), generator=generator)
        cond = conditioning(rows, generator).to(device)
        x0, noise, t = (to_device(x, device) for x in (x0, noise, t))
        noisy = SCHEDULE.diffuse(x0, noise, t)
        epsilon = family.forward(network, network.config, noisy, t, cond, 1)
        errors = (epsilon.float() - noise).square().mean((1, 2, 3))
        bar = SCHEDULE.alpha_bar(t).float()
        return ((1 - bar) / (1 + bar) * errors).mean(), {"loss/mse": errors.mean()}

    return loss_of


def stage_b_loss(
    network: nn.Module,
    compressor: nn.Module,
    images: Tensor,
    latents: Tensor,
    captions: CaptionTable,
    config: StageBConfig,
) -> LossFn:
    """The loss of stage B and the compressor, which train together, on uint8 images and their latents."""

    def conditioning(rows: list[int], generator: torch.Generator) -> Conditioning:
        count = len(rows)
        prior = compressor(from_uint8(to_device(images[rows], device_of(compressor))))
        # Noise on half of the rows, because stage C's samples have errors.
        scale = config.condition_noise * torch.rand(count, generator=generator)
        scale = scale * (torch.rand(count, generator=generator) < 0.5)
        prior_noise = scale.view(-1, 1, 1, 1) * torch.randn(prior.shape, generator=generator)
        prior = prior + to_device(prior_noise, prior.device)
        # Rows without any condition: the empty prompt and zeros.
        dropped = torch.rand(count, generator=generator) < config.caption_dropout
        no_prior = to_device(dropped, prior.device).view(-1, 1, 1, 1)
        prior = torch.where(no_prior, torch.zeros_like(prior), prior)
        return captions.conditioning(rows, dropped).to(prior.device).with_prior(prior)

    return cascade_loss(WuerstchenDecoder(), network, latents, conditioning)


def stage_c_loss(
    network: nn.Module, latents: Tensor, captions: CaptionTable, caption_dropout: float
) -> LossFn:
    """The loss of stage C on the compressor's latents [N, C, h, w]."""

    def conditioning(rows: list[int], generator: torch.Generator) -> Conditioning:
        return captions.conditioning(rows, torch.rand(len(rows), generator=generator) < caption_dropout)

    return cascade_loss(WuerstchenPrior(), network, latents, conditioning)
