"""Base of all diffusion transformers: repeated blocks, and image tokens at every depth."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.base import Family

JOINT_LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
"""Layers with adapters in blocks of joint attention, as in diffusers' training scripts."""


@dataclass(frozen=True, eq=False)
class TransformerInputs:
    """Inputs of a transformer: x [B, C, h, w], times t [B], the conditioning of B rows, and the number of
    pixels per latent."""

    x: Tensor
    t: Tensor
    cond: Conditioning
    downscale: int

    def tensor(self, name: str) -> Tensor:
        """A tensor of the conditioning in the dtype of x."""
        return self.cond.tensors[name].to(self.x.dtype)


class TransformerFamily(Family):
    """Base of the families whose network is a transformer over patches of the latents."""

    network = "transformer"
    block_types: tuple[str, ...]
    """Classes of the repeated blocks."""
    output_layers: tuple[str, ...] = ("norm_out", "proj_out")
    """Modules and parameters after the last block; a discriminator does not use them."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    @abstractmethod
    def call(self, network: Any, config: Any, inputs: TransformerInputs) -> Tensor:
        """The raw prediction of the network, as `forward`."""

    @abstractmethod
    def block_outputs(
        self, network: Any, config: Any, inputs: TransformerInputs, extra: Tensor | None
    ) -> list[Tensor]:
        """The image tokens after every block, as `features`: the forward pass of diffusers up to there."""

    def forward(
        self,
        network: Any,
        config: Any,
        x: Tensor,
        t: Tensor | float,
        cond: Conditioning,
        downscale: int,
        guidance_embedding: Tensor | None = None,
    ) -> Tensor:
        """See `Family.forward`. No transformer takes an added embedding of the guidance scale."""
        return self.call(network, config, TransformerInputs(x, time_tensor(x, t), cond, downscale))

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
        inputs = TransformerInputs(x, time_tensor(x, t), cond, downscale)
        return self.block_outputs(network, config, inputs, extra)

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


def run_blocks(blocks: Iterable[nn.Module], tokens: Tensor, **inputs: Any) -> list[Tensor]:
    """The image tokens [B, N, D] after every block; all blocks get the same further inputs."""
    outputs = []
    for block in blocks:
        tokens = block(tokens, **inputs)
        outputs.append(tokens)
    return outputs


def run_joint_blocks(
    blocks: Iterable[nn.Module], tokens: Tensor, text: Tensor, **inputs: Any
) -> list[Tensor]:
    """The image tokens [B, N, D] after every block that changes text and image tokens together."""
    outputs = []
    for block in blocks:
        text, tokens = block(hidden_states=tokens, encoder_hidden_states=text, **inputs)
        outputs.append(tokens)
    return outputs


def attention_bias(mask: Tensor) -> Tensor:
    """The padding mask of text [B, L], 1 where a token counts, as a bias [B, 1, L] on attention scores."""
    return ((1 - mask) * -10_000.0).unsqueeze(1)
