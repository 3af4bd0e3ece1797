"""What one kind of discriminator consists of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from distill.config.components import DiscriminatorConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DiscriminatorKind:
    """A value of `gan.discriminator`.

    The network maps (latents [B, C, h, w], noise [B, C, h, w], conditioning, time [B] or None) to a dict of
    logits [B, 1, h_s, w_s] by head. Its exact gradient penalty must be defined: no operation without a second
    derivative.
    """

    name: str
    build: Callable[[str, DiscriminatorConfig, torch.Generator], nn.Module]
    """(teacher, settings, random numbers of the new layers) -> the network with its initial weights."""
    build_on_meta: Callable[[str, DiscriminatorConfig], nn.Module]
    """(teacher, settings) -> the same network without weights, for sharding and for predicting memory."""
    shard_units: Callable[[str, nn.Module], Iterable[nn.Module]]
    """(teacher, network) -> the blocks that FSDP2 gathers and activation checkpointing recomputes."""
    networks: tuple[str, ...] = ()
    """The teacher's components that it can be built from, such as unet; empty: it takes any teacher."""
    settings: tuple[str, ...] = ()
    """Fields of DiscriminatorConfig that not every kind reads."""
