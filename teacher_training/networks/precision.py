"""Training of a teacher's network in bf16 on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from d2g.core.precision import supports_bf16
from teacher_training.config import TeacherConfig
from teacher_training.loop import LossFn


def trains_in_bf16(config: TeacherConfig) -> bool:
    """Whether `config.precision` means bf16 on this machine."""
    return config.precision == "bf16" or (config.precision == "auto" and supports_bf16(torch.device("cpu")))


def with_precision(loss_of: LossFn, config: TeacherConfig) -> LossFn:
    """The loss with its networks in the precision of the settings: bf16 is autocast."""
    half = trains_in_bf16(config)

    def in_precision(rows: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return loss_of(rows, generator)

    return in_precision


class FP32Attention:
    """A processor for diffusers' Attention of tokens [B, L, D], with softmax(Q K^T) V in fp32 under autocast.

    On a CPU the backward pass of torch's bf16 attention takes 3.5 times as long as in fp32.
    """

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attention.to_q(hidden_states), attention.to_k(context), attention.to_v(context)
        # [B, L, D] -> [B, heads, L, D / heads]
        q, k, v = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2).float() for x in projected)
        with torch.autocast("cpu", enabled=False):
            result = F.scaled_dot_product_attention(q, k, v)
        project, dropout = attention.to_out
        output: Tensor = dropout(project(result.transpose(1, 2).flatten(2)))
        return output
