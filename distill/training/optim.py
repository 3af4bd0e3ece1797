"""Optimizers, learning-rate schedules, and the optimizer step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2g.core.distributed.engine import DistributedModule
from d2g.diffusion.families.unet import attention_parameters
from distill.config.components import OptimConfig


def optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable parameters of `module`.

    Parameters inside attention modules get `attention_weight_decay`, all others `weight_decay` (method.md
    "Schedule and hyperparameters"). Weight decay is decoupled, except for "adam", which adds
    it to the gradient.
    """
    attention = attention_parameters(module)
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    # Two groups, which differ in weight decay.
    groups = [
        {
            "params": [p for name, p in trainable if name in attention],
            "weight_decay": config.attention_weight_decay,
        },
        {
            "params": [p for name, p in trainable if name not in attention],
            "weight_decay": config.weight_decay,
        },
    ]
    groups = [g for g in groups if g["params"]]

    # The optimizer by name; "adam" alone adds the decay to the gradient.
    if config.name == "radam":
        return torch.optim.RAdam(groups, lr=config.lr, betas=config.betas, decoupled_weight_decay=True)
    if config.name == "adam":
        return torch.optim.Adam(groups, lr=config.lr, betas=config.betas)
    fused = True if config.name == "adamw_fused" else None
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def learning_rate(nimg: int, config: OptimConfig, batch_size: int) -> float:
    """Return the learning rate after `nimg` images: linear warm-up, then constant or decay to `final_lr`."""
    warmup = min(1.0, (nimg + batch_size) / config.warmup_images) if config.warmup_images else 1.0
    if not config.decay_images:
        return config.lr * warmup
    progress = min(1.0, nimg / config.decay_images)
    decay_factor = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "step": float(progress < 1),
    }[config.decay]
    return warmup * (config.final_lr + (config.lr - config.final_lr) * decay_factor)


def update(
    optim: torch.optim.Optimizer,
    network: DistributedModule,
    config: OptimConfig,
    lr: float,
    check: Callable[[Tensor], None],
) -> Tensor:
    """Clip the gradients, take an optimizer step with learning rate `lr`, and clear the gradients.

    Returns the gradient norm before clipping, which is the same on every rank. `check` receives this norm
    before the step and may raise: a finite loss can have a non-finite gradient.
    """
    norm = network.clip_gradients(config.clip_norm or math.inf)
    check(norm)
    for group in optim.param_groups:
        group["lr"] = lr
    optim.step()
    optim.zero_grad(set_to_none=True)
    return norm
