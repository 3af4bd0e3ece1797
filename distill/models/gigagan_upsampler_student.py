"""GigaGAN's upsampler (arXiv 2303.05511, section 3.4) as a student: a U-Net from small latents to large ones.

Written from the paper: "an asymmetric U-Net architecture, where the 64 px input goes through 3 downsampling
residual blocks and then 6 upsampling residual blocks with attention layers to produce the 512 px image".
Unspecified choices: method.md "GANs with styles as students".
"""

from collections.abc import Sequence
from itertools import pairwise
from math import log2

from torch import Tensor, nn

from d2g.core.errors import SettingError
from distill.config.student import GeneratorConfig
from distill.models.condition_vector import ConditionShape
from distill.models.generator_student import generator_kind
from distill.models.gigagan_student import GIGAGAN_SETTINGS, AdaptiveGenerator
from distill.models.style_generator import BlockStyle, channels_at
from distill.models.style_layers import DownBlock, EqualizedConv

MAX_DOWN_BLOCKS = 3
"""Number of blocks that halve the input (GigaGAN, section 3.4); fewer for small inputs."""
SMALLEST_SIZE = 2
"""Smallest height and width inside the network (ours)."""


class GigaGANUpsampler(AdaptiveGenerator):
    """A U-Net from small to large latents: down to a bottleneck, then up with styles and attention.

    The result is the bilinear enlargement of the small latents plus the contributions of the blocks.
    """

    def __init__(
        self, config: GeneratorConfig, image_shape: tuple[int, int, int], shape: ConditionShape
    ) -> None:
        super().__init__(config, shape)
        image_channels, *size = image_shape
        factor = config.factor
        too_small = any(side % factor or side // factor < SMALLEST_SIZE for side in size)
        if factor < 2 or factor & (factor - 1) or too_small:
            raise SettingError(
                f"student.generator.factor is {factor}; expected a power of two, 2 or more, that divides the "
                f"latents' {size[0]}x{size[1]} and leaves {SMALLEST_SIZE} or more"
            )
        self.low_size = (size[0] // factor, size[1] // factor)

        # The way down: halve the small latents MAX_DOWN_BLOCKS times, or as often as their size allows.
        sizes = [self.low_size]
        while len(sizes) <= MAX_DOWN_BLOCKS and all(
            s % 2 == 0 and s // 2 >= SMALLEST_SIZE for s in sizes[-1]
        ):
            sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
        widths = [channels_at(size, config.channel_base, config.channel_max) for size in sizes]
        self.first_size = sizes[-1]
        self.enter = EqualizedConv(image_channels, widths[0], 3)
        self.downs = nn.ModuleList(DownBlock(a, b) for a, b in pairwise(widths))

        # The way up: as many blocks, which add the features of the same size, and log2(factor) more.
        halvings, inputs, blocks = len(self.downs), widths[-1], list[nn.Module]()
        for number in range(halvings + int(log2(factor))):
            enlargement = 2 ** (number + 1)
            block_size = (self.first_size[0] * enlargement, self.first_size[1] * enlargement)
            outputs = channels_at(block_size, config.channel_base, config.channel_max)
            blocks.append(self.build_block(config, inputs, outputs, image_channels, block_size, True))
            inputs = outputs
        self.blocks = nn.ModuleList(blocks)

    def shard_units(self) -> list[nn.Module]:
        """The blocks of both directions."""
        return [*self.downs, *self.blocks]

    def draw(self, styles: Sequence[BlockStyle], prior: Tensor | None = None) -> Tensor:
        """Enlarge small latents `prior` [B, c, h', w'] with the style of each block: [B, c, h, w]."""
        assert prior is not None, "the upsampler reads small latents"
        # Downsample, and keep the features of each size for the skip connections.
        features = [self.enter(prior)]
        for down in self.downs:
            features.append(down(features[-1]))

        # Upsample. Where nothing was downsampled, the image starts as the small latents.
        x, image = features.pop(), None if features else prior
        for block, style in zip(self.blocks, styles, strict=True):
            skip = features.pop() if features else None
            x, image = block(x, image, style.w, style.noise, style.tokens, style.mask, skip)
            # Add the small latents to the image at their own size.
            if skip is not None and not features:
                image = image + prior
        assert image is not None
        return image


GIGAGAN_UPSAMPLER = generator_kind(
    "gigagan-upsampler", GigaGANUpsampler, settings=(*GIGAGAN_SETTINGS, "factor"), upsamples=True
)
