"""The generator of StyleGAN-T (arXiv 2301.09515, section 3.1, figure 3, table 4) as a student.

Written from the paper. Unspecified choices and parameter counts: method.md "GANs with styles as students".
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.config.student import GeneratorConfig
from distill.models.condition_vector import ConditionShape
from distill.models.generator_student import generator_kind
from distill.models.style_generator import (
    BlockStyle,
    StyleGenerator,
    block_sizes,
    channels_at,
    synthesize,
)
from distill.models.style_layers import FourierInput, MappingNetwork, SynthesisBlock


class StyleGANT(StyleGenerator):
    """Fourier features, then blocks with second-order styles of w = [f(z), c]: the text bypasses f.

    With the settings `residual`, `second_order` and `text_bypass` off, it is the generator before the changes
    of section 3.1, with plain convolutions and first-order styles of w = f([z, c]), but without the layers of
    StyleGAN3.
    """

    def __init__(
        self, config: GeneratorConfig, image_shape: tuple[int, int, int], shape: ConditionShape
    ) -> None:
        super().__init__(config.z_dim, shape)
        image_channels, *size = image_shape
        sizes = block_sizes((size[0], size[1]))
        widths = [channels_at(size, config.channel_base, config.channel_max) for size in sizes]
        self.first_size = sizes[0]

        # The condition is an input either of the mapping network or of each style.
        self.text_bypass = config.text_bypass
        inputs = config.z_dim + (0 if config.text_bypass else self.condition_width)
        style_inputs = config.w_dim + (self.condition_width if config.text_bypass else 0)
        self.mapping = MappingNetwork(inputs, config.w_dim, config.mapping_layers)
        self.input = FourierInput(widths[0], sizes[0])
        self.blocks = nn.ModuleList(
            SynthesisBlock(
                widths[max(0, number - 1)],
                channels,
                style_inputs,
                image_channels,
                up=number > 0,
                residual_blocks=config.residual_blocks,
                residual=config.residual,
                second_order=config.second_order,
            )
            for number, channels in enumerate(widths)
        )

    def styles(
        self,
        noise: Tensor,
        condition: Tensor | None,
        tokens: Tensor | None,
        mask: Tensor | None,
        psi: float,
    ) -> list[BlockStyle]:
        """Compute the style of each block: the same w = [f(z), c], and its own part of noise [B, N].

        condition: a vector [B, D], class labels [B], or None. tokens and mask are not used.
        """
        z, spatial = self.split(noise)
        c = self.embed(condition, z)
        if self.text_bypass:
            w = torch.cat([self.map_truncated(z, psi), c], dim=1)
        else:
            w = self.map_truncated(torch.cat([z, c], dim=1), psi)
        return [BlockStyle(w, part) for part in spatial]

    def draw(self, styles: Sequence[BlockStyle], prior: Tensor | None = None) -> Tensor:
        """Generate an image [B, c, h, w] from the style of each block. `prior` is not used."""
        return synthesize(self.blocks, self.input(len(styles[0].w)), styles)


STYLEGAN_T = generator_kind(
    "stylegan-t",
    StyleGANT,
    settings=(
        *("channel_base", "channel_max", "residual_blocks", "z_dim", "w_dim", "mapping_layers"),
        *("residual", "second_order", "text_bypass"),
    ),
    grows=True,
)
