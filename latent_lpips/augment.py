"""Random transforms of latents for E-LatentLPIPS, first-order differentiable, in plain PyTorch.

Geometry follows adaptive discriminator augmentation (Karras et al. 2020, appendix B) with every probability
set to 1; color follows DiffAugment (Zhao et al. 2020). Sampling and applying are separate functions, so that
both inputs of a distance get the same transform.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from d2g.core.transfer import to_device
from latent_lpips.config import AugmentConfig

# Scaling coefficients of the wavelet sym6 (Daubechies 1992, least asymmetric, 6 vanishing moments).
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
FP32 = torch.float32
"""The type of transforms and filters, whatever torch's default type is."""
LOWPASS = tuple(c / math.sqrt(2) for c in SYM6)  # sums to 1
FILTER_TAPS = len(LOWPASS)
CENTROID = sum(i * c for i, c in enumerate(LOWPASS))
"""The filter's center in taps. It is not the midpoint 5.5, because sym6 is only nearly symmetric."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentParams:
    """One transform per sample: fp32 tensors [B], or [B, 2] in (x, y) order, on one device."""

    letters: str
    flip: Tensor  # 0 or 1
    quarter: Tensor  # 0..3 quarter turns
    integer_shift: Tensor  # [B, 2], whole positions
    scale: Tensor  # above 1 enlarges
    rotate_pre: Tensor  # radians
    stretch: Tensor  # scales x by s and y by 1/s
    rotate_post: Tensor  # radians
    shift: Tensor  # [B, 2], as a fraction of the size
    brightness: Tensor  # added
    contrast: Tensor  # factor
    saturation: Tensor  # factor
    center: Tensor  # [B, 2], center of the cutout as a fraction of the size
    cutout: float  # side of the cutout as a fraction of the size


def sample_transforms(
    config: AugmentConfig,
    batch: int,
    size: Sequence[int],
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> AugmentParams:
    """Sample `batch` transforms for latents of `size` (h, w), distributed as AugmentConfig says.

    The same random numbers are consumed whatever the families, so one generator state gives the same flip for
    family b alone and for b with others. They are sampled on the generator's device and copied to `device`
    without synchronization.
    """
    # Always draw all numbers, so that one family's transforms do not depend on the others.
    source = generator.device if generator is not None else device
    uniform = to_device(torch.rand(batch, 11, generator=generator, device=source, dtype=FP32), device)
    normal = to_device(torch.randn(batch, 4, generator=generator, device=source, dtype=FP32), device)
    # Map the uniform numbers to [-1, 1), and whole shifts to positions of this size.
    wh = torch.stack([torch.full_like(uniform[:, 0], float(n)) for n in (size[1], size[0])], 1)
    signed = 2 * uniform - 1
    max_angle = math.radians(config.rotation)
    # Distributions as AugmentConfig documents them.
    return AugmentParams(
        letters=config.letters,
        flip=(uniform[:, 0] * 2).floor() * config.flip,
        quarter=(uniform[:, 1] * 4).floor() * config.quarter_turns,
        integer_shift=(signed[:, 2:4] * config.integer_shift * wh).round(),
        scale=torch.exp2(normal[:, 0] * config.scale_std),
        rotate_pre=signed[:, 4] * max_angle,
        stretch=torch.exp2(normal[:, 1] * config.stretch_std),
        rotate_post=signed[:, 5] * max_angle,
        shift=normal[:, 2:4] * config.shift_std,
        brightness=signed[:, 6] * config.brightness,
        contrast=1 + signed[:, 7] * config.contrast,
        saturation=1 + signed[:, 8] * config.saturation,
        center=uniform[:, 9:11],
        cutout=config.cutout,
    )


def select_transforms(params: AugmentParams, rows: slice) -> AugmentParams:
    """Return the transforms of the samples `rows`."""
    values = {f.name: getattr(params, f.name) for f in fields(params)}
    selected: dict[str, Any] = {name: v[rows] for name, v in values.items() if isinstance(v, Tensor)}
    return replace(params, **selected)


def apply_transforms(x: Tensor, params: AugmentParams) -> Tensor:
    """Transform latents [B, C, h, w], sample i by row i of `params`. Returns fp32 of the same shape.

    The order is geometry (b and g in one resampling), brightness, contrast, saturation, cutout. Contrast is
    relative to each input's own mean. Runs outside autocast.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        # Whole-position transforms need no filter; with geometry, both are one filtered resampling.
        if "g" in params.letters:
            x = _resample(x, inverse_affine(params, x.shape[2:]))
        elif "b" in params.letters:
            x = _sample_at_positions(x, inverse_affine(params, x.shape[2:]))
        if "c" in params.letters:
            x = _adjust_color(x, params)
        if "o" in params.letters:
            x = _zero_cutout(x, params)
        return x


