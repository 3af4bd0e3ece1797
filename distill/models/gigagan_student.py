"""The generator of GigaGAN (arXiv 2303.05511, section 3 and figure 4) as a student.

Its blocks are those of StyleGAN-T, with kernels that w selects and attention between the convolutions.
Written from memory of the paper. Differences and unspecified choices: method.md "GANs with styles as
students".
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.config.student import GeneratorConfig
from distill.models.attention_layers import AttentionBlock, TextLayers
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

GIGAGAN_SETTINGS = (
    *("channel_base", "channel_max", "residual_blocks", "z_dim", "w_dim", "mapping_layers"),
    *("kernels", "attention_sizes", "text_layers"),
)
"""Fields of GeneratorConfig that GigaGAN's generators read."""


class AdaptiveGenerator(StyleGenerator):
    """Base of GigaGAN's generators: learned layers on text tokens, styles w = M(z, t_global), attention."""

    def __init__(self, config: GeneratorConfig, shape: ConditionShape) -> None:
        super().__init__(config.z_dim, shape)
        self.token_width = shape.token_width
        self.text = TextLayers(shape.token_width, config.text_layers) if shape.token_width else None
        if shape.token_width:
            self.condition_width = shape.token_width
        inputs = config.z_dim + self.condition_width
        self.mapping = MappingNetwork(inputs, config.w_dim, config.mapping_layers)

    def build_block(
        self,
        config: GeneratorConfig,
        inputs: int,
        outputs: int,
        image_channels: int,
        size: tuple[int, int],
        up: bool,
    ) -> SynthesisBlock:
        """Build the block whose output has this size (h, w); it has attention at `attention_sizes`."""
        attention = max(size) in config.attention_sizes
        return SynthesisBlock(
            inputs,
            outputs,
            config.w_dim,
            image_channels,
            up=up,
            residual_blocks=config.residual_blocks,
            kernels=config.kernels,
            second_order=False,
            attention=AttentionBlock(outputs, self.token_width) if attention else None,
        )

    def map_text(
        self, z: Tensor, condition: Tensor | None, tokens: Tensor | None, mask: Tensor | None, psi: float
    ) -> tuple[Tensor, Tensor | None]:
        """Compute w [B, D] = M(z, t_global) and the local text tokens [B, L, D'] (GigaGAN, eqs. 3 and 4).

        t_global is the mean of the tokens after the text layers T. With classes it is the class embedding,
        and there are no local tokens.
        """
        if self.text is None:
            return self.map_truncated(torch.cat([z, self.embed(condition, z)], dim=1), psi), None
        assert tokens is not None
        local: Tensor = self.text(tokens, mask)
        weights = torch.ones_like(local[:, :, :1]) if mask is None else mask.to(local.dtype)[:, :, None]
        pooled = (local * weights).sum(1) / weights.sum(1).clamp(min=1)
        return self.map_truncated(torch.cat([z, self.embed(pooled, z)], dim=1), psi), local

    def styles(
        self,
        noise: Tensor,
        condition: Tensor | None,
        tokens: Tensor | None,
        mask: Tensor | None,
        psi: float,
    ) -> list[BlockStyle]:
        """Compute the style of each block: the same w and text tokens, and its own part of noise [B, N].

        condition: class labels [B] or None. tokens: [B, L, D'] with their mask [B, L], or None.
        """
        z, spatial = self.split(noise)
        w, local = self.map_text(z, condition, tokens, mask, psi)
        return [BlockStyle(w, part, local, mask) for part in spatial]


class GigaGAN(AdaptiveGenerator):
    """Fourier features, then blocks whose kernels and styles w selects, with attention to the text."""

    def __init__(
        self, config: GeneratorConfig, image_shape: tuple[int, int, int], shape: ConditionShape
    ) -> None:
        super().__init__(config, shape)
        image_channels, *size = image_shape
        sizes = block_sizes((size[0], size[1]))
        widths = [channels_at(size, config.channel_base, config.channel_max) for size in sizes]
        self.first_size = sizes[0]
        self.input = FourierInput(widths[0], sizes[0])
        self.blocks = nn.ModuleList(
            self.build_block(config, widths[max(0, n - 1)], widths[n], image_channels, sizes[n], n > 0)
            for n in range(len(sizes))
        )

    def draw(self, styles: Sequence[BlockStyle], prior: Tensor | None = None) -> Tensor:
        """Generate an image [B, c, h, w] from the style of each block. `prior` is not used."""
        return synthesize(self.blocks, self.input(len(styles[0].w)), styles)


GIGAGAN = generator_kind("gigagan", GigaGAN, settings=GIGAGAN_SETTINGS, grows=True)
