"""`DiscriminatorKind`: how one discriminator is built, sharded and configured."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from distill.config.discriminator import DiscriminatorConfig

TIME_SETTINGS = (
    *("timestep", "timestep_mode", "timestep_shift"),
    *("noise_augment", "noise_max_timestep"),
)
"""Settings of the time input and of noise augmentation, for networks with a time input."""


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
    """Components of the teacher from which it can be built, such as unet; empty for any teacher."""
    settings: tuple[str, ...] = ()
    """Fields of DiscriminatorConfig that this kind uses and others may not."""
    draws: int = 0
    """Number of random integers in [0, 2^24) per row, which the network takes as last argument [B, draws]."""
    check: Callable[[str], object] | None = None
    """(teacher) -> nothing; raises SettingError for a teacher for which it cannot be built."""
    open_pixel_features: Callable[[str, DiscriminatorConfig, bool], nn.Module] | None = None
    """(teacher, settings, whether without weights) -> frozen networks through which the discriminator reads.

    Every process loads them and passes them to the network's `attach`. They are not trained, saved or
    sharded.
    """