def inverse_affine(params: AugmentParams, size: Sequence[int]) -> Tensor:
    """Return [B, 3, 3] matrices that map output positions to input positions, as (x, y) from the center.

    The transforms act in the order b, g, so the inverse is the product of their inverses in that order.
    """
    one = torch.ones_like(params.flip)
    matrix = torch.eye(3, device=one.device, dtype=FP32).expand(len(one), 3, 3)
    # Blitting: flip, quarter turn, shift by whole positions.
    if "b" in params.letters:
        matrix = _mul(matrix, _scaling(1 - 2 * params.flip, one))
        matrix = _mul(matrix, _rotation(params.quarter * (-math.pi / 2)))
        matrix = _mul(matrix, _translation(-params.integer_shift[:, 0], -params.integer_shift[:, 1]))
    # Geometry: scale, rotation, stretch, rotation, shift.
    if "g" in params.letters:
        matrix = _mul(matrix, _scaling(1 / params.scale, 1 / params.scale))
        matrix = _mul(matrix, _rotation(-params.rotate_pre))
        matrix = _mul(matrix, _scaling(1 / params.stretch, params.stretch))
        matrix = _mul(matrix, _rotation(-params.rotate_post))
        matrix = _mul(matrix, _translation(-params.shift[:, 0] * size[1], -params.shift[:, 1] * size[0]))
    return matrix


