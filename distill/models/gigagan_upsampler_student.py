"""GigaGAN's upsampler (arXiv 2303.05511, section 3.4) as a student: a U-Net from small latents to large ones.

Written from the paper: "an asymmetric U-Net architecture, where the 64 px input goes through 3 downsampling
residual blocks and then 6 upsampling residual blocks with attention layers to produce the 512 px image".
What it leaves open: method.md "GANs with styles as students".
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

DOWNS = 3
"""Blocks that halve the input (GigaGAN, section 3.4); fewer for small inputs."""
BOTTOM = 2
"""Smallest height and width inside the network (ours)."""


class GigaGANUpsampler(AdaptiveGenerator):
    """Small latents -> large ones: down to a bottleneck, then up with styles, adaptive kernels and attention.

    The image is the bilinear enlargement of the small one plus the contributions of the blocks.
    """

    def __init__(
        self, config: GeneratorConfig, image_shape: tuple[int, int, int], shape: ConditionShape
    ) -> None:
        super().__init__(config, shape)
        image_channels, *size = image_shape
        factor = config.factor
        if (
            factor < 2
            or factor & (factor - 1)
            or any(side % factor or side // factor < BOTTOM for side in size)
        ):
            raise SettingError(
                f"student.generator.factor is {factor}; expected a power of two, 2 or more, that divides the "
                f"latents' {size[0]}x{size[1]} and leaves {BOTTOM} or more"
            )
        self.low_size = (size[0] // factor, size[1] // factor)
        # Halve the small latents DOWNS times, or as often as they allow.
        sizes = [self.low_size]
        while len(sizes) <= DOWNS and all(s % 2 == 0 and s // 2 >= BOTTOM for s in sizes[-1]):
            sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
        widths = [channels_at(size, config.channel_base, config.channel_max) for size in sizes]
        self.first_size = sizes[-1]
        self.enter = EqualizedConv(image_channels, widths[0], 3)
        self.downs = nn.ModuleList(DownBlock(a, b) for a, b in pairwise(widths))
        # As many blocks up, with the features of the same size, and log2(factor) more.
        halvings, inputs, blocks = len(self.downs), widths[-1], list[nn.Module]()
        for number in range(halvings + int(log2(factor))):
            at = (self.first_size[0] * 2 ** (number + 1), self.first_size[1] * 2 ** (number + 1))
            outputs = channels_at(at, config.channel_base, config.channel_max)
            blocks.append(self.block(config, inputs, outputs, image_channels, at, True))
            inputs = outputs
        self.blocks = nn.ModuleList(blocks)

    def shard_units(self) -> list[nn.Module]:
        """The blocks of both directions."""
        return [*self.downs, *self.blocks]

    def draw(self, styles: Sequence[BlockStyle], prior: Tensor | None = None) -> Tensor:
        """Styles of the blocks and small latents `prior` [B, c, h, w] -> large latents."""
        assert prior is not None, "the upsampler reads small latents"
        # Downsample, and keep the features of each size for the skip connections.
        features = [self.enter(prior)]
        for down in self.downs:
            features.append(down(features[-1]))
        x, image = features.pop(), None if features else prior
        for block, style in zip(self.blocks, styles, strict=True):
            skip = features.pop() if features else None
            x, image = block(x, image, style.w, style.noise, style.tokens, style.mask, skip)
            # At the size of the small latents, they join the image.
            if skip is not None and not features:
                image = image + prior
        assert image is not None
        return image


GIGAGAN_UPSAMPLER = generator_kind(
    "gigagan-upsampler", GigaGANUpsampler, settings=(*GIGAGAN_SETTINGS, "factor"), upsamples=True
)
