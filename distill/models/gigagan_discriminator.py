"""The multi-scale discriminator of GigaGAN (arXiv 2303.05511, section 3.3 and figure 5) on latents.

Written from memory of the paper. Differences and unspecified choices: method.md "Discriminators of GigaGAN".
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2g.core.errors import SettingError
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from distill.config.discriminator import DiscriminatorConfig
from distill.models.attention_layers import AttentionBlock
from distill.models.condition_vector import ConditionShape, condition_shape, condition_vector
from distill.models.discriminator_kind import DiscriminatorKind
from distill.models.modulated_readout import ModulatedReadout
from distill.models.style_generator import SMALLEST_BLOCK, block_sizes, channels_at
from distill.models.style_layers import DownBlock, EqualizedConv, initialize

ATTENTION_SIZES = (8, 16, 32)
"""Sizes, as the larger side, of the levels with self-attention (ours)."""


class Level(nn.Module):
    """Self-attention at some sizes, then a residual block that halves height and width. A shard unit."""

    def __init__(self, inputs: int, outputs: int, attention: bool) -> None:
        super().__init__()
        self.attention = AttentionBlock(inputs, 0) if attention else None
        self.down = DownBlock(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, h, w] -> [B, C_out, h / 2, w / 2]."""
        y: Tensor = self.down(x if self.attention is None else self.attention(x, None, None))
        return y


class GigaGANDiscriminator(nn.Module):
    """D_ij(x, c): logits for every image i of a pyramid, at every smaller scale j. D does not use the noise.

    sizes: the sizes (h, w) of the pyramid, from the latents' own down; the last has logits only. Image i
    enters at level i through its own 1x1 convolution and then passes through the levels that larger images
    use too. All images share the readout of a scale.
    """

    def __init__(
        self,
        channels: int,
        sizes: list[tuple[int, int]],
        config: DiscriminatorConfig,
        shape: ConditionShape,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        widths = [channels_at(size, config.channel_base, config.channel_max) for size in sizes]
        self.enter = nn.ModuleList(EqualizedConv(channels, width, 1) for width in widths[:-1])
        self.levels = nn.ModuleList(
            Level(a, b, max(size) in ATTENTION_SIZES)
            for size, (a, b) in zip(sizes[:-1], pairwise(widths), strict=True)
        )
        self.readouts = nn.ModuleList(ModulatedReadout(width, shape) for width in widths[1:])

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        cond: Conditioning,
        t: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """x [B, C, h, w] and the conditioning of B rows -> logits [B, 1, h_j, w_j] per head.

        Head image{i}_scale{j} reads image i of the pyramid at scale j. noise, t and draws are not used.
        """
        condition, logits = condition_vector(cond), {}
        dtype = next(self.parameters()).dtype
        if condition is not None and condition.is_floating_point():
            condition = condition.to(dtype)
        for number, enter in enumerate(self.enter):
            # An image of the pyramid: the latents, averaged over squares of 2^number positions.
            image = x if number == 0 else F.avg_pool2d(x, 2**number)
            # Its features at every lower level, each with logits.
            features = enter(image.to(dtype))
            for scale in range(number, len(self.levels)):
                features = self.levels[scale](features)
                logits[f"image{number}_scale{scale + 1}"] = self.readouts[scale](features, condition)
        return logits


def _sizes(teacher: str) -> list[tuple[int, int]]:
    """Sizes (h, w) of the pyramid of a teacher's latents, largest first.

    Raises SettingError for latents that cannot be halved.
    """
    _, height, width = pretrained.latent_shape(teacher)
    sizes = block_sizes((height, width))[::-1]
    if len(sizes) < 2:
        raise SettingError(
            f"gan.discriminator has gigagan, but latents of {teacher} are {height}x{width}; expected even "
            f"sides of {2 * SMALLEST_BLOCK} or more"
        )
    return sizes


def _construct(teacher: str, config: DiscriminatorConfig) -> GigaGANDiscriminator:
    channels = pretrained.latent_shape(teacher)[0]
    return GigaGANDiscriminator(channels, _sizes(teacher), config, condition_shape(teacher))


def _build(teacher: str, config: DiscriminatorConfig, rng: torch.Generator) -> GigaGANDiscriminator:
    """Build the network with random weights."""
    discriminator = _construct(teacher, config)
    initialize(discriminator, rng)
    return discriminator


def _on_meta(teacher: str, config: DiscriminatorConfig) -> GigaGANDiscriminator:
    """Build the network on torch's meta device, without weights."""
    with torch.device("meta"):
        return _construct(teacher, config)


MULTI_SCALE = DiscriminatorKind(
    name="gigagan",
    build=_build,
    build_on_meta=_on_meta,
    shard_units=lambda teacher, network: list(network.levels),  # type: ignore[arg-type]
    networks=("unet", "transformer"),
    settings=("channel_base", "channel_max", "noise_augment", "noise_max_timestep"),
    check=_sizes,
)
