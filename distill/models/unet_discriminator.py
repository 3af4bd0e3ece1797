"""The discriminator: the teacher's U-Net with a noise input, resized inputs and 1x1 heads at every scale.

The forward pass is written out over the U-Net's blocks, because hooks fire twice under activation
checkpointing and break under sharding (pytorch.md "Features without hooks"). Layout: method.md "Discriminator
architecture" and "Discriminators of U-Nets without text". No public reference implementation exists.
"""

from collections.abc import Iterator
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.unet import UNetFamily
from d2g.diffusion.pipelines import family_of
from d2g.diffusion.scheduler_files import AnySchedule
from distill.config.discriminator import DiscriminatorConfig
from distill.models.discriminator_kind import TIME_SETTINGS, DiscriminatorKind

BLOCK_TYPES = tuple(
    f"{prefix}{direction}{suffix}"
    for prefix, suffix in (
        ("", "Block2D"),
        ("CrossAttn", "Block2D"),
        ("SimpleCrossAttn", "Block2D"),
        ("Attn", "Block2D"),
        ("Resnet", "sampleBlock2D"),
    )
    for direction in ("Down", "Up")
)
"""Types of U-Net blocks that are supported."""

TEXT_SETTINGS = (
    ("class_embed_type", (None,)),
    ("num_class_embeds", (None,)),
    ("addition_embed_type", (None, "text", "text_time")),
    ("encoder_hid_dim_type", (None, "text_proj")),
)
"""Settings of a UNet2DConditionModel and their values that are supported."""

CLASS_SETTINGS = (("class_embed_type", (None,)), ("time_embedding_type", ("positional", "learned")))
"""Settings of a UNet2DModel and their values that are supported. Fourier features are not: they take the
logarithm of the timestep, which may be 0 here."""


