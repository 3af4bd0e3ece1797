"""Training targets without human labels: words of captions as classes, and synthetic judgments."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import Stream, generator
from d2g.diffusion.latents import from_uint8

IMAGES_PER_GENERATOR = 64
"""Images that share one generator. It is fixed, so results do not depend on a batch size."""
JPEG_BLOCK = 8
"""Side of JPEG's transform blocks in pixels."""


def caption_targets(
    captions: Sequence[str], rarest: float = 0.01, commonest: float = 0.9
) -> tuple[Tensor, list[str]]:
    """Return multi-hot targets [N, K] in fp32 and the K words, sorted, whose frequency is in the given range.

    Words in nearly all captions ("a", "photo") carry no information, and rare words cannot be learned. Raises
    UserError if no word is in the range `rarest` to `commonest`.
    """
    bags = [set(re.findall(r"\w+", caption.lower())) for caption in captions]
    counts = Counter(word for bag in bags for word in bag)
    # Keep words that occur in some captions, but not in nearly all.
    low, high = rarest * len(bags), commonest * len(bags)
    words = sorted(word for word, count in counts.items() if low <= count <= high)
    if not words:
        raise UserError(
            f"{len(captions)} captions have no word that occurs in {rarest:.0%} to {commonest:.0%} of them, "
            "expected at least one; give more varied captions"
        )
    return torch.tensor([[float(word in bag) for word in words] for bag in bags]), words


@dataclass(frozen=True, kw_only=True, slots=True)
class Triplets:
    """Two-alternative judgments in latent space; ref, p0 and p1 are scaled latents [N, C, h, w]."""

    ref: Tensor
    p0: Tensor
    p1: Tensor
    judge: Tensor
    """[N]: the share of people who judge p1 closer to ref (LPIPS' convention); synthetic ones are 0 or 1."""


def synthetic_triplets(
    images: Tensor, encode: Callable[[Tensor], Tensor], seed: int, progress: Progress = quiet
) -> Triplets:
    """Generate judgments with a known answer: both alternatives have the same distortion at two strengths.

    They replace human judgments where there are none. `images` are uint8 [N, 3, H, W]; `encode` maps pixels
    [B, 3, H, W] in [-1, 1] to scaled latents. Row i depends on (seed, i, the images of its chunk of 64).
    """
    parts: dict[str, list[Tensor]] = {"ref": [], "p0": [], "p1": [], "judge": []}
    for start in range(0, len(images), IMAGES_PER_GENERATOR):
        pixels = from_uint8(images[start : start + IMAGES_PER_GENERATOR])
        rng = generator(seed, Stream.SYNTHETIC_TRIPLETS, start)
        # Every image gets one kind of distortion, at two strengths.
        strengths = _strengths(len(pixels), rng)
        kinds = torch.randint(len(DISTORTIONS), (len(pixels),), generator=rng)
        parts["judge"].append((strengths[1] < strengths[0]).float())
        parts["ref"].append(encode(pixels).cpu())
        for name, strength in zip(("p0", "p1"), strengths, strict=True):
            parts[name].append(encode(_distort(pixels, kinds, strength, rng)).cpu())
        progress("triplets", min(start + IMAGES_PER_GENERATOR, len(images)), len(images))
    return Triplets(**{name: torch.cat(rows) for name, rows in parts.items()})


def _strengths(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample two strengths in (0, 1], at least a factor 1.3 apart, so that the answer is clear."""
    weak = 0.05 + 0.65 * torch.rand(count, generator=rng)
    strong = weak * (1.3 + torch.rand(count, generator=rng) * (1 / weak - 1.3).clamp(min=0))
    swap = torch.rand(count, generator=rng) < 0.5
    return torch.where(swap, weak, strong), torch.where(swap, strong, weak)


def _distort(pixels: Tensor, kinds: Tensor, strength: Tensor, rng: torch.Generator) -> Tensor:
    result = pixels.clone()
    for kind, distortion in enumerate(DISTORTIONS):
        rows = (kinds == kind).nonzero()[:, 0]
        if len(rows):
            result[rows] = distortion(pixels[rows], strength[rows, None, None, None], rng)
    return result.clamp(-1, 1)


def _blur(x: Tensor, strength: Tensor, rng: torch.Generator) -> Tensor:
    """Gaussian blur, sigma up to 1/16 of the size, as one matrix per sample and axis."""

    def kernel(size: int) -> Tensor:
        at = torch.arange(size, dtype=x.dtype)
        sigma = 0.35 + strength[:, 0] * size / 16  # less than 0.35 pixels would change nothing
        return torch.softmax(-(at[:, None] - at).square() / (2 * sigma.square()), dim=2)[:, None]

    blurred: Tensor = kernel(x.shape[2]) @ x @ kernel(x.shape[3]).transpose(2, 3)
    return blurred


def _noise(x: Tensor, strength: Tensor, rng: torch.Generator) -> Tensor:
    return x + 0.5 * strength * torch.randn(x.shape, generator=rng)


def _tone(x: Tensor, strength: Tensor, rng: torch.Generator) -> Tensor:
    """Lower the contrast and shift the brightness up or down."""
    sign = torch.randint(2, strength.shape, generator=rng) * 2 - 1
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (1 - 0.6 * strength) + mean + 0.5 * strength * sign


def _warp(x: Tensor, strength: Tensor, rng: torch.Generator) -> Tensor:
    """Warp by a smooth displacement field with translation, up to 7.5 % of the size (root mean square)."""
    bend, shift = (torch.rand(len(x), 2, n, n, generator=rng) - 0.5 for n in (4, 1))
    coarse = bend + shift
    field = F.interpolate(coarse, x.shape[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    field = field / field.square().mean((1, 2, 3), keepdim=True).sqrt()
    identity = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(
        x, identity + 0.15 * strength * field, padding_mode="reflection", align_corners=False
    )


def _blocks(x: Tensor, strength: Tensor, rng: torch.Generator) -> Tensor:
    """JPEG-like blocks: quantize an 8x8 cosine transform with steps that grow with frequency."""
    # The orthonormal cosine transform of one block.
    at = torch.arange(JPEG_BLOCK, dtype=x.dtype)
    dct = torch.cos(torch.pi * (2 * at + 1) * at[:, None] / (2 * JPEG_BLOCK)) * (2 / JPEG_BLOCK) ** 0.5
    dct[0] /= 2**0.5
    # Pad to whole blocks, and view the image as tiles.
    height, width = x.shape[2:]
    padded = F.pad(x, (0, -width % JPEG_BLOCK, 0, -height % JPEG_BLOCK), mode="replicate")
    tiles = padded.unfold(2, JPEG_BLOCK, JPEG_BLOCK).unfold(
        3, JPEG_BLOCK, JPEG_BLOCK
    )  # [B, 3, rows, columns, 8, 8]
    # Quantize the cosine coefficients, and transform back.
    step = 0.4 * strength[..., None, None] * (1 + at[:, None] + at)
    tiles = dct.T @ ((dct @ tiles @ dct.T / step).round() * step) @ dct
    result: Tensor = tiles.transpose(3, 4).reshape(padded.shape)[:, :, :height, :width]
    return result


DISTORTIONS = (_blur, _noise, _tone, _warp, _blocks)
