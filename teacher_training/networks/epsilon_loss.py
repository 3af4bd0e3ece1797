"""The loss of variance-preserving networks: epsilon, weighted by min(SNR, gamma) / SNR."""

from collections.abc import Callable

import torch
from torch import Tensor

from d2g.core.transfer import to_device
from d2g.diffusion.schedule import Schedule, diffuse


def min_snr_weights(schedule: Schedule, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR of every timestep, fp32 [T] (Hang et al. 2023)."""
    alphas_cumprod = schedule.alphas_cumprod.float()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / snr


def epsilon_loss(
    x0: Tensor,
    schedule: Schedule,
    weights: Tensor,
    generator: torch.Generator,
    predict: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted mean squared error of epsilon on clean rows x0 [B, C, h, w], and its unweighted mean.

    weights: of every timestep [T], on the CPU. predict: epsilon from noisy rows and timesteps [B]; it draws
    after noise and timesteps are drawn.
    """
    # Random numbers come from the CPU, so that they are the same on every device.
    noise = to_device(torch.randn(x0.shape, generator=generator), x0.device)
    timesteps = torch.randint(len(schedule), (len(x0),), generator=generator)
    t, row_weights = (to_device(x, x0.device) for x in (timesteps, weights[timesteps]))
    epsilon = predict(diffuse(x0, noise, schedule.alphas_cumprod.float(), t), t)
    errors = (epsilon.float() - noise).square().mean((1, 2, 3))
    return (row_weights * errors).mean(), {"loss/mse": errors.mean()}
