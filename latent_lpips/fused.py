"""The distance of a frozen trunk, and its gradient, in one sweep without autograd's graph.

A sample's distance depends on that sample alone, so what the backward pass brings is one number per sample,
times a gradient that the forward pass can compute at once. The sweep does so for a few rows at a time and
forgets the rest: memory does not grow with the batch, and nothing waits on the GPU for the backward pass.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_lpips.vgg import ConvLayer

NORM_EPS = 1e-8
CPU_POSITIONS, GPU_POSITIONS = 2**13, 2**16
"""Latent positions per sweep: a CPU is busy with two latents of 64x64 (180 MB in fp32), a GPU with 16."""


def at_least_fp32(x: Tensor) -> Tensor:
    """At least fp32: squares and sums of features in bf16 would lose the small differences."""
    return x if x.dtype == torch.float64 else x.float()


def normalize_features(features: Tensor) -> Tensor:
    """Features [B, C, h, w] -> unit length over C at every position, fp32 (fp64 stays).

    The epsilon stands inside the root: outside it, the gradient at all-zero features would be 0/0.
    """
    return _unit(features)[0]


def layer_distances(
    layers: Sequence[ConvLayer], heads: Sequence[Tensor], pred: Tensor, target: Tensor
) -> Tensor:
    """The taps' shares of the distance between latents [B, C, h, w]: [B, taps], without a gradient."""
    parts = []
    with torch.no_grad():
        for p, t in _rows(pred, target):
            taps = zip(_taps(layers, p), _taps(layers, t), heads, strict=True)
            means = [
                ((normalize_features(f) - normalize_features(g)).square().mean((2, 3)), w) for f, g, w in taps
            ]
            parts.append(torch.stack([mean @ w.to(mean.dtype) for mean, w in means], 1))
    return torch.cat(parts)


def distance_with_gradient(
    layers: Sequence[ConvLayer], heads: Sequence[Tensor], pred: Tensor, target: Tensor
) -> Tensor:
    """The distance [B] of latents [B, C, h, w]; its backward pass reaches `pred`."""
    with torch.no_grad():
        parts = [_sweep(layers, heads, p, t) for p, t in _rows(pred, target)]
        distance, gradient = (torch.cat(part) for part in zip(*parts, strict=True))
    attached: Tensor = _Attach.apply(pred, distance, gradient.to(pred.dtype))
    return attached


class _Attach(torch.autograd.Function):
    """Give a distance [B] the gradient that is known already."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, distance: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return distance.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None]:
        # A constant here would silently drop the second derivative.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "LatentLPIPS' fast path has no second derivative (create_graph=True); "
                "use metric.layers(pred, target).sum(1), which goes through autograd"
            )
        (gradient,) = ctx.saved_tensors
        return incoming.to(gradient.dtype)[:, None, None, None] * gradient, None, None


def _rows(pred: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both inputs in sweeps of as many rows as the device has use for."""
    positions = CPU_POSITIONS if pred.device.type == "cpu" else GPU_POSITIONS
    rows = max(1, positions // (pred.shape[2] * pred.shape[3]))
    return list(zip(pred.split(rows), target.split(rows), strict=True))


class LayerRecord(NamedTuple):
    """What the way back needs of a layer: a byte per feature in place of the feature."""

    positive: Tensor  # [b, C, h, w] bool, after the pool if there is one
    size: tuple[int, int]  # of its features before the pool
    indices: Tensor | None  # of its pool


def _sweep(
    layers: Sequence[ConvLayer], heads: Sequence[Tensor], pred: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Distance [b] and its gradient with respect to `pred` [b, C, h, w]."""
    trail: list[LayerRecord] = []
    fixed, moving = _taps(layers, target), _taps(layers, pred, trail)
    terms = [_term(f, g, w) for f, g, w in zip(moving, fixed, heads, strict=True)]
    distance, slopes = torch.stack([term for term, _ in terms]).sum(0), [slope for _, slope in terms]
    del fixed, moving, terms
    low = layers[-1].weight.dtype  # for the whole way back: rounding a gradient flips no ReLU
    gradient = torch.zeros_like(slopes[-1])
    for layer in reversed(layers):
        if layer.tap:
            gradient = gradient + slopes.pop()
        step = trail.pop()
        gradient = gradient.to(low).mul_(step.positive)
        if step.indices is not None:
            gradient = _unpool(gradient, step.indices, step.size)
        gradient = F.conv_transpose2d(gradient, layer.weight.to(low), padding=1)
    return distance, gradient


def _taps(layers: Sequence[ConvLayer], x: Tensor, trail: list[LayerRecord] | None = None) -> list[Tensor]:
    """The trunk's taps; into `trail`, its steps."""
    x = x.contiguous(memory_format=torch.channels_last)
    taps = []
    for layer in layers:
        x = F.conv2d(x.to(layer.weight.dtype), layer.weight, layer.bias, padding=1).relu_()
        size, indices = (x.shape[2], x.shape[3]), None
        if layer.pool:
            x, indices = F.max_pool2d(x, 2, return_indices=True)
        if trail is not None:
            trail.append(LayerRecord(x.bool(), size, indices))
        if layer.tap:
            taps.append(x)
    return taps


def _unpool(gradient: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
    """Gradients [b, C, h / 2, w / 2] to where the maxima were in [b, C, h, w]. PyTorch's own two ways refuse
    to run under its deterministic algorithms."""
    flat = gradient.new_zeros((*gradient.shape[:2], size[0] * size[1]))
    flat.scatter_(2, indices.flatten(2), gradient.flatten(2))
    placed: Tensor = flat.unflatten(2, size).contiguous(memory_format=torch.channels_last)
    return placed


def _term(f: Tensor, g: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One tap's share [b] = mean over positions of w . (unit f - unit g)^2, and its gradient by f."""
    unit, scale = _unit(f)
    difference = unit - _unit(g)[0]
    slope = difference * weight.to(unit.dtype)[:, None, None]
    share = (slope * difference).sum(1).mean((1, 2))
    slope = slope * (2 / (f.shape[2] * f.shape[3]))
    # d unit / d f = scale (1 - unit unit^T), with the epsilon in scale.
    return share, (slope - unit * (unit * slope).sum(1, keepdim=True)) * scale


def _unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Unit features, and the factor that made them so [B, 1, h, w]."""
    features = at_least_fp32(features)
    scale = (features.square().sum(1, keepdim=True) + NORM_EPS).rsqrt()
    return features * scale, scale
