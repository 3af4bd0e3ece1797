"""The discriminator of a transformer teacher: its blocks with a noise input, and heads on the image tokens.

The forward pass is the family's `features`, written out over the blocks: hooks fire twice under activation
checkpointing and break under sharding (pytorch.md "Features without hooks"). Time, text and classes enter as
in the teacher. Layout: method.md "Discriminators of transformers". No public reference implementation exists.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2g.core.errors import SettingError
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.transformer import TransformerFamily
from d2g.diffusion.pipelines import family_of
from distill.config.discriminator import DiscriminatorConfig
from distill.models.discriminator_kind import TIME_SETTINGS, DiscriminatorKind
from distill.models.feature_networks import equally_spaced


class TransformerDiscriminator(nn.Module):
    """D(x, z, c): token logits of every head, from a transformer that is modified in place and trained.

    - Noise: a patch embedding of z, which starts at zero, is added to the teacher's embedding of x. The trunk
      therefore starts as the teacher.
    - Heads: 1x1 convolutions on the image tokens after equally spaced blocks, up to the last, at every scale
      in `token_scales`. A scale s averages the tokens over s x s squares. Heads do not start at zero, or no
      gradient would reach the trunk.

    downscale: pixels per latent position. Raises SettingError for more heads than blocks, and for scales
    larger than the grid of tokens.
    """

    def __init__(
        self, network: Any, family: TransformerFamily, config: DiscriminatorConfig, downscale: int = 8
    ) -> None:
        super().__init__()
        self.transformer: Any = network
        self.family, self.timestep, self.downscale = family, config.timestep, downscale
        self.patch = family.size_unit(network.config)
        self.depths = equally_spaced(family.depth(network.config), config.token_heads, "the network")
        self.scales = config.token_scales
        channels, *size = family.latent_shape(network.config)
        _check_scales(self.scales, [side // self.patch for side in size])

        # The noise input, and a head at each depth and scale.
        width = family.width(network.config)
        self.patch_z = None
        if config.z_conditioning:
            self.patch_z = nn.Conv2d(channels, width, self.patch, stride=self.patch, bias=False)
            nn.init.zeros_(self.patch_z.weight)
        self.heads = nn.ModuleDict(
            {
                _head_name(depth, scale): nn.Conv2d(width, 1, 1)
                for depth in self.depths
                for scale in self.scales
            }
        )

        # Layers after the last block get no gradient.
        self._frozen = ("",) if config.freeze_backbone else family.output_layers
        self.requires_grad_(True)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Switch gradients of the trained parameters on or off; frozen parts stay frozen."""
        super().requires_grad_(requires_grad)
        for name, parameter in self.transformer.named_parameters():
            if name.startswith(self._frozen):
                parameter.requires_grad_(False)
        return self

    def forward(
        self, x: Tensor, noise: Tensor, cond: Conditioning, t: Tensor | None = None
    ) -> dict[str, Tensor]:
        """x and noise [B, C, h, w] and the conditioning of B rows -> logits [B, 1, h_s, w_s] per head.

        t [B]: the time input, such as the noise level of x; None is the constant `gan.timestep`.
        """
        # Image tokens [B, L, D] after each block.
        network = self.transformer
        extra = None if self.patch_z is None else self.patch_z(noise).flatten(2).transpose(1, 2)
        time = self.timestep if t is None else t
        features = self.family.features(network, network.config, x, time, cond, self.downscale, extra)

        # Arrange the tokens as maps [B, D, h, w], and apply the heads of each scale.
        height, width = (side // self.patch for side in x.shape[-2:])
        logits = {}
        for depth in self.depths:
            tokens = features[depth - 1].transpose(1, 2).unflatten(2, (height, width))
            for scale in self.scales:
                name = _head_name(depth, scale)
                logits[name] = self.heads[name](tokens if scale == 1 else F.avg_pool2d(tokens, scale))
        return logits


def _check_scales(scales: tuple[int, ...], grid: list[int]) -> None:
    for scale in scales:
        if scale > min(grid):
            raise SettingError(
                f"gan.token_scales has {scale}, but the network sees {grid[0]}x{grid[1]} tokens; expected "
                f"at most {min(grid)}"
            )


def _head_name(depth: int, scale: int) -> str:
    return f"block{depth}" if scale == 1 else f"block{depth}_pool{scale}"


def _family(teacher: str) -> TransformerFamily:
    family = family_of(teacher)
    assert isinstance(family, TransformerFamily), "check_discriminator must run first"
    return family


def discriminator_from_transformer(
    teacher: str, config: DiscriminatorConfig, generator: torch.Generator
) -> TransformerDiscriminator:
    """Build the discriminator with the teacher's weights. `generator` initializes the heads."""
    family = _family(teacher)
    network = pretrained.load_model(teacher, family.network)
    discriminator = TransformerDiscriminator(network, family, config, pretrained.latent_downscale(teacher))
    for head in discriminator.heads.values():
        assert isinstance(head, nn.Conv2d) and head.bias is not None
        bound = head.weight[0].numel() ** -0.5
        nn.init.uniform_(head.weight, -bound, bound, generator=generator)
        nn.init.zeros_(head.bias)
    return discriminator


def _on_meta(teacher: str, config: DiscriminatorConfig) -> TransformerDiscriminator:
    """Build the same network on torch's meta device, without weights."""
    family, downscale = _family(teacher), pretrained.latent_downscale(teacher)
    with torch.device("meta"):
        network = pretrained.load_on_meta(teacher, family.network)
        return TransformerDiscriminator(network, family, config, downscale)


TRANSFORMER = DiscriminatorKind(
    name="transformer",
    build=discriminator_from_transformer,
    build_on_meta=_on_meta,
    shard_units=lambda teacher, network: family_of(teacher).shard_units(network),
    networks=("transformer",),
    settings=("z_conditioning", "token_heads", "token_scales", "freeze_backbone", *TIME_SETTINGS),
)
