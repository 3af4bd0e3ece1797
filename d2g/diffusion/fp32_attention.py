"""Attention in fp32 inside networks that run in bf16 on a CPU, where it is faster in training."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


class FP32Attention:
    """A processor for diffusers' Attention of tokens [B, L, D] or features [B, D, h, w] that computes
    softmax(Q K^T) V in fp32 under autocast.

    On a CPU the backward pass of torch's bf16 attention takes 3.5 times as long as in fp32.
    """

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        # Features are tokens, one for each position.
        shape = hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attention.to_q(hidden_states), attention.to_k(context), attention.to_v(context)
        # [B, L, D] -> [B, heads, L, D / heads]
        dtype = projected[0].dtype
        q, k, v = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2).float() for x in projected)
        mask = attention_mask
        if mask is not None:
            batch, length = context.shape[:2]
            mask = attention.prepare_attention_mask(mask, length, batch).unflatten(0, (batch, -1)).float()
        with torch.autocast("cpu", enabled=False):
            result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        project, dropout = attention.to_out
        output: Tensor = dropout(project(result.transpose(1, 2).flatten(2).to(dtype)))
        return output.transpose(1, 2).reshape(shape) if len(shape) == 4 else output


def use_fp32_attention(network: nn.Module) -> None:
    """Give FP32Attention to every diffusers Attention layer of a network that computes no more than it does:
    no normalization, added projections or residual connection. Weights stay as they are."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    for layer in network.modules():
        if (
            isinstance(layer, Attention)
            and isinstance(layer.processor, AttnProcessor2_0)
            and _is_plain(layer)
        ):
            layer.set_processor(FP32Attention())


def _is_plain(layer: "Attention") -> bool:
    """Whether a layer computes no more than FP32Attention does."""
    extras = (layer.group_norm, layer.spatial_norm, layer.norm_cross, layer.norm_q, layer.norm_k)
    own = (layer.residual_connection, layer.only_cross_attention, layer.add_k_proj is not None)
    return all(extra is None for extra in extras) and not any(own) and layer.rescale_output_factor == 1
