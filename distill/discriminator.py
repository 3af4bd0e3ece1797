"""The discriminator: the teacher's U-Net with noise input, resized inputs and thin readouts at every scale.

An explicit forward over the U-Net's blocks, without hooks: hooks fire twice under activation checkpointing
and break under sharding (method.md 10.18). Layout: method.md 4.2. No public reference implementation exists.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import pretrained
from core.errors import UserError
from distill.config import DiscriminatorConfig

BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")


class Discriminator(nn.Module):
    """D(x, z, c): patch logits of every head. Built from a UNet2DConditionModel, which it takes over and
    trains.

    h0 = conv_in(x) + conv_z(z), conv_z zero at the start; Resize(x) enters each lower encoder scale through a
    zero convolution, so that D starts as the teacher; per decoder scale three 1x1 heads: on what comes up
    from below, on the encoder's skip, and on the scale's output. Heads are not zero, or no gradient would
    pass.
    """

    def __init__(self, unet: Any, config: DiscriminatorConfig) -> None:
        super().__init__()
        for kind in (type(block).__name__ for block in (*unet.down_blocks, *unet.up_blocks)):
            if kind not in BLOCKS:
                raise UserError(
                    f"discriminator: the teacher's U-Net has a {kind}; supported are {', '.join(BLOCKS)}"
                )
        self.unet: Any = unet
        self.timestep = config.timestep
        channels, widths = unet.config.in_channels, [b.resnets[0].out_channels for b in unet.down_blocks]
        first = unet.conv_in.out_channels
        self.conv_z = _zeroed(nn.Conv2d(channels, first, 3, padding=1)) if config.z_conditioning else None
        self.conv_scale = (
            nn.ModuleList(_zeroed(nn.Conv2d(channels, width, 3, padding=1)) for width in widths[:-1])
            if config.multi_scale_input
            else None
        )
        self.multi_scale_output = config.multi_scale_output
        self.heads = nn.ModuleDict(
            {name: nn.Conv2d(width, 1, 1) for name, width in _head_widths(unet) if self._reads(unet, name)}
        )
        self.requires_grad_(True)
        for unused in (unet.conv_norm_out, unet.conv_out):  # no head reads the epsilon output
            if unused is not None:
                unused.requires_grad_(False)

    def _reads(self, unet: Any, name: str) -> bool:
        return self.multi_scale_output or name == f"{len(unet.up_blocks) - 1}_after"

    def forward(self, x: Tensor, noise: Tensor, text: Tensor) -> dict[str, Tensor]:
        """x and noise [B, C, h, w], text hidden states [B, L, D] -> logits [B, 1, h_s, w_s] per head."""
        unet, logits = self.unet, {}
        t = torch.full((len(x),), self.timestep, device=x.device)
        temb = unet.time_embedding(unet.time_proj(t).to(x.dtype))

        def read(scale: int, place: str, features: Tensor) -> None:
            if (name := f"{scale}_{place}") in self.heads:
                logits[name] = self.heads[name](features)

        h = unet.conv_in(x)
        if self.conv_z is not None:
            h = h + self.conv_z(noise)
        skips = [h]
        for scale, block in enumerate(unet.down_blocks):
            for resnet, attention in _layers(block):
                h = resnet(h, temb)
                h = h if attention is None else attention(h, encoder_hidden_states=text, return_dict=False)[0]
                skips.append(h)
            for down in block.downsamplers or ():
                h = down(h)
                skips.append(h)
                if self.conv_scale is not None:
                    h = h + self.conv_scale[scale](_resize(x, h.shape[2:]))
        h = unet.mid_block(h, temb, encoder_hidden_states=text)
        for scale, block in enumerate(unet.up_blocks):
            read(scale, "before", h)
            read(scale, "skip", skips[-1])
            for resnet, attention in _layers(block):
                h = resnet(torch.cat([h, skips.pop()], dim=1), temb)
                h = h if attention is None else attention(h, encoder_hidden_states=text, return_dict=False)[0]
            read(scale, "after", h)
            for up in block.upsamplers or ():
                h = up(h, skips[-1].shape[2:])
        return logits


def discriminator_from_teacher(
    teacher: str, config: DiscriminatorConfig, generator: torch.Generator
) -> Discriminator:
    """A discriminator with the teacher's weights; `generator` draws the heads."""
    discriminator = Discriminator(pretrained.load_unet(teacher), config)
    for head in discriminator.heads.values():
        assert isinstance(head, nn.Conv2d) and head.bias is not None
        bound = head.weight[0].numel() ** -0.5
        nn.init.uniform_(head.weight, -bound, bound, generator=generator)
        nn.init.zeros_(head.bias)
    return discriminator


def added_parameters(discriminator: Discriminator) -> int:
    """Parameters beyond the U-Net's own (Table A1: at most 0.13M for SD 1.5)."""
    return sum(p.numel() for name, p in discriminator.named_parameters() if not name.startswith("unet."))


def _layers(block: Any) -> Iterator[tuple[Any, Any]]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    yield from zip(block.resnets, attentions, strict=True)


def _head_widths(unet: Any) -> Iterator[tuple[str, int]]:
    """(name, channels) of every readout, from the block widths: the resnets' own input and skip counts."""
    below = unet.down_blocks[-1].resnets[-1].out_channels
    for scale, block in enumerate(unet.up_blocks):
        yield f"{scale}_before", below
        yield f"{scale}_skip", block.resnets[0].in_channels - below
        below = block.resnets[-1].out_channels
        yield f"{scale}_after", below


def _resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Antialiased bilinear: differentiable twice, as R1 needs."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)


def _zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
