"""VGG16 for latents: torchvision's layout and parameter names, without the first three max-pools."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2g.core.errors import UserError
from latent_lpips.config import LPIPSConfig, Precision

MIN_LATENT_SIZE = 4
"""Positions per side: two poolings must leave at least one."""
CONVS_PER_STAGE = (2, 2, 3, 3, 3)
POOLED_STAGES = (3, 4)
MAX_NORM_GROUPS = 32
FP32_CONVS = 5
"""A bf16 trunk keeps its first five convolutions in fp32, 6 % of the work. Their rounding would be most of
the error: it flips ReLUs in every later layer, and gradients with them."""


class ConvLayer(NamedTuple):
    """A convolution of a trunk without norms, ReLU after it, then perhaps a 2x2 max-pool, perhaps a tap."""

    weight: Tensor
    bias: Tensor
    pool: bool
    tap: bool


class VGG16(nn.Module):
    """Trunk of the latent distance, and with `classes` > 0 the classifier that it is trained as.

    `features` is numbered as in torchvision's vgg16_bn (or vgg16 for norm `none`); the removed pools are
    Identity, so a state dict of that form loads. Latents are 8x smaller than the pixels that VGG was made
    for, hence the pools that go are the first three (Diffusion2GAN, supplement C.2).
    """

    def __init__(self, config: LPIPSConfig, classes: int = 0, dropout: float = 0.5, grid: int = 7) -> None:
        super().__init__()
        self.config = config
        self.features = nn.Sequential()
        self.ends: list[int] = []  # each tap is read after features[end - 1], the stage's pool
        previous = config.channels
        for stage, (width, convs) in enumerate(zip(config.widths, CONVS_PER_STAGE, strict=True)):
            for _ in range(convs):
                self.features.append(nn.Conv2d(previous, width, 3, padding=1))
                if config.norm == "batch":
                    self.features.append(nn.BatchNorm2d(width))
                elif config.norm == "group":
                    self.features.append(nn.GroupNorm(math.gcd(MAX_NORM_GROUPS, width), width))
                self.features.append(nn.ReLU(inplace=True))
                previous = width
            self.features.append(nn.MaxPool2d(2) if stage in POOLED_STAGES else nn.Identity())
            self.ends.append(len(self.features))
        self.avgpool = nn.AdaptiveAvgPool2d(grid)
        self.classifier = _classifier(config, classes, dropout, grid) if classes else None
        self.apply(_initialize)

    def taps(self, x: Tensor) -> list[Tensor]:
        """Latents [B, C, h, w] -> five maps: stages 1-3 at h x w, stage 4 halved, stage 5 halved twice
        (taps 4 and 5 come after their pools, unlike LPIPS), each in the type of its convolutions. Raises
        UserError for latents that don't fit."""
        self.check(x)
        maps = []
        for position, module in enumerate(self.features, start=1):
            x = module(x.to(module.weight.dtype) if isinstance(module, nn.Conv2d) else x)
            if position in self.ends:
                maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> class logits [B, classes]."""
        assert self.classifier is not None, "this trunk was built without a classifier"
        self.check(x)
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits

    def layers(self) -> list[ConvLayer]:
        """The convolutions in order, of a trunk without norms (see `folded`)."""
        assert self.config.norm == "none", f"a trunk with norm {self.config.norm!r} is more than convolutions"
        found: list[ConvLayer] = []
        for position, module in enumerate(self.features, start=1):
            if isinstance(module, nn.Conv2d):
                assert module.bias is not None
                found.append(ConvLayer(module.weight, module.bias, pool=False, tap=False))
            if position in self.ends:
                found[-1] = found[-1]._replace(pool=isinstance(module, nn.MaxPool2d), tap=True)
        return found

    def check(self, x: Tensor) -> None:
        """Raise UserError for latents of another number of channels, or too small for two poolings."""
        if x.dim() != 4 or x.shape[1] != self.config.channels:
            raise UserError(
                f"LatentLPIPS got latents of shape {tuple(x.shape)}, its trunk takes "
                f"[B, {self.config.channels}, h, w]; use weights made for this latent space"
            )
        if min(x.shape[2:]) < MIN_LATENT_SIZE:
            raise UserError(
                f"LatentLPIPS got latents of {x.shape[2]}x{x.shape[3]} positions, expected at least "
                f"{MIN_LATENT_SIZE}x{MIN_LATENT_SIZE}; use larger images"
            )


def _classifier(config: LPIPSConfig, classes: int, dropout: float, grid: int) -> nn.Sequential:
    features, hidden = config.widths[-1] * grid**2, max(1, round(4096 * config.width))
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    )


def _initialize(module: nn.Module) -> None:
    """He's. For linear layers torchvision's N(0, 0.01^2) is that at full width; narrow ones it starves."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        assert module.bias is not None
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


@torch.no_grad()
def fold_batch_norms(trunk: VGG16, precision: Precision = "fp32") -> VGG16:
    """The same features without batch norms: running statistics go into the convolutions.

    A frozen trunk never updates them, and a convolution alone is faster. Returns a trunk with norm `none`,
    no classifier and channels-last weights, computed in float64 and rounded once: to fp32, or from the sixth
    convolution on to bf16 where `precision` says so (see `convolution_dtype`).
    """
    plain = VGG16(LPIPSConfig(channels=trunk.config.channels, width=trunk.config.width, norm="none"))
    target = [m for m in plain.features if isinstance(m, nn.Conv2d)]
    device = next(trunk.parameters()).device
    low = convolution_dtype(precision, device)
    for position, (conv, (weight, bias)) in enumerate(zip(target, _folded_weights(trunk), strict=True)):
        conv.weight.copy_(weight)
        assert conv.bias is not None
        conv.bias.copy_(bias)
        conv.to(low if position >= FP32_CONVS else torch.float32)
    moved: VGG16 = plain.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def convolution_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """What `precision` means on `device`. Only a capability is asked for, nothing is timed: the same machine
    always gives the same numbers."""
    if precision == "auto":
        return torch.bfloat16 if _multiplies_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        tell: Any = getattr(torch.cpu, "get_capabilities", dict)  # not in older torch
        return bool(tell().get("avx512_bf16") or tell().get("amx_bf16"))
    return False


def _folded_weights(trunk: VGG16) -> list[tuple[Tensor, Tensor]]:
    pairs: list[tuple[Tensor, Tensor]] = []
    for module in trunk.features:
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            pairs.append((module.weight.double(), module.bias.double()))
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            weight, bias = pairs[-1]
            gain = module.weight.double() / (module.running_var.double() + module.eps).sqrt()
            shift = (bias - module.running_mean.double()) * gain + module.bias.double()
            pairs[-1] = (weight * gain[:, None, None, None], shift)
    return pairs
