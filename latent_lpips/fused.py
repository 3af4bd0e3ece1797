"""Compute the distance of a frozen trunk and its gradient together, without autograd's graph.

The distance of a sample depends on that sample only. The caller's backward pass therefore contributes one
factor per sample, and the forward pass can already compute the gradient. It does so for a few rows at a time
and then drops the features, so memory does not grow with the batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_lpips.vgg import ConvLayer
from latent_lpips.winograd_2x2 import Winograd2x2

NORM_EPS = 1e-8
"""Added to the squared norm of a feature vector."""
CPU_POSITIONS, GPU_POSITIONS = 2**13, 2**16
"""Latent positions per chunk: two latents of 64x64 (180 MB in fp32) keep a CPU busy, 16 a GPU."""


def at_least_fp32(x: Tensor) -> Tensor:
    """Convert to fp32 unless it is fp64: squares and sums of bf16 features would lose small differences."""
    return x if x.dtype == torch.float64 else x.float()


def normalize_features(features: Tensor) -> Tensor:
    """Normalize features [B, C, h, w] to unit length over C at every position, in fp32 (fp64 stays).

    The epsilon is inside the square root, because the gradient at all-zero features would otherwise be 0/0.
    """
    return _unit(features)[0]


def layer_distances(
    layers: Sequence[ConvLayer], heads: Sequence[Tensor], pred: Tensor, target: Tensor
) -> Tensor:
    """Return each layer's contribution to the distance of latents [B, C, h, w]: [B, layers], no gradient."""
    parts = []
    with torch.no_grad():
        # A few rows at a time, so that memory does not grow with the batch.
        for p, t in _row_chunks(pred, target):
            means = [
                ((normalize_features(f) - normalize_features(g)).square().mean((2, 3)), w)
                for (f, g), w in zip(_tap_pairs(layers, p, t), heads, strict=True)
            ]
            parts.append(torch.stack([mean @ w.to(mean.dtype) for mean, w in means], 1))
    return torch.cat(parts)


def distance_with_gradient(
    layers: Sequence[ConvLayer], heads: Sequence[Tensor], pred: Tensor, target: Tensor
) -> Tensor:
    """Return the distance [B] of latents [B, C, h, w]. Gradients flow to `pred`."""
    with torch.no_grad():
        parts = [_distance_and_gradient(layers, heads, p, t) for p, t in _row_chunks(pred, target)]
        distance, gradient = (torch.cat(part) for part in zip(*parts, strict=True))
    result: Tensor = _AttachGradient.apply(pred, distance, gradient.to(pred.dtype))
    return result


