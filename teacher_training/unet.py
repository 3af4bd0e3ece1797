"""Trains a text encoder and a UNet together, on epsilon prediction with caption dropout."""

from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.progress import Progress, quiet
from d2g.core.tracking.run_directory import RunLog
from d2g.diffusion.families.sd import SDConditioner
from d2g.diffusion.pretrained import new_conditioner, new_unet
from d2g.diffusion.schedule import Schedule, diffuse
from teacher_training.config import DenoiserConfig
from teacher_training.loop import LossFn, Previews, fit_modules


def build_denoiser(
    config: DenoiserConfig, tokenizer: Any, latent_channels: int, latent_size: int
) -> tuple[SDConditioner, nn.Module]:
    """Build an untrained text encoder and UNet2DConditionModel, with cross-attention at every scale."""
    levels = len(config.channels)
    unet = new_unet(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=config.layers_per_block,
        block_out_channels=config.channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=config.text_width,
        attention_head_dim=config.heads,  # diffusers reads this as the number of heads, as in SD 1.5's config
        norm_num_groups=8,
    )
    return new_conditioner(tokenizer, config.text_width, config.text_layers, config.heads), unet


def denoiser_loss(
    text: SDConditioner,
    unet: nn.Module,
    latents: Tensor,
    captions: list[str],
    schedule: Schedule,
    config: DenoiserConfig,
) -> LossFn:
    """The loss of a denoiser on scaled latents [N, C, h, w] with one caption each.

    The error of epsilon is weighted by min(SNR, gamma) / SNR (Hang et al. 2023).
    """
    tokens, empty = text.tokens(captions), text.tokens([""])
    # Weights of the timesteps: min(SNR, gamma) / SNR.
    alphas_cumprod = schedule.alphas_cumprod.float()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = snr.clamp(max=config.min_snr_gamma) / snr

    def loss_of(rows: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = latents[rows]
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(len(schedule), (len(rows),), generator=generator)
        # Replace some captions with the empty one, for classifier-free guidance.
        dropped = torch.rand(len(rows), 1, generator=generator) < config.caption_dropout
        hidden = text(torch.where(dropped, empty, tokens[rows])).tensors["hidden"]
        epsilon = unet(diffuse(x0, noise, alphas_cumprod, t), t, hidden).sample
        errors = (epsilon.float() - noise).square().mean((1, 2, 3))
        return (weights[t] * errors).mean(), {"loss/mse": errors.mean()}

    return loss_of


def train_denoiser(
    text: SDConditioner,
    unet: nn.Module,
    latents: Tensor,
    captions: list[str],
    schedule: Schedule,
    config: DenoiserConfig,
    log: RunLog,
    seed: int,
    progress: Progress = quiet,
    previews: Previews | None = None,
) -> None:
    """Train a text encoder and a U-Net, in place, on scaled latents [N, C, h, w] with one caption each.

    They end with their averaged weights, in eval mode.
    """
    modules = {"text": text.models["text_encoder"], "unet": unet}
    loss_of = denoiser_loss(text, unet, latents, captions, schedule, config)
    fit_modules("unet", log, modules, loss_of, len(latents), config.fit, seed, progress, previews)
    text.eval()
