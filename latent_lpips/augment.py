"""Random transforms of latents for E-LatentLPIPS, first-order differentiable, in plain PyTorch.

Written from the description of adaptive discriminator augmentation (Karras et al. 2020, appendix B) with
every probability 1, and of DiffAugment's color ops (Zhao et al. 2020). Draw and apply are apart, so that
the very same transform reaches both latents of a distance.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
LOWPASS = tuple(c / math.sqrt(2) for c in SYM6)  # sums to 1
FILTER_TAPS = len(LOWPASS)
CENTROID = sum(i * c for i, c in enumerate(LOWPASS))
"""Where a filtered sample sits, in taps. Not the middle 5.5: sym6 is only nearly symmetric."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentParams:
    """One transform per sample. [B] tensors, or [B, 2] as (x, y); all on one device, fp32."""

    letters: str
    flip: Tensor  # 0 or 1
    quarter: Tensor  # 0..3 quarter turns
    integer_shift: Tensor  # [B, 2] whole positions
    scale: Tensor  # > 1 enlarges
    rotate_pre: Tensor  # radians
    stretch: Tensor  # x by s, y by 1/s
    rotate_post: Tensor  # radians
    shift: Tensor  # [B, 2] fraction of the size
    brightness: Tensor  # added
    contrast: Tensor  # factor
    saturation: Tensor  # factor
    center: Tensor  # [B, 2] of the cutout, fraction of the size
    cutout: float  # its side, fraction of the size


