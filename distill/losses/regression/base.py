"""`RegressionLoss`: a distance per row, and how the rest of the code refers to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.config.regression import RegressionConfig
from latent_lpips.augment import AugmentParams
from latent_lpips.distance import LatentLPIPS

Network = Literal["latent_lpips", "vae", "decoder"]
"""Frozen networks that a loss may need. For a teacher in pixel space, `vae` is the identity, and there are no
`latent_lpips` and `decoder`.
"""

Transforms = list[AugmentParams] | None
"""Random transforms of a batch, one entry per draw; None for a loss without transforms."""


@dataclass(frozen=True)
class FrozenNetworks:
    """The loaded networks that a loss `needs`, on the run's device; the others are None."""

    latent_lpips: LatentLPIPS | None = None
    vae: Any = None


class RowDistance(nn.Module):
    """Distance of each row between scaled latents.

    Subclasses implement `forward(pred, target, transforms) -> [B]` for pred and target [B, C, h, w].
    """

    def draw(self, rows: int, shape: tuple[int, int, int], rng: torch.Generator) -> Transforms:
        """Sample transforms for `rows` latents of `shape` (C, h, w); None if the distance has none."""
        return None


class FunctionDistance(RowDistance):
    """A distance without transforms, from a function (pred, target) -> [B]."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, pred: Tensor, target: Tensor, transforms: Transforms = None) -> Tensor:
        """pred, target [B, C, h, w] -> distance of each row [B]."""
        return self.function(pred, target)


@dataclass(frozen=True, kw_only=True, slots=True)
class RegressionLoss:
    """A loss of `regression.losses`, defined at the top level of `distill/losses/regression/NAME.py`."""

    name: str
    build: Callable[[RegressionConfig, FrozenNetworks], RowDistance]
    """(settings, networks) -> the distance."""
    log_key: str
    """Name of the unweighted loss in stats.jsonl."""
    needs: frozenset[Network] = frozenset()
    """Frozen networks that `build` receives."""
    settings: tuple[str, ...] = ()
    """Fields of RegressionConfig that only this loss reads."""
    describe: Callable[[RegressionConfig], str] = lambda config: ""
    """(settings) -> words that follow the name in a model card."""
