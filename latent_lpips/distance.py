"""Perceptual distances between latents: LatentLPIPS and E-LatentLPIPS (Diffusion2GAN, section 3.2)."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2g.core.errors import SettingError, UserError
from d2g.core.precision import exact_fp32
from latent_lpips import augment
from latent_lpips.augment import AugmentParams
from latent_lpips.config import AugmentConfig, LPIPSConfig, Precision
from latent_lpips.fused import at_least_fp32, distance_with_gradient, layer_distances, normalize_features
from latent_lpips.vgg import VGG16, fold_batch_norms


class PerceptualDistance(nn.Module):
    """Base class of LPIPS-like distances.

    d(pred, target) = sum over layers l of mean over positions of w_l . (f_l(pred) - f_l(target))^2, where the
    features f_l have unit length over channels and the head weights w_l are not negative. The distance is
    therefore never negative, and 0 for equal inputs. It always runs in eval mode and outside autocast.
    Gradients flow to `pred` only; trunk and heads are frozen.
    """

    heads: nn.ParameterList

    @abstractmethod
    def taps(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps [B, C_l, h_l, w_l] of inputs [B, C, h, w], one per head [C_l]."""

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: batch norm must use its running statistics, whatever mode the caller sets."""
        return super().train(False)

    def forward(self, pred: Tensor, target: Tensor, spatial: bool = False) -> Tensor:
        """Return the distance per sample, [B] in fp32, or a map [B, h, w] with `spatial`.

        `pred` and `target` are [B, C, h, w]. Raises UserError when their shapes differ.
        """
        return self.spatial(pred, target) if spatial else self.layers(pred, target).sum(1)

    def layers(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return each layer's contribution to the distance, [B, layers]. The distance is their sum."""
        parts = self.channel_means(pred, target)
        with _no_autocast(pred):
            weighted = [(p * w.to(p.dtype)).sum(1) for p, w in zip(parts, self.heads, strict=True)]
            return torch.stack(weighted, dim=1)

    def spatial(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return a distance map [B, h, w]: the sum of all layers' maps, resized to the input's size.

        Its mean equals the distance when the input's size is a multiple of each layer's size.
        """
        with _no_autocast(pred):
            squares = zip(self._squares(pred, target), self.heads, strict=True)
            maps = [(s * w.to(s.dtype)[:, None, None]).sum(1, keepdim=True) for s, w in squares]
            return torch.cat([_resize_map(m, pred.shape[2:]) for m in maps], 1).sum(1)

    def channel_means(self, pred: Tensor, target: Tensor) -> list[Tensor]:
        """Return squared feature differences averaged over positions, [B, C_l] per layer, before the heads.

        The heads are linear, so weighting these averages gives the same distance as weighting every position,
        at a fraction of the cost.
        """
        with _no_autocast(pred):
            return [s.mean((2, 3)) for s in self._squares(pred, target)]

    def _squares(self, pred: Tensor, target: Tensor) -> list[Tensor]:
        self.check(pred, target)
        with torch.no_grad():
            target_features = [normalize_features(f) for f in self.taps(target)]
        return [
            (normalize_features(f) - g).square()
            for f, g in zip(self.taps(pred), target_features, strict=True)
        ]

    def check(self, pred: Tensor, target: Tensor) -> None:
        """Raise UserError for inputs of different shapes, or of a shape that the network cannot take."""
        if pred.shape != target.shape:
            raise UserError(
                f"{type(self).__name__} compares inputs of one shape, got {tuple(pred.shape)} and "
                f"{tuple(target.shape)}; give both the same size"
            )


class LatentLPIPS(PerceptualDistance):
    """Perceptual distance between scaled latents, on a VGG16 trained in their latent space.

    New heads have weight 1 (uncalibrated); `latent_lpips.load_lpips` loads trained ones. After `fold`, which
    `load_lpips` calls, the distance and its gradient are computed together, a few rows at a time
    (latent_lpips/fused.py): the trunk's features are not stored, and memory does not grow with the batch.
    This path supports one derivative; `layers` and `spatial` use autograd.

    >>> import torch
    >>> from latent_lpips.config import LPIPSConfig
    >>> metric = LatentLPIPS(LPIPSConfig(channels=4, width=1 / 16)).fold()
    >>> pred, target = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8)
    >>> distance = metric(pred, target)
    >>> distance.shape
    torch.Size([2])
    >>> distance.mean().backward()
    >>> pred.grad.shape
    torch.Size([2, 4, 8, 8])
    >>> metric(target, target).tolist()
    [0.0, 0.0]
    """

    def __init__(self, config: LPIPSConfig, trunk: VGG16 | None = None) -> None:
        super().__init__()
        # The distance needs only the features of the trunk.
        self.trunk = trunk if trunk is not None else VGG16(config)
        assert self.trunk.config == config, "the trunk was built with another config"
        self.trunk.classifier = None  # only needed to train the trunk
        self.heads = nn.ParameterList(torch.ones(width) for width in config.widths)
        # Frozen, in eval mode, and never with negative heads.
        self.requires_grad_(False)
        register: Any = self.register_load_state_dict_post_hook  # untyped in torch
        register(_check_heads)
        self.train()

    @property
    def config(self) -> LPIPSConfig:
        """The trunk's config. Folding changes its `norm` to `none`."""
        return self.trunk.config

    @property
    def precision(self) -> Precision:
        """bf16 if any of the trunk's convolutions is bf16, else fp32."""
        return "bf16" if any(p.dtype == torch.bfloat16 for p in self.trunk.parameters()) else "fp32"

    def fold(self, precision: Precision = "fp32") -> Self:
        """Fold the batch norms into the convolutions, in place. Distances stay equal to 1e-5.

        `precision="bf16"` takes half the time of fp32 or less; `"auto"` uses bf16 where the hardware supports
        it. Distances then agree to 1 % and gradients to a cosine of 0.999, unless the latents are nearly
        equal (distance below 0.01). fp32 layers run without TF32 on CUDA. A trunk with group norm cannot be
        folded and stays unchanged.
        """
        if self.config.norm != "group":
            self.trunk = fold_batch_norms(self.trunk, precision).requires_grad_(False).eval()
        return self

    def taps(self, x: Tensor) -> list[Tensor]:
        """Return the trunk's five feature maps of latents [B, C, h, w] (see `VGG16.taps`)."""
        return self.trunk.taps(x)

    def check(self, pred: Tensor, target: Tensor) -> None:
        """Raise UserError for latents of different shapes, or that do not fit the trunk."""
        super().check(pred, target)
        self.trunk.check(pred)

    def forward(self, pred: Tensor, target: Tensor, spatial: bool = False) -> Tensor:
        """Return the distance per sample, [B] in fp32, or a map [B, h, w] with `spatial`.

        `pred` and `target` are scaled latents [B, C, h, w]. Raises UserError when their shapes differ or do
        not fit the trunk.
        """
        if spatial or self.config.norm != "none":
            return super().forward(pred, target, spatial)
        # The fused path (latent_lpips/fused.py), with a gradient only where one is needed.
        self.check(pred, target)
        compute = (
            distance_with_gradient
            if torch.is_grad_enabled() and pred.requires_grad
            else _distance_without_gradient
        )
        with _no_autocast(pred), exact_fp32(pred.device):
            return compute(self.trunk.layers(), list(self.heads), pred, target)


