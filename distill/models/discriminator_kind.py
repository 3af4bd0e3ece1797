"""What one kind of discriminator consists of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from distill.config.discriminator import DiscriminatorConfig

TIME_SETTINGS = (
    *("timestep", "timestep_mode", "timestep_shift"),
    *("noise_augment", "noise_max_timestep"),
)
"""Settings of the time input and of noise before the discriminator, for networks that have a time input."""


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
    draws: int = 0
    """Random integers below 2^24 per row that the network takes as its last argument, [B, draws]."""
    check: Callable[[str], object] | None = None
    """Raises SettingError for a teacher, by name, that it cannot be built for."""
    open_view: Callable[[str, DiscriminatorConfig, bool], nn.Module] | None = None
    """(teacher, settings, without weights) -> frozen networks that every process loads and passes to the
    network's `attach`: they are not trained, saved or sharded."""
