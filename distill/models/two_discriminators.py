"""Two discriminators in one run, such as unet+projected: on latents, and on decoded pixels (as in ADM)."""

from typing import Any

import torch
from torch import Tensor, nn

from d2g.diffusion.conditioning import Conditioning
from distill.config.discriminator import DiscriminatorConfig
from distill.models.discriminator_kind import DiscriminatorKind


class TwoDiscriminators(nn.Module):
    """Returns the logits of both discriminators. Heads of the second are named NAME.HEAD and have their own
    loss (`adversarial.by_discriminator`)."""

    def __init__(self, first: nn.Module, second: nn.Module, name: str) -> None:
        super().__init__()
        self.first, self.second, self.name = first, second, name

    def requires_grad_(self, requires_grad: bool = True) -> "TwoDiscriminators":
        """Switch gradients of the trained parameters of both on or off."""
        for part in (self.first, self.second):
            part.requires_grad_(requires_grad)
        return self

    def attach(self, pixel_features: nn.Module) -> None:
        """Give the second discriminator its frozen networks, with weights."""
        self.second.attach(pixel_features)  # type: ignore[operator]

    def forward(
        self, x: Tensor, noise: Tensor, cond: Conditioning, t: Tensor | None, draws: Tensor
    ) -> dict[str, Tensor]:
        """x and noise [B, C, h, w], conditioning of B rows, t [B] or None, draws [B, n] -> logits
        [B, 1, h_s, w_s] by head."""
        second = self.second(x, noise, cond, t, draws)
        return {**self.first(x, noise, cond, t), **{f"{self.name}.{head}": v for head, v in second.items()}}


def combine_kinds(first: DiscriminatorKind, second: DiscriminatorKind) -> DiscriminatorKind:
    """Return the kind that trains both discriminators. The first must not need random integers per row."""
    assert not first.draws and first.open_pixel_features is None

    # Each function calls that of both kinds and combines the results.
    def build(teacher: str, config: DiscriminatorConfig, rng: torch.Generator) -> TwoDiscriminators:
        return TwoDiscriminators(
            first.build(teacher, config, rng), second.build(teacher, config, rng), second.name
        )

    def build_on_meta(teacher: str, config: DiscriminatorConfig) -> TwoDiscriminators:
        return TwoDiscriminators(
            first.build_on_meta(teacher, config), second.build_on_meta(teacher, config), second.name
        )

    def shard_units(teacher: str, network: Any) -> list[nn.Module]:
        return [*first.shard_units(teacher, network.first), *second.shard_units(teacher, network.second)]

    return DiscriminatorKind(
        name=f"{first.name}+{second.name}",
        build=build,
        build_on_meta=build_on_meta,
        shard_units=shard_units,
        networks=first.networks,
        settings=tuple(dict.fromkeys((*first.settings, *second.settings, "projected_weight"))),
        draws=second.draws,
        check=first.check,
        open_pixel_features=second.open_pixel_features,
    )
