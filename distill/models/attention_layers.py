"""Attention layers of GigaGAN's generator (arXiv 2303.05511, section 3.2).

Self-attention with L2 distances as logits, cross-attention to the text tokens, and layers on these tokens.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from distill.models.style_layers import EqualizedLinear, group_norm

RESIDUAL_GAIN = 0.3
"""Gain of each residual branch. GigaGAN uses a gain below 1; the number is ours."""
HEAD_WIDTH = 64
"""Largest width of a head."""
MLP_WIDTH = 4
"""Width of the hidden layer of an MLP, relative to its input."""


def head_count(width: int) -> int:
    """Number of attention heads: about width / HEAD_WIDTH, reduced to a divisor of `width`."""
    heads = max(1, width // HEAD_WIDTH)
    while width % heads:
        heads -= 1
    return heads


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, D] -> [B, heads, L, D / heads]."""
    split: Tensor = x.unflatten(2, (heads, -1)).transpose(1, 2)
    return split


def join_heads(x: Tensor) -> Tensor:
    """[B, heads, L, d] -> [B, L, heads d]."""
    return x.transpose(1, 2).flatten(2)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """Convert a mask [B, M] of keys, 0 for padding, for scaled_dot_product_attention: bool [B, 1, 1, M]."""
    return None if mask is None else mask.bool()[:, None, None, :]


def distance_logits(q: Tensor) -> Tensor:
    """Compute -|q_i - q_j|^2 / sqrt(8 d) of queries [..., L, d], which are also the keys: [..., L, L].

    For independent q ~ N(0, 1) the squared distance has standard deviation sqrt(8 d), so that the logits have
    about unit variance, as GigaGAN asks for. Lipschitz-continuous (Kim et al. 2021).
    """
    power = q.square().sum(-1)
    squared = power[..., :, None] + power[..., None, :] - 2 * q @ q.transpose(-1, -2)
    return -squared.clamp(min=0) / math.sqrt(8 * q.shape[-1])


class SelfAttention(nn.Module):
    """Self-attention of tokens [B, L, D] by L2 distance, with one matrix for queries and keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = head_count(width)
        self.query_key, self.value = EqualizedLinear(width, width), EqualizedLinear(width, width)
        self.out = EqualizedLinear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized tokens [B, L, D] -> residual [B, L, D]."""
        q, v = (split_heads(layer(x), self.heads) for layer in (self.query_key, self.value))
        weights = distance_logits(q.float()).softmax(-1).to(v.dtype)
        y: Tensor = self.out(join_heads(weights @ v))
        return y


class CrossAttention(nn.Module):
    """Cross-attention of tokens [B, L, D] to text tokens [B, M, D'], with logits q . k / sqrt(d)."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.heads = head_count(width)
        self.query = EqualizedLinear(width, width)
        self.key, self.value = EqualizedLinear(text_width, width), EqualizedLinear(text_width, width)
        self.out = EqualizedLinear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalized tokens [B, L, D], text [B, M, D'] and its mask [B, M] -> residual [B, L, D]."""
        q, k, v = (
            split_heads(layer(t), self.heads)
            for layer, t in ((self.query, x), (self.key, text), (self.value, text))
        )
        y: Tensor = self.out(join_heads(F.scaled_dot_product_attention(q, k, v, key_mask(mask))))
        return y


class MLP(nn.Module):
    """Two linear layers with GELU between them, [B, L, D] -> [B, L, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = EqualizedLinear(width, MLP_WIDTH * width)
        self.second = EqualizedLinear(MLP_WIDTH * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized tokens [B, L, D] -> residual [B, L, D]."""
        y: Tensor = self.second(F.gelu(self.first(x)))
        return y


class AttentionBlock(nn.Module):
    """Self-attention, cross-attention to the text if there is one, and an MLP, on feature maps.

    Each is a residual branch on normalized features, with RESIDUAL_GAIN.
    """

    def __init__(self, channels: int, text_width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [SelfAttention(channels), MLP(channels)]
        if text_width:
            layers.insert(1, CrossAttention(channels, text_width))
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(group_norm(channels) for _ in layers)

    def forward(self, x: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        """x [B, C, h, w], text [B, M, D'] or None, its mask [B, M] or None -> [B, C, h, w]."""
        for norm, layer in zip(self.norms, self.layers, strict=True):
            tokens = norm(x).flatten(2).transpose(1, 2)
            y = layer(tokens, text, mask) if isinstance(layer, CrossAttention) else layer(tokens)
            x = x + RESIDUAL_GAIN * y.transpose(1, 2).unflatten(2, x.shape[2:])
        return x


class TextLayers(nn.Module):
    """T: learned transformer layers on the tokens of the frozen text encoder (GigaGAN, eq. 3)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList(CrossAttention(width, width) for _ in range(layers))
        self.mlps = nn.ModuleList(MLP(width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Text tokens [B, L, D] with their mask [B, L] -> features [B, L, D]."""
        for number, (attend, mlp) in enumerate(zip(self.attention, self.mlps, strict=True)):
            normalized = self.norms[2 * number](tokens)
            tokens = tokens + RESIDUAL_GAIN * attend(normalized, normalized, mask)
            tokens = tokens + RESIDUAL_GAIN * mlp(self.norms[2 * number + 1](tokens))
        return tokens
