"""Pseudo-Huber loss of latents (Song and Dhariwal 2024)."""

import math
from functools import partial

from torch import Tensor

from distill.losses.regression.base import FunctionDistance, RegressionLoss


def pseudo_huber(pred: Tensor, target: Tensor, c: float) -> Tensor:
    """sqrt(|d|^2 + C^2) - C of each row, where d = pred - target has n elements and C = c sqrt(n).

    pred, target [B, C, h, w] -> [B]. Source: "Improved techniques for training consistency models",
    where c is 0.00054.
    """
    scale = c * math.sqrt(pred[0].numel())
    return ((pred - target).square().sum(dim=(1, 2, 3)) + scale**2).sqrt() - scale


PSEUDO_HUBER_LOSS = RegressionLoss(
    name="pseudo_huber",
    log_key="loss/pseudo_huber",
    build=lambda config, networks: FunctionDistance(partial(pseudo_huber, c=config.huber_c)),
    settings=("huber_c",),
    describe=lambda config: f", c {config.huber_c:g}",
)