def sample_transforms(
    config: AugmentConfig,
    batch: int,
    size: Sequence[int],
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> AugmentParams:
    """Draw `batch` transforms for latents of `size` (h, w), distributions as in AugmentConfig.

    All numbers are drawn whatever the families, so a generator's state means the same transform of family
    b alone and of b among others. Drawn where the generator lives, then moved in two copies, no sync.
    """
    source = generator.device if generator is not None else device
    uniform = torch.rand(batch, 11, generator=generator, device=source).to(device, non_blocking=True)
    normal = torch.randn(batch, 4, generator=generator, device=source).to(device, non_blocking=True)
    wh = torch.stack([torch.full_like(uniform[:, 0], float(n)) for n in (size[1], size[0])], 1)
    signed = 2 * uniform - 1
    turn = math.radians(config.rotation)
    return AugmentParams(
        letters=config.letters,
        flip=(uniform[:, 0] * 2).floor() * config.flip,
        quarter=(uniform[:, 1] * 4).floor() * config.quarter_turns,
        integer_shift=(signed[:, 2:4] * config.integer_shift * wh).round(),
        scale=torch.exp2(normal[:, 0] * config.scale_std),
        rotate_pre=signed[:, 4] * turn,
        stretch=torch.exp2(normal[:, 1] * config.stretch_std),
        rotate_post=signed[:, 5] * turn,
        shift=normal[:, 2:4] * config.shift_std,
        brightness=signed[:, 6] * config.brightness,
        contrast=1 + signed[:, 7] * config.contrast,
        saturation=1 + signed[:, 8] * config.saturation,
        center=uniform[:, 9:11],
        cutout=config.cutout,
    )


def select_transforms(params: AugmentParams, rows: slice) -> AugmentParams:
    """The transforms of some of the samples."""
    found = {f.name: getattr(params, f.name) for f in fields(params)}
    changes: dict[str, Any] = {name: v[rows] for name, v in found.items() if isinstance(v, Tensor)}
    return replace(params, **changes)


def apply_transforms(x: Tensor, params: AugmentParams) -> Tensor:
    """Transform latents [B, C, h, w], sample i by params' row i. Returns fp32 of the same shape.

    Order: geometry (b and g as one resampling), brightness, contrast, saturation, cutout. Contrast uses
    each input's own mean. Runs outside autocast.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        if "g" in params.letters:
            x = _resample(x, inverse_affine(params, x.shape[2:]))
        elif "b" in params.letters:
            x = _blit(x, inverse_affine(params, x.shape[2:]))
        if "c" in params.letters:
            x = _color(x, params)
        if "o" in params.letters:
            x = _cutout(x, params)
        return x


def inverse_affine(params: AugmentParams, size: Sequence[int]) -> Tensor:
    """[B, 3, 3]: where in the input an output position lies; both about the center, in positions, (x, y).

    The transforms act in the order b, g; the inverse is the product of their inverses in that order.
    """
    one = torch.ones_like(params.flip)
    matrix = torch.eye(3, device=one.device).expand(len(one), 3, 3)
    if "b" in params.letters:
        matrix = _mul(matrix, _scaling(1 - 2 * params.flip, one))
        matrix = _mul(matrix, _rotation(params.quarter * (-math.pi / 2)))
        matrix = _mul(matrix, _translation(-params.integer_shift[:, 0], -params.integer_shift[:, 1]))
    if "g" in params.letters:
        matrix = _mul(matrix, _scaling(1 / params.scale, 1 / params.scale))
        matrix = _mul(matrix, _rotation(-params.rotate_pre))
        matrix = _mul(matrix, _scaling(1 / params.stretch, params.stretch))
        matrix = _mul(matrix, _rotation(-params.rotate_post))
        matrix = _mul(matrix, _translation(-params.shift[:, 0] * size[1], -params.shift[:, 1] * size[0]))
    return matrix


def _mul(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product without matmul: TF32 would round the coordinates to 10 bits."""
    return (a[:, :, :, None] * b[:, None, :, :]).sum(2)


def _rows(*entries: Tensor) -> Tensor:
    return torch.stack(entries, 1).reshape(-1, 3, 3)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _rows(x, zero, zero, zero, y, zero, zero, zero, one)


def _rotation(angle: Tensor) -> Tensor:
    zero, one, c, s = torch.zeros_like(angle), torch.ones_like(angle), angle.cos(), angle.sin()
    return _rows(c, -s, zero, s, c, zero, zero, zero, one)


def _translation(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _rows(one, zero, x, zero, one, y, zero, zero, one)


def _map(matrix: Tensor, ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
    """Image under `matrix` of the grid ys x xs: two tensors [B, len(ys), len(xs)], x then y."""
    m = matrix[:, :2, :, None, None]
    x, y = xs[None, None, :], ys[None, :, None]
    return m[:, 0, 0] * x + m[:, 0, 1] * y + m[:, 0, 2], m[:, 1, 0] * x + m[:, 1, 1] * y + m[:, 1, 2]


def _steps(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=like.dtype)


def _blit(x: Tensor, matrix: Tensor) -> Tensor:
    """Whole-position transforms need no low-pass: read each output from its input, mirrored at the edge."""
    height, width = x.shape[2:]
    my, mx = (height - 1) / 2, (width - 1) / 2
    u, v = _map(matrix, _steps(height, x) - my, _steps(width, x) - mx)
    grid = torch.stack([u / mx, v / my], -1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


def _resample(x: Tensor, matrix: Tensor) -> Tensor:
    """Mirror-pad, enlarge x2 by the sym6 low-pass, sample bilinearly, shrink x2 by the same low-pass.

    Enlarging and shrinking are fixed linear maps along each axis, so they are two small matrix products;
    the enlarged sample n sits at ((n - CENTROID) / 2 - pad) in input positions.
    """
    height, width = x.shape[2:]
    fine = _matrix(_enlarger, height, x) @ x @ _matrix(_enlarger, width, x).T
    ys = (_steps(2 * height + FILTER_TAPS - 2, x) - CENTROID - (height - 1)) / 2
    xs = (_steps(2 * width + FILTER_TAPS - 2, x) - CENTROID - (width - 1)) / 2
    u, v = _map(matrix, ys, xs)
    column = 2 * (u + (width - 1) / 2 + _padding(width)) + CENTROID
    row = 2 * (v + (height - 1) / 2 + _padding(height)) + CENTROID
    grid = torch.stack([2 * column / (fine.shape[3] - 1) - 1, 2 * row / (fine.shape[2] - 1) - 1], -1)
    moved = F.grid_sample(fine, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return _matrix(_shrinker, height, x) @ moved @ _matrix(_shrinker, width, x).T


def _padding(size: int) -> int:
    """One whole mirror image, and on tiny latents enough for both filters' reach."""
    return max(size - 1, FILTER_TAPS)


MatrixBuilder = Callable[[int, torch.device], Tensor]


def _matrix(make: MatrixBuilder, size: int, like: Tensor) -> Tensor:
    """make(size, device), kept. Not in a compiled graph, which holds its own constants, nor for a fake
    tensor, whose constants have no values."""
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return make(size, like.device)
    return _kept(make, size, like.device)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a cached inference tensor would break a later backward
def _kept(make: MatrixBuilder, size: int, device: torch.device) -> Tensor:
    return make(size, device)


def _enlarger(size: int, device: torch.device) -> Tensor:
    """[2 (size + 2 pad) + TAPS - 2, size]: mirror-pad, then upsample by 2 with gain 2. Made where it lives,
    by comparisons, so that nothing waits for a copy."""
    pad = _padding(size)
    padded = size + 2 * pad
    fine = torch.arange(2 * padded + FILTER_TAPS - 2, device=device)
    matrix = torch.zeros(len(fine), size, device=device)
    for tap, value in enumerate(LOWPASS):
        coarse = (fine - tap).div(2, rounding_mode="floor")
        inside = ((fine - tap) % 2 == 0) & (coarse >= 0) & (coarse < padded)
        source = size - 1 - ((coarse - pad) % (2 * size - 2) - (size - 1)).abs()
        matrix += 2 * value * (inside[:, None] & (source[:, None] == torch.arange(size, device=device)))
    return matrix


def _shrinker(size: int, device: torch.device) -> Tensor:
    """[size, 2 size + TAPS - 2]: the adjoint low-pass, every second sample. Undoes the enlarger exactly."""
    fine = torch.arange(2 * size + FILTER_TAPS - 2, device=device)
    offset = fine - 2 * torch.arange(size, device=device)[:, None]
    return torch.stack([value * (offset == tap) for tap, value in enumerate(LOWPASS)]).sum(0)


def _color(x: Tensor, params: AugmentParams) -> Tensor:
    x = x + params.brightness[:, None, None, None]
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * params.contrast[:, None, None, None] + mean
    mean = x.mean(1, keepdim=True)
    return (x - mean) * params.saturation[:, None, None, None] + mean


def _cutout(x: Tensor, params: AugmentParams) -> Tensor:
    height, width = x.shape[2:]
    xs = (torch.arange(width, device=x.device) + 0.5) / width
    ys = (torch.arange(height, device=x.device) + 0.5) / height
    inside_x = (xs - params.center[:, :1]).abs() < params.cutout / 2
    inside_y = (ys - params.center[:, 1:]).abs() < params.cutout / 2
    return x.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0.0)
