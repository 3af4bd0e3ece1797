"""LatentLPIPS and E-LatentLPIPS (Diffusion2GAN, section 3.2): perceptual distances between latents."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2g.core.errors import SettingError, UserError
from latent_lpips import augment
from latent_lpips.augment import AugmentParams
from latent_lpips.config import AugmentConfig, LPIPSConfig, Precision
from latent_lpips.fused import at_least_fp32, distance_with_gradient, layer_distances, normalize_features
from latent_lpips.vgg import VGG16, fold_batch_norms


class PerceptualDistance(nn.Module):
    """d(pred, target) = sum over taps of mean over positions of w . (f_pred - f_target)^2, f of unit length.

    Always in eval mode and outside autocast, whatever the caller's mode or input type. Nothing in it is
    trained through it: gradients go to `pred` only. Non-negative, and 0 for equal inputs, by construction.
    """

    heads: nn.ParameterList

    @abstractmethod
    def taps(self, x: Tensor) -> list[Tensor]:
        """Feature maps [B, C_l, h_l, w_l] of inputs [B, C, h, w], one for each head [C_l]."""

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: batch norm must use the statistics of the trunk's training."""
        return super().train(False)

    def forward(self, pred: Tensor, target: Tensor, spatial: bool = False) -> Tensor:
        """Distance per sample. pred, target: [B, C, h, w]. Returns [B] fp32, >= 0; [B, h, w] if `spatial`."""
        return self.spatial(pred, target) if spatial else self.layers(pred, target).sum(1)

    def layers(self, pred: Tensor, target: Tensor) -> Tensor:
        """The taps' shares of the distance, [B, taps]."""
        parts = self.channel_means(pred, target)
        with _no_autocast(pred):
            weighted = [(p * w.to(p.dtype)).sum(1) for p, w in zip(parts, self.heads, strict=True)]
            return torch.stack(weighted, dim=1)

    def spatial(self, pred: Tensor, target: Tensor) -> Tensor:
        """Where the distance arises: [B, h, w], each tap's map brought to the input's size. Its mean is the
        distance, where one of the sizes divides the other."""
        with _no_autocast(pred):
            squares = zip(self._squares(pred, target), self.heads, strict=True)
            maps = [(s * w.to(s.dtype)[:, None, None]).sum(1, keepdim=True) for s, w in squares]
            return torch.cat([_resized(m, pred.shape[2:]) for m in maps], 1).sum(1)

    def channel_means(self, pred: Tensor, target: Tensor) -> list[Tensor]:
        """One [B, C_l] a tap: squared feature differences averaged over positions, before the heads.

        Heads are linear, so weighting after the average is the same distance at a fraction of the cost.
        """
        with _no_autocast(pred):
            return [s.mean((2, 3)) for s in self._squares(pred, target)]

    def _squares(self, pred: Tensor, target: Tensor) -> list[Tensor]:
        self._check(pred, target)
        with torch.no_grad():
            fixed = [normalize_features(f) for f in self.taps(target)]
        return [(normalize_features(f) - g).square() for f, g in zip(self.taps(pred), fixed, strict=True)]

    def _check(self, pred: Tensor, target: Tensor) -> None:
        if pred.shape != target.shape:
            raise UserError(
                f"{type(self).__name__} compares inputs of one shape, got {tuple(pred.shape)} and "
                f"{tuple(target.shape)}; give both the same size"
            )


class LatentLPIPS(PerceptualDistance):
    """The distance of scaled latents, on a VGG16 made for them. Heads start at 1 (uncalibrated).

    Once folded (`latent_lpips.load` does so), the distance and its gradient come from one sweep over a few
    rows at a time (latent_lpips.fused), so that the gradient is there before `backward` and the trunk's
    features are not kept. It can be differentiated once; `layers` and `spatial` go through autograd.
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

    @property
    def precision(self) -> Precision:
        """bf16 if some of the trunk's convolutions are, else fp32."""
        return "bf16" if any(p.dtype == torch.bfloat16 for p in self.trunk.parameters()) else "fp32"

    def fold(self, precision: Precision = "fp32") -> Self:
        """Put the batch norms into the convolutions, in place. Same distances to 1e-5, less time and memory.

        With bf16 (`auto`: where the hardware multiplies it) half the time again, distances to 1e-2 and
        gradients to a cosine of 0.999, as long as the latents are not nearly equal (distance above 0.01).
        In fp32 on CUDA, PyTorch's own switch decides whether cuDNN may round to TF32. GroupNorm can't be
        folded: such a trunk stays as it is.
        """
        if self.config.norm != "group":
            self.trunk = fold_batch_norms(self.trunk, precision).requires_grad_(False).eval()
        return self

    def taps(self, x: Tensor) -> list[Tensor]:
        """The trunk's five taps of latents [B, C, h, w] (see VGG16.taps)."""
        return self.trunk.taps(x)

    def forward(self, pred: Tensor, target: Tensor, spatial: bool = False) -> Tensor:
        """Distance per sample. pred, target: scaled latents [B, C, h, w]. Returns [B] fp32, >= 0; [B, h, w]
        if `spatial`. Raises UserError for latents of two shapes or that don't fit the trunk."""
        if spatial or self.config.norm != "none":
            return super().forward(pred, target, spatial)
        self._check(pred, target)
        self.trunk.check(pred)
        measure = distance_with_gradient if torch.is_grad_enabled() and pred.requires_grad else _distance
        with _no_autocast(pred):
            return measure(self.trunk.layers(), list(self.heads), pred, target)