def _mul(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product without matmul, because TF32 would round the coordinates to 10 bits."""
    return (a[:, :, :, None] * b[:, None, :, :]).sum(2)


def _matrices(*entries: Tensor) -> Tensor:
    return torch.stack(entries, 1).reshape(-1, 3, 3)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrices(x, zero, zero, zero, y, zero, zero, zero, one)


def _rotation(angle: Tensor) -> Tensor:
    zero, one, c, s = torch.zeros_like(angle), torch.ones_like(angle), angle.cos(), angle.sin()
    return _matrices(c, -s, zero, s, c, zero, zero, zero, one)


def _translation(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrices(one, zero, x, zero, one, y, zero, zero, one)


def _map_grid(matrix: Tensor, ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
    """Map the grid ys x xs by `matrix`: returns x and y, [B, len(ys), len(xs)] each."""
    m = matrix[:, :2, :, None, None]
    x, y = xs[None, None, :], ys[None, :, None]
    return m[:, 0, 0] * x + m[:, 0, 1] * y + m[:, 0, 2], m[:, 1, 0] * x + m[:, 1, 1] * y + m[:, 1, 2]


def _index_range(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=like.dtype)


def _sample_at_positions(x: Tensor, matrix: Tensor) -> Tensor:
    """Sample at whole positions, reflected at the border. Such transforms need no low-pass filter."""
    height, width = x.shape[2:]
    my, mx = (height - 1) / 2, (width - 1) / 2
    u, v = _map_grid(matrix, _index_range(height, x) - my, _index_range(width, x) - mx)
    grid = torch.stack([u / mx, v / my], -1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


def _resample(x: Tensor, matrix: Tensor) -> Tensor:
    """Reflect-pad, upsample x2 with the sym6 low-pass, sample bilinearly, downsample x2 with the same filter.

    Up- and downsampling are fixed linear maps along each axis, that is, small matrix products. Upsampled
    sample n lies at ((n - CENTROID) / 2 - pad) in input positions.
    """
    # Upsample, so that the transform does not alias.
    height, width = x.shape[2:]
    fine = _matrix(_upsampler, height, x) @ x @ _matrix(_upsampler, width, x).T
    # Positions of the transformed grid, still at twice the resolution.
    ys = (_index_range(2 * height + FILTER_TAPS - 2, x) - CENTROID - (height - 1)) / 2
    xs = (_index_range(2 * width + FILTER_TAPS - 2, x) - CENTROID - (width - 1)) / 2
    u, v = _map_grid(matrix, ys, xs)
    # Where they lie in the padded, upsampled input.
    column = 2 * (u + (width - 1) / 2 + _padding(width)) + CENTROID
    row = 2 * (v + (height - 1) / 2 + _padding(height)) + CENTROID
    grid = torch.stack([2 * column / (fine.shape[3] - 1) - 1, 2 * row / (fine.shape[2] - 1) - 1], -1)
    transformed = F.grid_sample(fine, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return _matrix(_downsampler, height, x) @ transformed @ _matrix(_downsampler, width, x).T


def _padding(size: int) -> int:
    """One full reflection, and on tiny latents enough for the support of both filters."""
    return max(size - 1, FILTER_TAPS)


MatrixBuilder = Callable[[int, torch.device], Tensor]


def _matrix(build: MatrixBuilder, size: int, like: Tensor) -> Tensor:
    """Return build(size, device of `like`), cached. Compiled graphs have their own constants, and fake
    tensors have no values, so neither uses the cache."""
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return build(size, like.device)
    return _cached_matrix(build, size, like.device)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a cached inference tensor would break a later backward pass
def _cached_matrix(build: MatrixBuilder, size: int, device: torch.device) -> Tensor:
    return build(size, device)


def _upsampler(size: int, device: torch.device) -> Tensor:
    """Matrix [2 (size + 2 pad) + FILTER_TAPS - 2, size] that reflect-pads, then upsamples by 2 with gain 2.

    It is built on `device` by comparisons, so no copy from the host has to be waited for.
    """
    pad = _padding(size)
    padded = size + 2 * pad
    fine = torch.arange(2 * padded + FILTER_TAPS - 2, device=device)
    matrix = torch.zeros(len(fine), size, device=device, dtype=FP32)
    for tap, value in enumerate(LOWPASS):
        # Filter tap `tap` reads padded sample `coarse`, which is the reflected input sample `source`.
        coarse = (fine - tap).div(2, rounding_mode="floor")
        valid = ((fine - tap) % 2 == 0) & (coarse >= 0) & (coarse < padded)
        source = size - 1 - ((coarse - pad) % (2 * size - 2) - (size - 1)).abs()
        reads = valid[:, None] & (source[:, None] == torch.arange(size, device=device))
        matrix += 2 * value * reads.to(FP32)
    return matrix


def _downsampler(size: int, device: torch.device) -> Tensor:
    """Matrix [size, 2 size + FILTER_TAPS - 2]: the adjoint low-pass filter at every second sample."""
    fine = torch.arange(2 * size + FILTER_TAPS - 2, device=device)
    offset = fine - 2 * torch.arange(size, device=device)[:, None]
    return torch.stack([value * (offset == tap).to(FP32) for tap, value in enumerate(LOWPASS)]).sum(0)


def _adjust_color(x: Tensor, params: AugmentParams) -> Tensor:
    # Brightness, then contrast about the sample mean, then saturation about the channel mean.
    x = x + params.brightness[:, None, None, None]
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * params.contrast[:, None, None, None] + mean
    mean = x.mean(1, keepdim=True)
    return (x - mean) * params.saturation[:, None, None, None] + mean


def _zero_cutout(x: Tensor, params: AugmentParams) -> Tensor:
    height, width = x.shape[2:]
    xs, ys = (_index_range(width, x) + 0.5) / width, (_index_range(height, x) + 0.5) / height
    inside_x = (xs - params.center[:, :1]).abs() < params.cutout / 2
    inside_y = (ys - params.center[:, 1:]).abs() < params.cutout / 2
    return x.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0.0)
