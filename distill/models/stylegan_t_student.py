"""The generator of StyleGAN-T (arXiv 2301.09515, section 3.1, figure 3, table 4) as a student.

Written from the paper. What it leaves open, and the counts of parameters: method.md "GANs with styles as
students".
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

    Without `residual`, `second_order` and `text_bypass` it is the generator before the changes of section
    3.1, but for the layers of StyleGAN3: first-order styles of w = f([z, c]), plain convolutions.
    """

    def __init__(
        self, config: GeneratorConfig, image_shape: tuple[int, int, int], shape: ConditionShape
    ) -> None:
        super().__init__(config.z_dim, shape)
        image_channels, *size = image_shape
        sizes = block_sizes((size[0], size[1]))
        widths = [channels_at(size, config.channel_base, config.channel_max) for size in sizes]
        self.first_size = sizes[0]
        self.text_bypass, text = config.text_bypass, self.condition_width
        inputs = config.z_dim + (0 if config.text_bypass else text)
        self.mapping = MappingNetwork(inputs, config.w_dim, config.mapping_layers)
        self.input = FourierInput(widths[0], sizes[0])
        self.blocks = nn.ModuleList(
            SynthesisBlock(
                widths[max(0, number - 1)],
                channels,
                config.w_dim + (text if config.text_bypass else 0),
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
        """w = [f(z), c] for every block, from noise [B, N] and the condition's vector [B, D] (or classes [B],
        or None). Tokens and mask are not read."""
        z, spatial = self.split(noise)
        c = self.embed(condition, z)
        if self.text_bypass:
            w = torch.cat([self.mapped(z, psi), c], dim=1)
        else:
            w = self.mapped(torch.cat([z, c], dim=1), psi)
        return [BlockStyle(w, part) for part in spatial]

    def draw(self, styles: Sequence[BlockStyle], prior: Tensor | None = None) -> Tensor:
        """Styles of the blocks -> image [B, c, h, w]. The prior is not read."""
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
