"""Optimisers and learning rates, as functions of a config."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2g.core.distributed.engine import DistributedModule
from d2g.diffusion.families.unet import attention_parameters
from distill.config.components import OptimConfig


def optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The config's optimiser of what in `module` has gradients, with the attention weight-decay rule: one
    decay inside attention modules, another elsewhere (method.md "Schedule and hyperparameters"). Weight decay
    is decoupled in all.
    """
    inside = attention_parameters(module)
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if n in inside], "weight_decay": config.attention_weight_decay},
        {"params": [p for n, p in named if n not in inside], "weight_decay": config.weight_decay},
    ]
    groups = [g for g in groups if g["params"]]
    if config.name == "radam":
        return torch.optim.RAdam(groups, lr=config.lr, betas=config.betas, decoupled_weight_decay=True)
    fused = True if config.name == "adamw_fused" else None
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def learning_rate(nimg: int, config: OptimConfig, batch_size: int) -> float:
    """Linear warm-up, then constant or falling to `final_lr`, as functions of the images seen."""
    warmup = min(1.0, (nimg + batch_size) / config.warmup_images) if config.warmup_images else 1.0
    if not config.decay_images:
        return config.lr * warmup
    progress = min(1.0, nimg / config.decay_images)
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "step": float(progress < 1),
    }[config.decay]
    return warmup * (config.final_lr + (config.lr - config.final_lr) * left)


def update(
    optim: torch.optim.Optimizer,
    network: DistributedModule,
    config: OptimConfig,
    lr: float,
    check: Callable[[Tensor], None],
) -> Tensor:
    """Clip, update, clear. Returns the gradient norm before clipping, the same on every rank.

    `check` sees that norm before the update, and may raise: a finite loss can have a gradient that is not.
    """
    norm = network.clip_gradients(config.clip_norm or math.inf)
    check(norm)
    for group in optim.param_groups:
        group["lr"] = lr
    optim.step()
    optim.zero_grad(set_to_none=True)
    return norm