class ELatentLPIPS(nn.Module):
    """E over random T of d(T pred, T target): one T per sample and draw, the same for both inputs.

    The expectation is meant to be taken by the training iterations, so one draw is the paper's choice;
    `draws` > 1 averages several. `ensemble` and `l1` are weights of the distance itself and of mean |pred -
    target|, both of the inputs as they are, added on top (SD-CFG-3: ensemble=1). `metric`: LatentLPIPS, or
    any PerceptualDistance; `config`: the transforms, or just their families, such as "bgo".
    """

    def __init__(
        self,
        metric: PerceptualDistance,
        config: AugmentConfig | str | None = None,
        draws: int = 1,
        ensemble: float = 0.0,
        l1: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, least in (("draws", draws, 1), ("ensemble", ensemble, 0), ("l1", l1, 0)):
            if not value >= least:
                raise SettingError(f"ELatentLPIPS: {name} is {value}, expected {least} or more")
        self.metric = metric
        given = AugmentConfig() if config is None else config
        self.augment = AugmentConfig(families=given) if isinstance(given, str) else given
        self.draws, self.ensemble, self.l1 = draws, ensemble, l1

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        generator: torch.Generator | None = None,
        transforms: Sequence[AugmentParams] | None = None,
    ) -> Tensor:
        """Distance per sample, [B, C, h, w] -> [B] fp32, >= 0: the weighted sum of `parts`."""
        weights = {"e_latent_lpips": 1.0, "latent_lpips": self.ensemble, "l1": self.l1}
        parts = self.parts(pred, target, generator, transforms)
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum(0)

    def parts(
        self,
        pred: Tensor,
        target: Tensor,
        generator: torch.Generator | None = None,
        transforms: Sequence[AugmentParams] | None = None,
    ) -> dict[str, Tensor]:
        """What the sum is made of, unweighted, [B] each: e_latent_lpips, and as asked for latent_lpips, l1.

        `generator` may live on the CPU or on the latents' device; without one, torch's global state.
        `transforms`: from `draw`, for a second look at them, or to stay in one graph under torch.compile,
        which knows no generators.
        """
        if transforms is None:
            transforms = self.draw(pred, generator)
        found = {"e_latent_lpips": torch.stack([self._under(t, pred, target) for t in transforms]).mean(0)}
        if self.ensemble:
            found["latent_lpips"] = self.metric(pred, target)
        if self.l1:
            found["l1"] = (at_least_fp32(pred) - at_least_fp32(target)).abs().mean((1, 2, 3))
        return found

    def draw(self, pred: Tensor, generator: torch.Generator | None = None) -> list[AugmentParams]:
        """`draws` transforms of each sample of `pred` [B, C, h, w]; of no family, one is enough."""
        size, draws = pred.shape[2:], self.draws if self.augment.letters else 1
        return [
            augment.sample_transforms(self.augment, len(pred), size, generator, pred.device)
            for _ in range(draws)
        ]

    def _under(self, transform: AugmentParams, pred: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            target = augment.apply_transforms(target, transform)
        distance: Tensor = self.metric(augment.apply_transforms(pred, transform), target)
        return distance


def _distance(layers: Sequence[Any], heads: Sequence[Tensor], pred: Tensor, target: Tensor) -> Tensor:
    return layer_distances(layers, heads, pred, target).sum(1)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [B, 1, h, w] of another size with the same mean: enlarged bilinearly, shrunk by averaging."""
    if x.shape[2] > size[0] or x.shape[3] > size[1]:
        return F.adaptive_avg_pool2d(x, (size[0], size[1]))
    return F.interpolate(x, (size[0], size[1]), mode="bilinear")


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _refuse_negative_heads(module: nn.Module, _: object) -> None:
    """A distance with a negative weight can fall below 0 and be minimized without end."""
    assert isinstance(module, LatentLPIPS)
    require_nonnegative_heads(module.heads)


def require_nonnegative_heads(heads: Sequence[Tensor] | nn.ParameterList, where: str = "LatentLPIPS") -> None:
    """Raise UserError for a head [C] with a weight below 0 or not a number."""
    for layer, weight in enumerate(heads):
        low = weight.min().item()
        if not low >= 0:
            raise UserError(
                f"{where}: head {layer} holds the weight {low:.3g}, expected 0 or more, for a negative one "
                "makes negative distances; calibrate again, with weights clamped at 0 after each step"
            )
