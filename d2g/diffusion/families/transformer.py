"""What all diffusion transformers share: their repeated blocks, and their image tokens at every depth."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.base import Family


class TransformerFamily(Family):
    """Base of the families whose network is a transformer over patches of the latents."""

    network = "transformer"
    block_types: tuple[str, ...]
    """Classes of the repeated blocks."""
    output_layers: tuple[str, ...] = ("norm_out", "proj_out")
    """Modules and parameters after the last block; a discriminator does not use them."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    @abstractmethod
    def features(
        self,
        network: Any,
        config: Any,
        x: Tensor,
        t: Tensor | float,
        cond: Conditioning,
        downscale: int,
        extra: Tensor | None = None,
    ) -> list[Tensor]:
        """The image tokens [B, h w / patch^2, D] after every block, row by row of the latents.

        Inputs as in `forward`. extra [B, h w / patch^2, D]: added to the embedded patches.
        """

    def width(self, config: Any) -> int:
        """Width D of the image tokens."""
        return int(config.num_attention_heads * config.attention_head_dim)

    def depth(self, config: Any) -> int:
        """Number of blocks."""
        return int(config.num_layers)

    def shard_units(self, network: nn.Module) -> Iterator[nn.Module]:
        """The transformer blocks."""
        for module in network.modules():
            if type(module).__name__ in self.block_types:
                yield module


def time_tensor(x: Tensor, t: Tensor | float) -> Tensor:
    """The time input of B rows as a tensor [B] on the device of x.

    Whole numbers are integers, because FSDP2 casts other numbers to bf16, which keeps eight bits.
    """
    if isinstance(t, Tensor):
        return t.to(x.device)
    dtype = torch.int64 if float(t).is_integer() else torch.float32
    return torch.full((len(x),), t, dtype=dtype, device=x.device)


def added(tokens: Tensor, extra: Tensor | None) -> Tensor:
    """Embedded patches with `extra` on them, if there is any."""
    return tokens if extra is None else tokens + extra