class _AttachGradient(torch.autograd.Function):
    """Attach a precomputed gradient [B, C, h, w] to a distance [B]."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, distance: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return distance.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        # The stored gradient is a constant: a second derivative would silently be zero.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "LatentLPIPS' fast path has no second derivative (create_graph=True); "
                "use metric.layers(pred, target).sum(1), which goes through autograd"
            )
        (gradient,) = ctx.saved_tensors
        return grad_output.to(gradient.dtype)[:, None, None, None] * gradient, None, None


def _row_chunks(pred: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split both inputs into chunks of as many rows as keep the device busy."""
    positions = CPU_POSITIONS if pred.device.type == "cpu" else GPU_POSITIONS
    rows = max(1, positions // (pred.shape[2] * pred.shape[3]))
    return list(zip(pred.split(rows), target.split(rows), strict=True))


class LayerRecord(NamedTuple):
    """What the backward pass needs from a layer: one byte per feature instead of the feature."""

    positive: Tensor  # [b, C, h, w] bool: where ReLU is active, after the pool if the layer has one
    size: tuple[int, int]  # (h, w) of the features before the pool
    indices: Tensor | None  # argmax positions of the pool


def _distance_and_gradient(
    layers: Sequence[ConvLayer], heads: Sequence[Tensor], pred: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the distance [b] and its gradient with respect to `pred` [b, C, h, w]."""
    # Forward: the distance, and its gradient with respect to each tapped feature map.
    records: list[LayerRecord] = []
    pairs = _tap_pairs(layers, pred, target, records)
    terms = [_layer_term(f, g, w) for (f, g), w in zip(pairs, heads, strict=True)]
    distance, tap_gradients = (
        torch.stack([term for term, _ in terms]).sum(0),
        [gradient for _, gradient in terms],
    )
    del pairs, terms
    # Backward through the convolutions, all in the last layer's type: rounding a gradient flips no ReLU.
    dtype = layers[-1].weight.dtype
    gradient = torch.zeros_like(tap_gradients[-1])
    for layer in reversed(layers):
        # Add the gradient of this layer's term, then go through ReLU, pool and convolution.
        if layer.tap:
            gradient = gradient + tap_gradients.pop()
        record = records.pop()
        gradient = gradient.to(dtype).mul_(record.positive.to(dtype))
        if record.indices is not None:
            gradient = _unpool(gradient, record.indices, record.size)
        if layer.winograd is not None:
            gradient = layer.winograd.conv3x3_transposed(gradient)
        else:
            gradient = F.conv_transpose2d(gradient, layer.weight.to(dtype), padding=1)
    return distance, gradient


def _tap_pairs(
    layers: Sequence[ConvLayer], pred: Tensor, target: Tensor, records: list[LayerRecord] | None = None
) -> Iterable[tuple[Tensor, Tensor]]:
    """Return the tapped feature maps of `pred` and `target`, and append a record of every layer of `pred`."""
    if any(layer.by_difference for layer in layers):
        return _tap_pairs_by_difference(layers, pred, target, records)
    target_taps = _taps(layers, target)
    return zip(_taps(layers, pred, records), target_taps, strict=True)


def _tap_pairs_by_difference(
    layers: Sequence[ConvLayer], pred: Tensor, target: Tensor, records: list[LayerRecord] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the pairs of `_tap_pairs` one by one, so that only one is in memory. For CPUs.

    From the first layer with `by_difference` on, the target's features and the differences pred - target are
    convolved, which is possible because convolutions are linear. Rounding is then relative to the difference,
    and small distances keep their relative precision.
    """
    first = next(k for k, layer in enumerate(layers) if layer.by_difference)
    # Layers before it: both inputs as they are.
    for layer in layers[:first]:
        (target,), (pred,) = (
            _taps([layer._replace(tap=True)], x, r) for x, r in ((target, None), (pred, records))
        )
        if layer.tap:
            yield pred, target

    # Then features and differences.
    dtype = layers[first].weight.dtype
    features, differences = target.to(dtype), (pred - target).to(dtype)
    del pred, target
    # Winograd's convolutions begin after the first layer of FORWARD_CHANNELS channels, because errors in
    # early layers harm the gradient most.
    widest = [
        k for k, layer in enumerate(layers) if min(layer.weight.shape[:2]) >= Winograd2x2.FORWARD_CHANNELS
    ]
    for k, layer in enumerate(layers[first:], first):
        features, differences, record = _by_difference(layer, features, differences, k not in widest[1:])
        if records is not None:
            records.append(record)
        if layer.tap:
            exact = at_least_fp32(features)
            yield exact + differences, exact


def _by_difference(
    layer: ConvLayer, features: Tensor, differences: Tensor, direct: bool
) -> tuple[Tensor, Tensor, LayerRecord]:
    """Apply a layer to features and differences; the record is that of their sum.

    direct: use direct convolutions instead of Winograd's.
    """
    features, differences = (
        _convolve(features, layer, layer.bias, direct),
        _convolve(differences, layer, None, direct),
    )
    # relu(z + d) - relu(z), which loses no digits of d: max(d + min(z, 0), -max(z, 0)).
    differences += features.clamp_max(0)
    negative = features.relu_().neg()
    torch.maximum(differences, negative, out=differences)
    size = (features.shape[2], features.shape[3])
    if not layer.pool:
        return features, differences, LayerRecord(differences > negative, size, None)
    # Pool the sum and the features separately: their maxima can be at different positions.
    total, indices = F.max_pool2d(at_least_fp32(features) + differences, 2, return_indices=True)
    features = F.max_pool2d(features, 2)
    return features, (total - features).to(features.dtype), LayerRecord(total.bool(), size, indices)


def _convolve(x: Tensor, layer: ConvLayer, bias: Tensor | None, direct: bool = False) -> Tensor:
    """Convolve x [B, C, h, w] and add the bias [K], if any: [B, K, h, w]."""
    if layer.winograd is None or direct:
        return F.conv2d(x, layer.weight, bias, padding=1)
    added = torch.zeros_like(layer.bias) if bias is None else bias
    return layer.winograd.conv3x3(x, at_least_fp32(added))


def _taps(layers: Sequence[ConvLayer], x: Tensor, records: list[LayerRecord] | None = None) -> list[Tensor]:
    """Return the trunk's tapped feature maps, and append a record of every layer to `records`."""
    x = x.contiguous(memory_format=torch.channels_last)
    taps = []
    for layer in layers:
        x = _convolve(x.to(layer.weight.dtype), layer, layer.bias).relu_()
        size, indices = (x.shape[2], x.shape[3]), None
        if layer.pool:
            x, indices = F.max_pool2d(x, 2, return_indices=True)
        # Record after the pool: ReLU and max-pool commute.
        if records is not None:
            records.append(LayerRecord(x.bool(), size, indices))
        if layer.tap:
            taps.append(x)
    return taps


def _unpool(gradient: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
    """Move gradients [b, C, h / 2, w / 2] to the positions of the maxima in [b, C, h, w]."""
    shape = (*gradient.shape[:2], *size)
    if gradient.device.type == "cpu":
        pooled = torch.empty(shape, dtype=gradient.dtype, memory_format=torch.channels_last)
        placed: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            gradient, pooled, [2, 2], [2, 2], [0, 0], [1, 1], False, indices
        )
        return placed
    # On a GPU it fails under deterministic algorithms, and max-unpooling does so everywhere.
    flat = gradient.new_zeros((*shape[:2], size[0] * size[1]))
    flat.scatter_(2, indices.flatten(2), gradient.flatten(2))
    placed = flat.unflatten(2, size).contiguous(memory_format=torch.channels_last)
    return placed


def _layer_term(f: Tensor, g: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean over positions of w . (unit f - unit g)^2, [b], and its gradient with respect to f."""
    # The term and its gradient with respect to the unit features.
    unit, scale = _unit(f)
    difference = unit - _unit(g)[0]
    gradient = difference * weight.to(unit.dtype)[:, None, None]
    term = (gradient * difference).sum(1).mean((1, 2))
    gradient = gradient * (2 / (f.shape[2] * f.shape[3]))
    # d unit / d f = scale (1 - unit unit^T), with the epsilon in scale.
    return term, (gradient - unit * (unit * gradient).sum(1, keepdim=True)) * scale


def _unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit features and the factor [B, 1, h, w] that normalizes them."""
    features = at_least_fp32(features)
    scale = (features.square().sum(1, keepdim=True) + NORM_EPS).rsqrt()
    return features * scale, scale
