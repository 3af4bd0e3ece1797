"""The semantic compressor: a small convolutional network in the way of EfficientNet (Tan & Le 2019)."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from teacher_training.cascade.config import CompressorConfig

_EXPANSION = 4
_GROUPS = 8


class _Block(nn.Module):
    """Inverted bottleneck: 1x1 convolution, depthwise 3x3, squeeze and excitation, 1x1 back."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width, squeezed = _EXPANSION * inputs, max(inputs // 4, 4)
        self.expand = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.GroupNorm(_GROUPS, width), nn.SiLU()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
            nn.GroupNorm(_GROUPS, width),
            nn.SiLU(),
        )
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, squeezed, 1),
            nn.SiLU(),
            nn.Conv2d(squeezed, width, 1),
            nn.Sigmoid(),
        )
        self.project = nn.Sequential(nn.Conv2d(width, outputs, 1, bias=False), nn.GroupNorm(_GROUPS, outputs))
        self.has_skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = self.depthwise(self.expand(x))
        output: Tensor = self.project(inner * self.excite(inner))
        return x + output if self.has_skip else output


class SemanticCompressor(nn.Module):
    """Pixels [B, 3, S, S] in [-1, 1] -> latents [B, C, S/f, S/f] of zero mean and unit variance per channel.

    f is 2 to the number of levels. The latents are those that stage C makes; stage B reads 42 times them
    minus 1 (`d2g.diffusion.families.wuerstchen`).
    """

    def __init__(self, config: CompressorConfig) -> None:
        super().__init__()
        widths = config.channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.GroupNorm(_GROUPS, widths[0]), nn.SiLU()
        )
        blocks: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            blocks += [_Block(inputs, outputs, 2)]
            blocks += [_Block(outputs, outputs, 1) for _ in range(config.layers_per_block - 1)]
        self.blocks = nn.Sequential(*blocks)
        # A 1x1 convolution and a normalization, in place of the classifier (Wuerstchen, E.2).
        self.head = nn.Conv2d(widths[-1], config.latent_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(config.latent_channels, affine=False)

    def forward(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self.norm(self.head(self.blocks(self.stem(pixels))))
        return latents

    @torch.no_grad()
    def set_statistics(self, pixels: Tensor) -> None:
        """Set mean and variance of the normalization to those of pixels [N, 3, S, S]."""
        features = torch.cat([self.head(self.blocks(self.stem(part))) for part in pixels.split(256)])
        variance, mean = torch.var_mean(features, dim=(0, 2, 3))
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(variance)