class Discriminator(nn.Module):
    """D(x, z, c): patch logits of every head, from a diffusers U-Net that is modified in place and trained.

    - Noise: h0 = conv_in(x) + conv_z(z). The weight of conv_z starts at zero.
    - Multi-scale input: x, resized, enters each lower encoder scale through a convolution that starts at
      zero. The trunk therefore starts as the teacher.
    - Heads: each decoder scale has three 1x1 convolutions, on its input from below, on the encoder's skip
      connection, and on its output. They do not start at zero, or no gradient would reach the trunk.
    - Text and classes enter as in the teacher. With classes, each head h also has a projection P_h, which
      starts at zero: <P_h e(c), features> is added to the logits, where e(c) is the teacher's class embedding
      (Miyato and Koyama 2018).

    downscale: pixels per latent position, for SDXL's time ids. schedule: the teacher's. With an EDM schedule,
    the time input is the index of a noise level, and the network receives c_in x and c_noise of that level;
    with None, x and the timestep enter unchanged.

    Raises UserError for a U-Net with unsupported blocks or conditions.
    """

    def __init__(
        self,
        unet: Any,
        family: UNetFamily,
        config: DiscriminatorConfig,
        downscale: int = 8,
        schedule: AnySchedule | None = None,
    ) -> None:
        super().__init__()
        _check_supported(unet, family)
        self.unet: Any = unet
        self.family, self.schedule = family, schedule
        self.timestep, self.downscale = config.timestep, downscale
        # Inputs: noise beside the latents, and resized latents at each lower scale.
        channels, top_width = unet.config.in_channels, unet.conv_in.out_channels
        lower_widths = [b.resnets[0].out_channels for b in unet.down_blocks if b.downsamplers is not None]
        self.conv_z = _zeroed(nn.Conv2d(channels, top_width, 3, padding=1)) if config.z_conditioning else None
        self.conv_scale = (
            nn.ModuleList(_zeroed(nn.Conv2d(channels, width, 3, padding=1)) for width in lower_widths)
            if config.multi_scale_input
            else None
        )

        # Heads: three at each scale of the decoder, or the last one alone.
        final_head = f"{len(unet.up_blocks) - 1}_after"
        self.heads = nn.ModuleDict(
            {
                name: nn.Conv2d(width, 1, 1)
                for name, width in _head_widths(unet)
                if config.multi_scale_output or name == final_head
            }
        )
        if config.output_head:
            self.heads["output"] = nn.Conv2d(unet.config.out_channels, 1, 1)

        # Class embeddings, projected to the features of each head.
        classes = None if family.reads_text else unet.class_embedding
        self.projections = nn.ModuleDict()
        if classes is not None:
            for name, head in self.heads.items():
                width = cast(nn.Conv2d, head).in_channels
                self.projections[name] = projection = nn.Linear(classes.embedding_dim, width, bias=False)
                nn.init.zeros_(projection.weight)

        # Heads read a block's output before upsampling, so the upsamplers move out of the blocks.
        self.upsamplers = nn.ModuleList(nn.ModuleList(block.upsamplers or ()) for block in unet.up_blocks)
        for block in unet.up_blocks:
            block.upsamplers = None

        # Without a head on it, the U-Net's output layers get no gradient.
        output_layers = [] if config.output_head else [unet.conv_norm_out, unet.conv_out]
        self._frozen: list[nn.Module | None] = (
            [unet, self.upsamplers] if config.freeze_backbone else output_layers
        )
        self.requires_grad_(True)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Switch gradients of the trained parameters on or off; frozen parts stay frozen."""
        super().requires_grad_(requires_grad)
        for part in self._frozen:
            if part is not None:
                part.requires_grad_(False)
        return self

    def forward(
        self, x: Tensor, noise: Tensor, cond: Conditioning, t: Tensor | None = None
    ) -> dict[str, Tensor]:
        """x and noise [B, C, h, w] and the conditioning of B rows -> logits [B, 1, h_s, w_s] per head.

        t [B]: the time input, such as the noise level of x; None is the constant `gan.timestep`.
        """
        unet, logits = self.unet, {}

        # The network's input and time at this point of the schedule.
        if t is None:
            t = torch.full((len(x),), self.timestep, device=x.device)
        t, latents = t.to(x.device), x
        if self.schedule is not None:
            x, t = self.schedule.network_at(latents, t)

        # Embeddings of time and conditioning, as in the teacher.
        temb, states = self.family.embeddings(unet, x, t, cond, self.downscale)
        classes = self.family.class_embedding(unet, cond)

        def apply_head(name: str, features: Tensor) -> None:
            if name not in self.heads:
                return
            logits[name] = self.heads[name](features)
            if classes is not None:
                weights = self.projections[name](classes)
                logits[name] = logits[name] + torch.einsum("bc,bchw->bhw", weights, features)[:, None]

        def run_block(block: Any, *features: Any) -> Any:
            has_text = getattr(block, "has_cross_attention", False)
            text_states = {"encoder_hidden_states": states} if has_text else {}
            return block(*features, temb=temb, **text_states)

        # Encoder: noise enters at the top, resized inputs at each lower scale.
        h = unet.conv_in(2 * x - 1 if unet.config.center_input_sample else x)
        if self.conv_z is not None:
            h = h + self.conv_z(noise)
        skips = [h]
        for scale, block in enumerate(unet.down_blocks):
            h, block_skips = run_block(block, h)
            skips += block_skips
            if self.conv_scale is not None and block.downsamplers is not None:
                h = h + self.conv_scale[scale](_resize(latents, h.shape[2:]))
        if unet.mid_block is not None:
            h = run_block(unet.mid_block, h)

        # Decoder: three heads at each scale, then upsampling.
        for scale, block in enumerate(unet.up_blocks):
            count = len(block.resnets)
            block_skips, skips = tuple(skips[-count:]), skips[:-count]
            apply_head(f"{scale}_before", h)
            apply_head(f"{scale}_skip", block_skips[-1])
            h = run_block(block, h, block_skips)
            apply_head(f"{scale}_after", h)
            for upsampler in self.upsamplers[scale]:  # type: ignore[attr-defined]
                is_resnet = "Resnet" in type(upsampler).__name__
                h = upsampler(h, temb) if is_resnet else upsampler(h, skips[-1].shape[2:])

        # The head on the U-Net's own output, if configured.
        if "output" in self.heads:
            h = h if unet.conv_norm_out is None else unet.conv_act(unet.conv_norm_out(h))
            apply_head("output", unet.conv_out(h))
        return logits


def discriminator_from_teacher(
    teacher: str, config: DiscriminatorConfig, generator: torch.Generator
) -> Discriminator:
    """Build the discriminator with the teacher's weights. `generator` initializes the heads."""
    discriminator = _wrap_unet(pretrained.load_unet(teacher), teacher, config)
    for head in discriminator.heads.values():
        assert isinstance(head, nn.Conv2d) and head.bias is not None
        bound = head.weight[0].numel() ** -0.5
        nn.init.uniform_(head.weight, -bound, bound, generator=generator)
        nn.init.zeros_(head.bias)
    return discriminator


