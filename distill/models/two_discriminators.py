"""Two discriminators at once, such as unet+projected: one on latents, one on decoded pixels (as ADM)."""

from typing import Any

import torch
from torch import Tensor, nn

from d2g.diffusion.conditioning import Conditioning
from distill.config.discriminator import DiscriminatorConfig
from distill.models.discriminator_kind import DiscriminatorKind


class TwoDiscriminators(nn.Module):
    """The logits of both. Heads of the second begin with its name and a dot, and have a loss of their own."""

    def __init__(self, first: nn.Module, second: nn.Module, name: str) -> None:
        super().__init__()
        self.first, self.second, self.name = first, second, name

    def requires_grad_(self, requires_grad: bool = True) -> "TwoDiscriminators":
        """Switch gradients of the trained parameters of both on or off."""
        for part in (self.first, self.second):
            part.requires_grad_(requires_grad)
        return self

    def attach(self, view: nn.Module) -> None:
        """Let the second read through these frozen networks."""
        self.second.attach(view)  # type: ignore[operator]

    def forward(
        self, x: Tensor, noise: Tensor, cond: Conditioning, t: Tensor | None, draws: Tensor
    ) -> dict[str, Tensor]:
        """Inputs of both -> logits [B, 1, h_s, w_s] per head of both."""
        second = self.second(x, noise, cond, t, draws)
        return {**self.first(x, noise, cond, t), **{f"{self.name}.{head}": v for head, v in second.items()}}


def both(first: DiscriminatorKind, second: DiscriminatorKind) -> DiscriminatorKind:
    """The kind that trains the two together. The first one takes no random numbers of its rows."""
    assert not first.draws and first.open_view is None

    # Each function builds the parts with their own kinds and joins the results.
    def build(teacher: str, config: DiscriminatorConfig, rng: torch.Generator) -> TwoDiscriminators:
        return TwoDiscriminators(
            first.build(teacher, config, rng), second.build(teacher, config, rng), second.name
        )

    def build_on_meta(teacher: str, config: DiscriminatorConfig) -> TwoDiscriminators:
        parts = [kind.build_on_meta(teacher, config) for kind in (first, second)]
        return TwoDiscriminators(parts[0], parts[1], second.name)

    def shard_units(teacher: str, network: Any) -> list[nn.Module]:
        units = [*first.shard_units(teacher, network.first)]
        return [*units, *second.shard_units(teacher, network.second)]

    return DiscriminatorKind(
        name=f"{first.name}+{second.name}",
        build=build,
        build_on_meta=build_on_meta,
        shard_units=shard_units,
        networks=first.networks,
        settings=tuple(dict.fromkeys((*first.settings, *second.settings, "projected_weight"))),
        draws=second.draws,
        check=first.check,
        open_view=second.open_view,
    )
