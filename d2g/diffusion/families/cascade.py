"""Base of all stages of cascades: schedule, supported training stages, time input."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.base import ExportFormat, Family
from d2g.diffusion.schedule import COSINE_STEPS


class CascadeFamily(Family):
    """Base of the stages of a cascade: networks with residual, time and attention blocks over maps.

    Stage C has `draws_images` false, stage B has a `prior_family`.
    """

    schedules = ("cosine",)
    regression = ("cosine",)
    gan = ("cosine",)
    lora = ("cosine",)
    exports = (ExportFormat("safetensors", ("cosine",)),)
    not_exported = "no diffusers, no lora: one step of diffusers' scheduler returns 0.99995 of the latents"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    takes_real_images = False
    block_types: tuple[str, ...]
    """Classes of the repeated blocks."""
    output_layers: tuple[str, ...]
    """Modules after the last block; a discriminator does not use them."""

    time_embedding: str
    """The method of its network that embeds r."""

    def adapt(self, component: str, module: Any) -> None:
        """Compute the embedding of r in fp32."""
        if component == self.network:
            embed = getattr(module, self.time_embedding)
            setattr(module, self.time_embedding, ExactTimeEmbedding(module, embed))

    @abstractmethod
    def features(
        self, network: Any, x: Tensor, t: Tensor | float, cond: Conditioning, extra: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Feature maps [B, D, h', w'] at several depths, by name, as diffusers computes them.

        Inputs as in `forward`. extra [B, D0, h, w]: added to the embedded latents.
        """

    @abstractmethod
    def feature_widths(self, config: Any) -> dict[str, int]:
        """The channels D of the maps of `features`, by name and in their order; the first is D0."""

    def patch(self, config: Any) -> int:
        """Side of the squares of latents that its network embeds."""
        return int(config.patch_size)

    def shard_units(self, network: nn.Module) -> Iterator[nn.Module]:
        """Residual, time and attention blocks."""
        for module in network.modules():
            if type(module).__name__ in self.block_types:
                yield module


def time_ratio(x: Tensor, t: Tensor | float) -> Tensor:
    """The continuous time r of timesteps of `CosineSchedule`, a tensor [B] in fp32 on the device of x."""
    times = t.to(x.device) if isinstance(t, Tensor) else torch.full((len(x),), t, device=x.device)
    return (times.double() / COSINE_STEPS).float()


class ExactTimeEmbedding:
    """The sinusoidal embedding of r by a stage's network, computed in fp32.

    In bf16 the embedding would be that of another time: it multiplies r by 10,000, which rounds to 9,984. A
    student trained by FSDP2 would then draw other images in fp32.
    """

    def __init__(self, network: nn.Module, embed: Callable[..., Tensor]) -> None:
        self.network, self.embed = network, embed

    def __call__(self, ratio: Tensor) -> Tensor:
        """r [B] -> its embedding [B, D] in the dtype of r, or of the network's weights where r is fp32."""
        exact = ratio.dtype in (torch.float32, torch.float64)
        dtype = next(self.network.parameters()).dtype if exact else ratio.dtype
        return self.embed(ratio if exact else ratio.float()).to(dtype)


def run_cascade_block(block: Any, x: Tensor, skip: Tensor | None, time: Tensor, text: Tensor) -> Tensor:
    """A block on x [B, D, h, w]: a residual one reads `skip`, others time or text; a scaling one x alone."""
    output: Tensor
    if hasattr(block, "depthwise"):
        output = block(x, skip)
    elif hasattr(block, "attention"):
        output = block(x, text)
    else:
        output = block(x, time) if hasattr(block, "mapper") else block(x)
    return output
