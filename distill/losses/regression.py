"""The regression loss of both stages: a distance between the student's and the teacher's latents."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from d2g.core.errors import SettingError
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode
from d2g.diffusion.pipelines import family_of
from distill.config.run import DistillConfig
from latent_lpips import augment
from latent_lpips.augment import AugmentParams
from latent_lpips.config import AugmentConfig, Precision
from latent_lpips.distance import ELatentLPIPS
from latent_lpips.lpips import PixelLPIPS
from latent_lpips.weights import load_lpips

Transforms = list[AugmentParams] | None


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row, [B]."""
    return (pred - target).square().mean(dim=(1, 2, 3))


def pseudo_huber(pred: Tensor, target: Tensor, c: float) -> Tensor:
    """sqrt(|d|^2 + C^2) - C of each row, [B], with d the row's difference of n elements and C = c sqrt(n)
    (Song and Dhariwal 2024, "Improved techniques for training consistency models"; their c is 0.00054).
    """
    scale = c * math.sqrt(pred[0].numel())
    return ((pred - target).square().sum(dim=(1, 2, 3)) + scale**2).sqrt() - scale


class Regression(nn.Module):
    """The config's distance between scaled latents, and as set beside it plain LatentLPIPS and L1.

    Raises UserError for weights that are missing or of another latent space, SettingError for a distance of
    latents where the teacher draws pixels.
    """

    def __init__(self, config: DistillConfig, channels: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config.regression
        if self.config.needs_latent_lpips:
            _expect_latents(config)
            folder = config.lpips or str(pretrained.resolve(config.teacher) / "latent_lpips")
            precision: Precision = "auto" if config.train.precision == "bf16" else "fp32"
            self.plain = load_lpips(folder, channels, precision=precision, device=device)
        if self.config.kind == "e_latent_lpips":
            families = AugmentConfig(families=self.config.augment)
            self.augmented = ELatentLPIPS(self.plain, families, draws=self.config.draws)
        if self.config.kind == "lpips":
            self.vae = pretrained.load_vae(config.teacher).to(device)
            self.pixels = PixelLPIPS(
                self.config.lpips_net,
                self.config.lpips_weights or None,
                decode=partial(decode, self.vae),
                resize=self.config.lpips_resize or None,
            ).to(device)

    def draw(self, rows: int, shape: tuple[int, int, int], rng: torch.Generator) -> Transforms:
        """Transforms of `rows` latents [C, h, w], where the distance has such; else None."""
        if self.config.kind != "e_latent_lpips":
            return None
        size, device = shape[1:], next(self.plain.parameters()).device
        return [
            augment.sample_transforms(self.augmented.augment, rows, size, rng, device)
            for _ in range(self.config.draws)
        ]

    def distance(self, pred: Tensor, target: Tensor, transforms: Transforms) -> Tensor:
        """The distance of each row, [B]; pred, target [B, C, h, w] scaled latents."""
        kinds: dict[str, Callable[[], Tensor]] = {
            "e_latent_lpips": lambda: self.augmented(pred, target, transforms=transforms),
            "latent_lpips": lambda: self.plain(pred, target),
            "lpips": lambda: self.pixels(pred, target),
            "mse": lambda: squared_error(pred, target),
            "pseudo_huber": lambda: pseudo_huber(pred, target, self.config.huber_c),
        }
        return kinds[self.config.kind]()

    def forward(
        self, pred: Tensor, target: Tensor, transforms: Transforms
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pred, target [B, C, h, w] -> (weighted sum, its unweighted parts), means over the batch.

        transforms: of these rows, from `draw`.
        """
        parts = {f"loss/{self.config.kind}": self.distance(pred, target, transforms).mean()}
        total = self.config.weight * parts[f"loss/{self.config.kind}"]
        if self.config.latent_lpips_weight:
            parts["loss/latent_lpips"] = self.plain(pred, target).mean()
            total = total + self.config.latent_lpips_weight * parts["loss/latent_lpips"]
        if self.config.l1_weight:
            parts["loss/l1"] = (pred - target).abs().mean()
            total = total + self.config.l1_weight * parts["loss/l1"]
        return total, parts


def _expect_latents(config: DistillConfig) -> None:
    if family_of(config.teacher).autoencoder is None:
        beside = config.regression.kind not in ("e_latent_lpips", "latent_lpips")
        raise SettingError(
            f"teacher {config.teacher} draws pixels, of which there is no LatentLPIPS; set "
            + ("regression.latent_lpips_weight=0" if beside else "regression.kind=lpips, pseudo_huber or mse")
        )
