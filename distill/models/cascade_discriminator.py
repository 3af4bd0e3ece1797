"""The discriminator of a cascade's stage: the teacher's network with a noise input and a head per level.

The forward pass is the family's `features`, written out over the blocks (pytorch.md "Features without
hooks"). Time, text and the latents of the stage before enter as in the teacher. Layout: method.md "Cascades".
No public reference implementation exists.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.cascade import CascadeFamily
from d2g.diffusion.pipelines import family_of
from distill.config.discriminator import DiscriminatorConfig
from distill.models.discriminator_kind import TIME_SETTINGS, DiscriminatorKind

TINY = 1e-24
"""Added under the square root in `ResponseNorm`. It changes no fp32 value unless the sum is below 1e-16."""


class ResponseNorm(nn.Module):
    """diffusers' GlobalResponseNorm, with a second derivative also for channels that are zero everywhere.

    GELU produces such channels. The second derivative of sqrt(sum x^2) is NaN there, also after a
    multiplication by zero, and would make exact R1 NaN.
    """

    def __init__(self, gamma: nn.Parameter, beta: nn.Parameter) -> None:
        super().__init__()
        self.gamma, self.beta = gamma, beta

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, D] -> [B, h, w, D]: each channel scaled by its norm over positions (ConvNeXt V2)."""
        norm = (x.float().square().sum(dim=(1, 2), keepdim=True) + TINY).sqrt()
        response = (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)
        return self.gamma * (x * response) + self.beta + x


def replace_response_norms(network: nn.Module) -> None:
    """Replace every GlobalResponseNorm of a network by a `ResponseNorm` with its parameters, in place."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "GlobalResponseNorm":
                setattr(parent, name, ResponseNorm(child.gamma, child.beta))  # type: ignore[arg-type]


class CascadeDiscriminator(nn.Module):
    """D(x, z, c): patch logits of every head, from a stage's network that is modified in place and trained.

    The noise enters as the latents do, through patches and a 1x1 convolution. This convolution starts at
    zero, so the trunk starts as the teacher. Each map of the family's `features` has a 1x1 head. Heads do not
    start at zero, or no gradient would reach the trunk.
    """

    def __init__(self, network: Any, family: CascadeFamily, config: DiscriminatorConfig) -> None:
        super().__init__()
        replace_response_norms(network)
        self.unet: Any = network
        self.family, self.timestep = family, config.timestep
        settings = network.config

        # The noise input, and a head at each depth.
        widths, patch = family.feature_widths(settings), family.patch(settings)
        self.conv_z = None
        if config.z_conditioning:
            channels = family.latent_shape(settings)[0] * patch**2
            projection = nn.Conv2d(channels, next(iter(widths.values())), 1, bias=False)
            nn.init.zeros_(projection.weight)
            self.conv_z = nn.Sequential(nn.PixelUnshuffle(patch), projection)
        self.heads = nn.ModuleDict({name: nn.Conv2d(width, 1, 1) for name, width in widths.items()})

        # Layers after the last block get no gradient.
        self._frozen = ("",) if config.freeze_backbone else tuple(f"{n}." for n in family.output_layers)
        self.requires_grad_(True)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Switch gradients of the trained parameters on or off; frozen parts stay frozen."""
        super().requires_grad_(requires_grad)
        for name, parameter in self.unet.named_parameters():
            if name.startswith(self._frozen):
                parameter.requires_grad_(False)
        return self

    def forward(
        self, x: Tensor, noise: Tensor, cond: Conditioning, t: Tensor | None = None
    ) -> dict[str, Tensor]:
        """x and noise [B, C, h, w] and the conditioning of B rows -> logits [B, 1, h_s, w_s] per head.

        t [B]: the time input, such as the noise level of x; None is the constant `gan.timestep`.
        """
        extra = None if self.conv_z is None else self.conv_z(noise)
        features = self.family.features(self.unet, x, self.timestep if t is None else t, cond, extra)
        return {name: head(features[name]) for name, head in self.heads.items()}


def _family(teacher: str) -> CascadeFamily:
    family = family_of(teacher)
    assert isinstance(family, CascadeFamily), "check_discriminator must run first"
    return family


def discriminator_from_stage(
    teacher: str, config: DiscriminatorConfig, generator: torch.Generator
) -> CascadeDiscriminator:
    """Build the discriminator with the teacher's weights. `generator` initializes the heads."""
    family = _family(teacher)
    discriminator = CascadeDiscriminator(pretrained.load_model(teacher, family.network), family, config)
    for head in discriminator.heads.values():
        assert isinstance(head, nn.Conv2d) and head.bias is not None
        bound = head.weight[0].numel() ** -0.5
        nn.init.uniform_(head.weight, -bound, bound, generator=generator)
        nn.init.zeros_(head.bias)
    return discriminator


def _on_meta(teacher: str, config: DiscriminatorConfig) -> CascadeDiscriminator:
    """Build the same network on torch's meta device, without weights."""
    family = _family(teacher)
    with torch.device("meta"):
        return CascadeDiscriminator(pretrained.load_on_meta(teacher, family.network), family, config)


CASCADE = DiscriminatorKind(
    name="cascade",
    build=discriminator_from_stage,
    build_on_meta=_on_meta,
    shard_units=lambda teacher, network: family_of(teacher).shard_units(network),
    networks=("prior", "decoder"),
    settings=("z_conditioning", "freeze_backbone", *TIME_SETTINGS),
)