class ELatentLPIPS(nn.Module):
    """E-LatentLPIPS: the distance d(T pred, T target) under random transforms T (Diffusion2GAN, section 3.2).

    Each sample gets its own transform, the same for both inputs. The paper draws one transform per sample and
    lets the training iterations average; `draws` > 1 averages several per call. `ensemble` and `l1` are the
    weights of two terms without transforms that are added: the distance itself and mean |pred - target|
    (the paper's SD-CFG-3 uses ensemble=1). `metric` is a LatentLPIPS or another PerceptualDistance. `config`
    is an AugmentConfig, or only its families of transforms, such as "bgo".

    >>> import torch
    >>> from latent_lpips.config import LPIPSConfig
    >>> from latent_lpips.distance import LatentLPIPS
    >>> metric = LatentLPIPS(LPIPSConfig(channels=4, width=1 / 16)).fold()
    >>> loss = ELatentLPIPS(metric, "bgco", ensemble=1.0)
    >>> pred, target = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    >>> loss(pred, target).shape
    torch.Size([2])
    >>> sorted(loss.parts(pred, target, generator=torch.Generator().manual_seed(0)))
    ['e_latent_lpips', 'latent_lpips']
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
        # `not >=` also refuses NaN.
        for name, value, minimum in (("draws", draws, 1), ("ensemble", ensemble, 0), ("l1", l1, 0)):
            if not value >= minimum:
                raise SettingError(f"ELatentLPIPS: {name} is {value}, expected {minimum} or more")
        # A string names the families alone, with the defaults of the other settings.
        self.metric = metric
        config = AugmentConfig() if config is None else config
        self.augment = AugmentConfig(families=config) if isinstance(config, str) else config
        self.draws, self.ensemble, self.l1 = draws, ensemble, l1

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        generator: torch.Generator | None = None,
        transforms: Sequence[AugmentParams] | None = None,
    ) -> Tensor:
        """Return the loss per sample: [B, C, h, w] -> [B] in fp32, >= 0, the weighted sum of `parts`."""
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
        """Return the unweighted terms by name, [B] each: e_latent_lpips, and latent_lpips and l1 if weighted.

        `generator` may live on the CPU or on the latents' device; the default is torch's global generator.
        `transforms` come from `sample_transforms`. Pass them to reuse the same transforms, or to stay in one
        graph under torch.compile, which does not support generators. Raises UserError for latents as the
        metric does, and for transforms of another number of samples.
        """
        # Some transforms would broadcast one sample over the others.
        self.metric.check(pred, target)
        if transforms is None:
            transforms = self.sample_transforms(pred, generator)
        for transform in transforms:
            if len(transform.flip) != len(pred):
                raise UserError(
                    f"ELatentLPIPS got transforms of {len(transform.flip)} samples for {len(pred)} latents; "
                    "sample them for these latents"
                )
        # The mean over draws, then the terms without transforms.
        distances = [self._transformed_distance(transform, pred, target) for transform in transforms]
        terms = {"e_latent_lpips": torch.stack(distances).mean(0)}
        if self.ensemble:
            terms["latent_lpips"] = self.metric(pred, target)
        if self.l1:
            terms["l1"] = (at_least_fp32(pred) - at_least_fp32(target)).abs().mean((1, 2, 3))
        return terms

    def sample_transforms(
        self, pred: Tensor, generator: torch.Generator | None = None
    ) -> list[AugmentParams]:
        """Sample `draws` transforms for each sample of `pred` [B, C, h, w]; one if `families` is none."""
        size, draws = pred.shape[2:], self.draws if self.augment.letters else 1
        return [
            augment.sample_transforms(self.augment, len(pred), size, generator, pred.device)
            for _ in range(draws)
        ]

    def _transformed_distance(self, transform: AugmentParams, pred: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            target = augment.apply_transforms(target, transform)
        distance: Tensor = self.metric(augment.apply_transforms(pred, transform), target)
        return distance


def _distance_without_gradient(
    layers: Sequence[Any], heads: Sequence[Tensor], pred: Tensor, target: Tensor
) -> Tensor:
    return layer_distances(layers, heads, pred, target).sum(1)


def _resize_map(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps [B, 1, h, w] and keep their mean: bilinear upsampling, or average pooling."""
    if x.shape[2] > size[0] or x.shape[3] > size[1]:
        return F.adaptive_avg_pool2d(x, (size[0], size[1]))
    return F.interpolate(x, (size[0], size[1]), mode="bilinear")


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _check_heads(module: nn.Module, _: object) -> None:
    """Reject negative head weights on loading: the distance could become negative and have no minimum."""
    assert isinstance(module, LatentLPIPS)
    require_nonnegative_heads(module.heads)


def require_nonnegative_heads(heads: Sequence[Tensor] | nn.ParameterList, where: str = "LatentLPIPS") -> None:
    """Raise UserError if a head [C] has a weight that is negative or NaN. `where` begins the message."""
    for layer, weight in enumerate(heads):
        # `not >=` also catches NaN.
        lowest = weight.min().item()
        if not lowest >= 0:
            raise UserError(
                f"{where}: head {layer} holds the weight {lowest:.3g}, expected 0 or more, because a "
                "negative weight makes negative distances; calibrate again and clamp the weights at 0 "
                "after each step"
            )
