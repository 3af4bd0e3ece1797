"""The discriminator on frozen features of decoded pixels, with the heads of StyleGAN-T (section 3.2 and
figure 3c) or of GigaGAN's vision-aided loss (section 3.3).

Written from the papers. Layout, and choices that the papers do not specify: method.md "Discriminator on
frozen features" and "Discriminators of GigaGAN".
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2g.core.errors import SettingError
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from distill.config.discriminator import DiscriminatorConfig
from distill.models.condition_vector import ConditionShape, condition_shape, condition_vector
from distill.models.discriminator_kind import DiscriminatorKind
from distill.models.feature_networks import check_weights_file, open_feature_network
from distill.models.modulated_readout import ModulatedReadout
from distill.models.pixel_features import DRAWS, PixelFeatures
from distill.models.style_layers import ACTIVATION_GAIN, EqualizedConv, group_norm, initialize

PROJECTION = 64
"""Width of the projection of text or class in a head (StyleGAN-T, table 4)."""
KERNEL = 9
"""Kernel size, in tokens, of the residual convolution of a head."""
SLOPE = 0.2
"""Negative slope of the leaky ReLUs."""
HIDDEN = 256
"""Largest width of a `ModulatedHead` (ours)."""


class VirtualBatchNorm(nn.Module):
    """Batch normalization over `rows` consecutive rows and their tokens, without running statistics.

    The last group of a batch may be smaller. Each process normalizes its own rows.
    """

    def __init__(self, channels: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, L] -> [B, C, L], normalized in fp32 or float64."""
        groups = []
        for rows in x.to(torch.promote_types(x.dtype, torch.float32)).split(self.rows):
            variance, mean = torch.var_mean(rows, dim=(0, 2), keepdim=True, correction=0)
            groups.append((rows - mean) * (variance + 1e-5).rsqrt())
        return torch.cat(groups).to(x.dtype) * self.weight[:, None] + self.bias[:, None]


