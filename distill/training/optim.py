"""Optimizers, learning-rate schedules, and the optimizer step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2g.core.distributed.engine import DistributedModule, local_shard
from d2g.core.distributed.low_memory_adamw import LowMemoryAdamW
from d2g.diffusion.families.unet import attention_parameters
from distill.config.optim import OptimConfig


def optimizer(module: nn.Module, config: OptimConfig, offload: bool = False) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable parameters of `module`.

    Parameters inside attention modules get `attention_weight_decay`, all others `weight_decay` (method.md
    "Schedule and hyperparameters"). Weight decay is decoupled, except for "adam", which adds
    it to the gradient. offload: keep the moments of adamw and adamw_8bit in CPU memory.
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

    # The optimizer by name; "adam" alone adds the decay to the gradient. On CUDA, Adam and AdamW are fused,
    # and RAdam, which has no fused form, counts its steps on the device.
    on_cuda = any(p.device.type == "cuda" for _, p in trainable)
    if config.name == "radam":
        return torch.optim.RAdam(
            groups, lr=config.lr, betas=config.betas, decoupled_weight_decay=True, capturable=on_cuda
        )
    if config.name == "adamw_8bit" or offload:
        eight_bit = config.name == "adamw_8bit"
        return LowMemoryAdamW(groups, config.lr, config.betas, eight_bit=eight_bit, offload=offload)
    fused = True if on_cuda or config.name == "adamw_fused" else None
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas, fused=fused)


def learning_rate(nimg: int, config: OptimConfig, batch_size: int, images: int) -> float:
    """Return the learning rate after `nimg` of a run's `images`: linear warm-up, then constant or decay to
    `final_lr`.
    """
    warmup = min(1.0, (nimg + batch_size) / config.warmup_images) if config.warmup_images else 1.0
    if not config.decay_images:
        return config.lr * warmup
    length = images if config.decay_images == -1 else config.decay_images
    progress = min(1.0, nimg / length)
    decay_factor = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "step": float(progress < 1),
    }[config.decay]
    return warmup * (config.final_lr + (config.lr - config.final_lr) * decay_factor)


def images_at_rate_zero(config: OptimConfig, images: int) -> int:
    """How many images at the end of a run of `images` have the learning rate 0, because its decay is over."""
    ended = config.decay_images > 0 and not config.final_lr
    return max(0, images - config.decay_images) if ended else 0


def update(
    optim: torch.optim.Optimizer,
    network: DistributedModule,
    config: OptimConfig,
    lr: float,
    stop: Callable[[Tensor], Tensor],
) -> Tensor:
    """Clip the gradients, take an optimizer step with learning rate `lr`, and clear the gradients.

    Returns the gradient norm before clipping, which is the same on every rank. `stop` receives this norm; if
    it returns 1 (else 0), the step leaves parameters and optimizer states as they are.
    """
    norm = network.clip_gradients(config.clip_norm or math.inf)
    stopped = stop(norm)
    for group in optim.param_groups:
        group["lr"] = lr
    step_unless(optim, stopped)
    optim.zero_grad(set_to_none=True)
    return norm


def step_unless(optim: torch.optim.Optimizer, stopped: Tensor) -> None:
    """Take an optimizer step, unless `stopped` (fp32 []) is 1: then parameters and states keep every bit.

    The decision is taken on the device of `stopped`; the host does not wait for it.
    """
    if isinstance(optim, LowMemoryAdamW) or all(group.get("fused") for group in optim.param_groups):
        setattr(optim, "found_inf", stopped)  # noqa: B010  # their step reads it
        optim.step()
    elif stopped.device.type == "cpu":
        if not stopped:
            optim.step()
    else:
        step_and_restore(optim, stopped)


@torch.no_grad()
def step_and_restore(optim: torch.optim.Optimizer, stopped: Tensor) -> None:
    """Take a step, then put back what was there before if `stopped` is 1. A new state was zero before."""
    parameters = [p for group in optim.param_groups for p in group["params"] if p.grad is not None]
    before = [local_shard(p).clone() for p in parameters]
    states = [
        {k: local_shard(v).clone() for k, v in optim.state.get(p, {}).items() if isinstance(v, Tensor)}
        for p in parameters
    ]
    optim.step()
    for p, old, old_state in zip(parameters, before, states, strict=True):
        _restore(local_shard(p), old, stopped)
        for key, value in optim.state[p].items():
            if isinstance(value, Tensor):
                value = local_shard(value)
                _restore(value, old_state.get(key, torch.zeros_like(value)), stopped)


def _restore(value: Tensor, old: Tensor, stopped: Tensor) -> None:
    value.copy_(torch.where(stopped > 0, old, value))