def discriminator_on_meta(teacher: str, config: DiscriminatorConfig) -> Discriminator:
    """Build the same network on torch's meta device, without weights."""
    with torch.device("meta"):
        return _wrap_unet(pretrained.load_on_meta(teacher, "unet"), teacher, config)


def _wrap_unet(unet: Any, teacher: str, config: DiscriminatorConfig) -> Discriminator:
    family, downscale = family_of(teacher), pretrained.latent_downscale(teacher)
    assert isinstance(family, UNetFamily), "check_discriminator must run first"
    with torch.device("cpu"):
        schedule = pretrained.load_schedule(teacher)
    return Discriminator(unet, family, config, downscale, schedule)


UNET = DiscriminatorKind(
    name="unet",
    build=discriminator_from_teacher,
    build_on_meta=discriminator_on_meta,
    shard_units=lambda teacher, network: family_of(teacher).shard_units(network),
    networks=("unet",),
    settings=(
        *("z_conditioning", "multi_scale_input", "multi_scale_output", "output_head", "freeze_backbone"),
        *TIME_SETTINGS,
    ),
)


def added_parameters(discriminator: Discriminator) -> int:
    """Count the parameters that the discriminator adds to the U-Net (Table A1: at most 0.13M for SD 1.5)."""
    teacher_parts = ("unet.", "upsamplers.")
    return sum(
        p.numel() for name, p in discriminator.named_parameters() if not name.startswith(teacher_parts)
    )


def _check_supported(unet: Any, family: UNetFamily) -> None:
    # The forward pass calls the blocks one by one, so each must be of a known type.
    for block_type in (type(block).__name__ for block in (*unet.down_blocks, *unet.up_blocks)):
        if block_type not in BLOCK_TYPES:
            raise UserError(
                f"discriminator: the teacher's U-Net has a {block_type}; "
                f"supported are {', '.join(BLOCK_TYPES)}"
            )

    # The forward pass computes the embeddings of time and conditions itself, and supports these.
    for name, supported in TEXT_SETTINGS if family.reads_text else CLASS_SETTINGS:
        if (value := getattr(unet.config, name)) not in supported:
            raise UserError(
                f"discriminator: the teacher's U-Net has {name} {value!r}; supported: "
                + ", ".join(map(repr, supported))
            )


def _head_widths(unet: Any) -> Iterator[tuple[str, int]]:
    """(name, input channels) of every head, from the widths of the residual blocks."""
    below = unet.down_blocks[-1].resnets[-1].out_channels
    for scale, block in enumerate(unet.up_blocks):
        yield f"{scale}_before", below
        yield f"{scale}_skip", block.resnets[0].in_channels - below
        below = block.resnets[-1].out_channels
        yield f"{scale}_after", below


def _resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize x [B, C, h, w] to `size`, bilinear and antialiased. It has a second derivative, as R1 needs."""
    fp32 = x.to(torch.promote_types(x.dtype, torch.float32))  # not implemented for bf16 on the CPU
    small = F.interpolate(fp32, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    return small.to(x.dtype)


def _zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