class ConvolutionBlock(nn.Module):
    """A 1-D convolution over tokens, virtual batch normalization, leaky ReLU: [B, C, L] -> [B, C, L]."""

    def __init__(self, channels: int, kernel: int, rows: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2)
        self.norm = VirtualBatchNorm(channels, rows)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, L] -> [B, C, L]."""
        return F.leaky_relu(self.norm(self.conv(x)), SLOPE)


class TokenHead(nn.Module):
    """StyleGAN-T's head: a 1x1 block, a residual block, and a projection discriminator on the condition.

    Without a condition the projection is a linear layer to one logit. width: channels of the features. rows:
    rows of a virtual batch. kernel: size of the residual convolution, in tokens.
    """

    def __init__(self, width: int, rows: int, shape: ConditionShape, kernel: int = KERNEL) -> None:
        super().__init__()
        condition: nn.Module | None = None
        if shape.classes:
            condition = nn.Embedding(shape.classes, PROJECTION)
        elif shape.text_width:
            condition = nn.Linear(shape.text_width, PROJECTION)
        self.mix, self.residual = ConvolutionBlock(width, 1, rows), ConvolutionBlock(width, kernel, rows)
        self.readout = nn.Conv1d(width, PROJECTION if condition is not None else 1, 1)
        self.condition = condition

    def forward(self, features: Tensor, cond: Tensor | None) -> Tensor:
        """features [B, C, h, w]; cond: class numbers [B] or text [B, D] -> logits [B, 1, h, w]."""
        hidden: Tensor = self.mix(features.flatten(2))
        logits: Tensor = self.readout((hidden + self.residual(hidden)) * 0.5**0.5)
        if self.condition is not None:
            projected: Tensor = self.condition(cond)
            logits = (projected[:, :, None] * logits).sum(1, keepdim=True) / math.sqrt(PROJECTION)
        maps: Tensor = logits.unflatten(2, features.shape[2:])
        return maps


class ModulatedHead(nn.Module):
    """Head of GigaGAN's vision-aided loss: a fixed random projection of the channels, two 3x3 convolutions,
    and a readout that is modulated by the condition. width: channels of the features."""

    projection: Tensor

    def __init__(self, width: int, shape: ConditionShape) -> None:
        super().__init__()
        hidden = min(width, HIDDEN)
        self.register_buffer("projection", torch.zeros(hidden, width))
        self.norms = nn.ModuleList(group_norm(hidden) for _ in range(2))
        self.convs = nn.ModuleList(EqualizedConv(hidden, hidden, 3) for _ in range(2))
        self.readout = ModulatedReadout(hidden, shape)

    @torch.no_grad()
    def initialize(self, rng: torch.Generator) -> None:
        """Sample the random projection, which is not trained."""
        self.projection.normal_(std=self.projection.shape[1] ** -0.5, generator=rng)

    def forward(self, features: Tensor, cond: Tensor | None) -> Tensor:
        """features [B, C, h, w]; cond: class numbers [B] or text [B, D] -> logits [B, 1, h, w]."""
        x = torch.einsum("oc,bchw->bohw", self.projection.to(features.dtype), features)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = F.leaky_relu(conv(norm(x)), SLOPE) * ACTIVATION_GAIN
        logits: Tensor = self.readout(x, cond)
        return logits


class ProjectedDiscriminator(nn.Module):
    """D(x, c): logits of every head on frozen features of the decoded x. D does not use the noise.

    Only the heads are trained, saved and sharded. Every process loads the frozen networks, `pixel_features`,
    by itself: they are not a submodule.
    """

    def __init__(
        self, pixel_features: PixelFeatures, config: DiscriminatorConfig, shape: ConditionShape
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {
                name: ModulatedHead(width, shape)
                if config.feature_heads == "modulated"
                else TokenHead(width, config.virtual_batch, shape)
                for name, width in zip(pixel_features.names, pixel_features.widths, strict=True)
            }
        )
        self._pixel_features = [pixel_features]  # in a list, so that it is no submodule

    @property
    def pixel_features(self) -> PixelFeatures:
        """The frozen networks: autoencoder and feature networks."""
        return self._pixel_features[0]

    def attach(self, pixel_features: nn.Module) -> None:
        """Replace the networks without weights, with which D was built, by loaded ones."""
        assert isinstance(pixel_features, PixelFeatures)
        self._pixel_features = [pixel_features]

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        cond: Conditioning,
        t: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """x [B, C, h, w] and the conditioning of B rows -> logits [B, 1, h_s, w_s] per head.

        draws [B, DRAWS]: random integers of the crop and the augmentation. noise and t are not used.
        """
        assert draws is not None, "projected needs the random numbers of its rows"
        condition, logits = condition_vector(cond), {}
        for name, features in self.pixel_features(x, draws).items():
            head = self.heads[name]
            dtype = next(head.parameters()).dtype
            # A copy, because FSDP2 warns of outputs that are views.
            logits[name] = head(features.to(dtype), condition).clone()
        return logits


def open_pixel_features(teacher: str, config: DiscriminatorConfig, on_meta: bool = False) -> PixelFeatures:
    """Load the teacher's autoencoder and the networks of `gan.feature_networks`, frozen.

    on_meta: build them without weights. Raises SettingError for an image size that they do not support, and
    UserError for missing weight files, also with `on_meta`, so that a dry run reports what the run would.
    """
    for name in config.feature_networks:
        check_weights_file(name)
    networks = [open_feature_network(name, config.token_heads, on_meta) for name in config.feature_networks]
    for name, network in zip(config.feature_networks, networks, strict=True):
        if config.feature_size % network.size_unit:
            raise SettingError(
                f"gan.feature_size is {config.feature_size}, but {name} has patches of {network.size_unit} "
                "px; expected a multiple of that"
            )
    downscale = pretrained.latent_downscale(teacher)
    if config.feature_size % downscale:
        raise SettingError(
            f"gan.feature_size is {config.feature_size}, but a latent is {downscale} px wide; expected a "
            "multiple of that"
        )
    vae = pretrained.autoencoder_on_meta(teacher) if on_meta else pretrained.load_vae(teacher)
    return PixelFeatures(vae.requires_grad_(False), networks, config.feature_size, config.feature_augment)


def _on_meta(teacher: str, config: DiscriminatorConfig) -> ProjectedDiscriminator:
    """Build the discriminator without weights."""
    with torch.device("meta"):
        pixel_features = open_pixel_features(teacher, config, on_meta=True)
        return ProjectedDiscriminator(pixel_features, config, condition_shape(teacher))


def _build(teacher: str, config: DiscriminatorConfig, rng: torch.Generator) -> ProjectedDiscriminator:
    """Build the heads with random weights. The frozen networks are loaded later, on every process."""
    pixel_features = open_pixel_features(teacher, config, on_meta=True)
    discriminator = ProjectedDiscriminator(pixel_features, config, condition_shape(teacher))
    if config.feature_heads == "modulated":
        initialize(discriminator, rng)
        return discriminator

    # torch's initial distributions, from our generator: U(-1, 1) / sqrt(fan-in), and N(0, 1) of embeddings.
    for module in discriminator.modules():
        if isinstance(module, nn.Conv1d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=rng)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, generator=rng)
    return discriminator


PROJECTED = DiscriminatorKind(
    name="projected",
    build=_build,
    build_on_meta=_on_meta,
    shard_units=lambda teacher, network: [],
    networks=("unet", "transformer"),  # a cascade's first stage has no decoder to pixels
    settings=(
        *("token_heads", "feature_networks", "feature_size", "feature_augment", "feature_heads"),
        "virtual_batch",
    ),
    draws=DRAWS,
    open_pixel_features=open_pixel_features,
)
