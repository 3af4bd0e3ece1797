"""E-LatentLPIPS: LatentLPIPS of randomly transformed latents (method.md "E-LatentLPIPS")."""

import torch
from torch import Tensor

from distill.config.regression import RegressionConfig
from distill.losses.regression.base import FrozenNetworks, RegressionLoss, RowDistance, Transforms
from latent_lpips import augment
from latent_lpips.config import AugmentConfig
from latent_lpips.distance import ELatentLPIPS, LatentLPIPS


class EnsembleDistance(RowDistance):
    """E-LatentLPIPS with `draws` transforms per row, which the caller samples with `draw`."""

    def __init__(self, metric: LatentLPIPS, families: str, draws: int) -> None:
        super().__init__()
        self.metric, self.draws = metric, draws
        self.ensemble = ELatentLPIPS(metric, AugmentConfig(families=families), draws=draws)

    def draw(self, rows: int, shape: tuple[int, int, int], rng: torch.Generator) -> Transforms:
        """Sample transforms for `rows` latents of `shape` (C, h, w), per draw, on the metric's device."""
        device = next(self.metric.parameters()).device
        return [
            augment.sample_transforms(self.ensemble.augment, rows, shape[1:], rng, device)
            for _ in range(self.draws)
        ]

    def forward(self, pred: Tensor, target: Tensor, transforms: Transforms) -> Tensor:
        """pred, target [B, C, h, w] scaled latents, and the transforms of these rows -> distance [B]."""
        distance: Tensor = self.ensemble(pred, target, transforms=transforms)
        return distance


def _build(config: RegressionConfig, networks: FrozenNetworks) -> EnsembleDistance:
    """Build E-LatentLPIPS with the transforms of `regression.augment`."""
    assert networks.latent_lpips is not None
    return EnsembleDistance(networks.latent_lpips, config.augment, config.draws)


E_LATENT_LPIPS_LOSS = RegressionLoss(
    name="e_latent_lpips",
    log_key="loss/e_latent_lpips",
    build=_build,
    needs=frozenset({"latent_lpips"}),
    settings=("augment", "draws"),
    describe=lambda config: (
        f", transforms `{config.augment}`" + (f", {config.draws} draws" if config.draws > 1 else "")
    ),
)
