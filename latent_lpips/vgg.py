"""VGG16 for latents: torchvision's layout and parameter names without the first three max-pools."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.core.precision import fp32_products_are_exact, has_amx, supports_bf16
from latent_lpips.config import LPIPSConfig, Precision
from latent_lpips.winograd import Winograd
from latent_lpips.winograd_2x2 import Winograd2x2
from latent_lpips.winograd_4x4 import Winograd4x4

MIN_LATENT_SIZE = 4
"""Smallest side of a latent in positions: two poolings must leave at least one."""
CONVS_PER_STAGE = (2, 2, 3, 3, 3)
POOLED_STAGES = (3, 4)
MAX_NORM_GROUPS = 32
FP32_CONVS = 5
"""A bf16 trunk keeps its first five convolutions, 6 % of the work, in fp32. Rounding them would cause most of
the error, because it flips ReLUs, and with them gradients, in every later layer."""


WINOGRAD: dict[torch.dtype, type[Winograd]] = {
    torch.bfloat16: Winograd2x2,
    torch.float32: Winograd4x4,
}
"""Winograd's convolutions on a CPU by the type of a trunk's weights."""


class ConvLayer(NamedTuple):
    """A convolution of a trunk without norms, followed by ReLU.

    pool: a 2x2 max-pool follows. tap: the distance uses its output. by_difference: convolve the target's
    features and the differences to them, not two features (latent_lpips/fused.py). winograd: the same
    convolution with fewer multiplications, where that is faster.
    """

    weight: Tensor
    bias: Tensor
    pool: bool
    tap: bool
    by_difference: bool = False
    winograd: Winograd | None = None


class VGG16(nn.Module):
    """Trunk of the latent distance; with `classes` > 0 also the classifier that trains it.

    `features` is numbered as in torchvision's vgg16_bn (vgg16 for norm `none`), with Identity in place of the
    removed pools, so their state dicts load. Latents are 8x smaller than the images VGG was designed for, so
    the first three pools are removed (Diffusion2GAN, supplement C.2).
    """

    def __init__(self, config: LPIPSConfig, classes: int = 0, dropout: float = 0.5, grid: int = 7) -> None:
        super().__init__()
        self.config = config
        self.features = nn.Sequential()
        self.ends: list[int] = []  # each tap is the output of features[end - 1], the stage's pool
        # Stages of convolution, norm and ReLU, each followed by a pool or its placeholder.
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
        # The classifier only serves to train the trunk.
        self.avgpool = nn.AdaptiveAvgPool2d(grid)
        self.classifier = _classifier(config, classes, dropout, grid) if classes else None
        self.apply(_initialize_weights)

    def taps(self, x: Tensor) -> list[Tensor]:
        """Return five feature maps of latents [B, C, h, w], each in the dtype of its convolutions.

        Stages 1 to 3 have size h x w, stage 4 half, stage 5 a quarter of it: unlike in LPIPS, taps 4 and 5
        come after their pools. Raises UserError for latents that do not fit the trunk.
        """
        self.check(x)
        maps = []
        for position, module in enumerate(self.features, start=1):
            x = module(x.to(module.weight.dtype) if isinstance(module, nn.Conv2d) else x)
            if position in self.ends:
                maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Classify latents [B, C, h, w]: returns logits [B, classes]."""
        assert self.classifier is not None, "this trunk was built without a classifier"
        self.check(x)
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits

    def layers(self) -> list[ConvLayer]:
        """Return the convolutions of a trunk without norms, in order (see `fold_batch_norms`)."""
        assert self.config.norm == "none", f"a trunk with norm {self.config.norm!r} is more than convolutions"
        layers: list[ConvLayer] = []
        for position, module in enumerate(self.features, start=1):
            if isinstance(module, nn.Conv2d):
                assert module.bias is not None
                # Both only on a CPU, and where layers are not traced.
                on_cpu = module.weight.device.type == "cpu" and not torch.compiler.is_compiling()
                by_difference = on_cpu and module.weight.dtype == torch.bfloat16 and _is_wide(module)
                winograd = _winograd(module) if on_cpu else None
                layers.append(ConvLayer(module.weight, module.bias, False, False, by_difference, winograd))
            # The end of a stage marks the last convolution as a tap.
            if position in self.ends:
                layers[-1] = layers[-1]._replace(pool=isinstance(module, nn.MaxPool2d), tap=True)
        return layers

    def check(self, x: Tensor) -> None:
        """Raise UserError for latents with another number of channels, or too small for two poolings."""
        if x.dim() != 4 or x.shape[1] != self.config.channels:
            raise UserError(
                f"LatentLPIPS got latents of shape {tuple(x.shape)}, its trunk takes "
                f"[B, {self.config.channels}, h, w]; use weights for this latent space"
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


def _initialize_weights(module: nn.Module) -> None:
    """He initialization. Torchvision's N(0, 0.01^2) for linear layers equals it at full width only."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        assert module.bias is not None
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


@torch.no_grad()
def fold_batch_norms(trunk: VGG16, precision: Precision = "fp32") -> VGG16:
    """Return an equivalent trunk without batch norms: their running statistics go into the convolutions.

    A frozen trunk never updates them, and a convolution alone is faster. The result has norm `none`, no
    classifier and channels-last weights. Weights are computed in float64 and rounded once: to fp32, or from
    the sixth convolution on to bf16 if `precision` says so (see `convolution_dtype`).
    """
    # A trunk of the same shape without norms.
    plain = VGG16(LPIPSConfig(channels=trunk.config.channels, width=trunk.config.width, norm="none")).float()
    convolutions = [m for m in plain.features if isinstance(m, nn.Conv2d)]
    device = next(trunk.parameters()).device
    dtype = convolution_dtype(precision, device)
    # Copy the folded weights, rounded once to their final type.
    for position, (conv, (weight, bias)) in enumerate(zip(convolutions, _folded_weights(trunk), strict=True)):
        conv.weight.copy_(weight)
        assert conv.bias is not None
        conv.bias.copy_(bias)
        conv.to(dtype if position >= FP32_CONVS else torch.float32)
        # Wide convolutions on a CPU take Winograd's fewer multiplications, but bf16 ones with AMX, and the
        # fp32 ones of a bf16 trunk, which are narrow.
        slow = device.type == "cpu" and not (dtype == torch.bfloat16 and has_amx())
        if conv.weight.dtype == dtype and slow and _is_wide(conv):
            conv.register_buffer("winograd", WINOGRAD[dtype].transform(weight, dtype), persistent=False)
    result: VGG16 = plain.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return result


def _is_wide(conv: nn.Conv2d) -> bool:
    """Whether Winograd's convolutions for its type are faster than direct ones."""
    return min(conv.in_channels, conv.out_channels) >= WINOGRAD[conv.weight.dtype].MIN_CHANNELS


def _winograd(conv: nn.Conv2d) -> Winograd | None:
    """Winograd's form of a convolution. None if there is none, if the trunk changed its type after folding,
    or if the user lets fp32 matrix products round their inputs: the transforms would multiply the error."""
    transformed: Tensor | None = getattr(conv, "winograd", None)
    dtype, form = conv.weight.dtype, WINOGRAD.get(conv.weight.dtype)
    if transformed is None or form is None or len(transformed) != form.PRODUCTS:
        return None
    exact = dtype == torch.bfloat16 or fp32_products_are_exact(transformed.device)
    return form(transformed) if exact else None


def convolution_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype that `precision` means on `device`. `auto` depends on the hardware's capability only,
    not on timings, so the same machine always gives the same numbers."""
    if precision == "auto":
        return torch.bfloat16 if supports_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _folded_weights(trunk: VGG16) -> list[tuple[Tensor, Tensor]]:
    pairs: list[tuple[Tensor, Tensor]] = []
    for module in trunk.features:
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            pairs.append((module.weight.double(), module.bias.double()))
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            # The norm of a convolution is a convolution with weight * gain and bias `shift`.
            weight, bias = pairs[-1]
            gain = module.weight.double() / (module.running_var.double() + module.eps).sqrt()
            shift = (bias - module.running_mean.double()) * gain + module.bias.double()
            pairs[-1] = (weight * gain[:, None, None, None], shift)
    return pairs
