"""LatentLPIPS and E-LatentLPIPS (Diffusion2GAN, section 3.2): perceptual distances between latents."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import UserError
from latent_lpips import augment
from latent_lpips.config import AugmentConfig, LPIPSConfig
from latent_lpips.vgg import VGG16, folded

EPS = 1e-8


def normalise(features: Tensor) -> Tensor:
    """Features [B, C, h, w] -> unit length over C at every position.

    The epsilon stands inside the root: outside it, the gradient at all-zero features would be 0/0.
    """
    return features / (features.square().sum(1, keepdim=True) + EPS).sqrt()


class LatentLPIPS(nn.Module):
    """d(pred, target) = sum over 5 taps of mean over positions of w . (f_pred - f_target)^2.

    Always in eval mode and fp32, whatever the caller's mode, autocast or input type. Nothing in it is
    trained through it: gradients go to `pred` only. Heads start at 1 (the uncalibrated distance).
    """

    def __init__(self, config: LPIPSConfig, trunk: VGG16 | None = None) -> None:
        super().__init__()
        self.trunk = trunk if trunk is not None else VGG16(config)
        assert self.trunk.config == config, "the trunk was built with another config"
        self.trunk.classifier = None  # only its training needs it
        self.heads = nn.ParameterList(torch.ones(width) for width in config.widths)
        self.requires_grad_(False)
        register: Any = self.register_load_state_dict_post_hook  # torch leaves it untyped
        register(_refuse_negative_heads)
        self.train()

    @property
    def config(self) -> LPIPSConfig:
        """The trunk's config; `norm` becomes `none` by folding."""
        return self.trunk.config

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: batch norm must use the statistics of the trunk's training (method 10.8)."""
        return super().train(False)

    def fold(self) -> Self:
        """Put the batch norms into the convolutions, in place. Same distances to 1e-5, less time."""
        self.trunk = folded(self.trunk).requires_grad_(False).eval()
        return self

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Distance per sample. pred, target: scaled latents [B, C, h, w]. Returns [B] fp32, >= 0."""
        return self.layers(pred, target).sum(1)

    def layers(self, pred: Tensor, target: Tensor) -> Tensor:
        """The five taps' shares of the distance, [B, 5]."""
        parts = self.channel_means(pred, target)
        with _fp32(pred):
            return torch.stack([(p * w).sum(1) for p, w in zip(parts, self.heads, strict=True)], dim=1)

    def spatial(self, pred: Tensor, target: Tensor) -> Tensor:
        """Where the distance arises: [B, h, w], each tap's map enlarged bilinearly to the latent's size."""
        with _fp32(pred):
            maps = [
                F.interpolate((s * w[:, None, None]).sum(1, keepdim=True), pred.shape[2:], mode="bilinear")
                for s, w in zip(self._squares(pred, target), self.heads, strict=True)
            ]
            return torch.cat(maps, 1).sum(1)

    def channel_means(self, pred: Tensor, target: Tensor) -> list[Tensor]:
        """Five [B, C_l]: squared feature differences averaged over positions, before the heads.

        Heads are linear, so weighting after the average is the same distance at a fraction of the cost.
        """
        with _fp32(pred):
            return [s.mean((2, 3)) for s in self._squares(pred, target)]

    def _squares(self, pred: Tensor, target: Tensor) -> list[Tensor]:
        if pred.shape != target.shape:
            raise UserError(
                f"LatentLPIPS compares latents of one shape, got {tuple(pred.shape)} and "
                f"{tuple(target.shape)}; give both the same size"
            )
        with torch.no_grad():
            fixed = [normalise(f) for f in self.trunk.taps(target.float())]
        moving = self.trunk.taps(pred.float())
        return [(normalise(f) - g).square() for f, g in zip(moving, fixed, strict=True)]


class ELatentLPIPS(nn.Module):
    """E over random T of LatentLPIPS(T pred, T target): one T per sample and draw, the same for both.

    The expectation is meant to be taken by the training iterations, so one draw is the paper's choice;
    `draws` > 1 averages several, for measuring.
    """

    def __init__(self, metric: LatentLPIPS, config: AugmentConfig | None = None, draws: int = 1) -> None:
        super().__init__()
        assert draws >= 1, f"draws is {draws}, expected 1 or more"
        self.metric = metric
        self.augment = config if config is not None else AugmentConfig()
        self.draws = draws

    def forward(self, pred: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Distance per sample under random transforms. Scaled latents [B, C, h, w] -> [B] fp32, >= 0.

        `generator` may live on the CPU or on the latents' device; without one, torch's global state.
        """
        distances = [self._one_draw(pred, target, generator) for _ in range(self.draws)]
        return torch.stack(distances).mean(0)

    def _one_draw(self, pred: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        params = augment.draw(self.augment, len(pred), pred.shape[2:], generator, pred.device)
        with torch.no_grad():
            target = augment.apply(target, params)
        distance: Tensor = self.metric(augment.apply(pred, params), target)
        return distance


def _fp32(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _refuse_negative_heads(module: nn.Module, _: object) -> None:
    """A distance with a negative weight can fall below 0 and be minimised without end (method 10.8)."""
    assert isinstance(module, LatentLPIPS)
    for layer, weight in enumerate(module.heads):
        low = weight.min().item()
        if not low >= 0:
            raise UserError(
                f"LatentLPIPS head {layer} holds the weight {low:.3g}, expected 0 or more; "
                "calibrate again, with weights clamped at 0 after each step"
            )
