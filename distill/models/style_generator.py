"""Base of style-based generators: noise, condition, styles, and the tracked mean of the mapping network."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from d2g.core.distributed import process_group
from distill.models.condition_vector import ConditionShape
from distill.models.ema import warmed_up_beta
from distill.models.style_layers import (
    MappingNetwork,
    noise_sizes,
    normalize_second_moment,
    split_noise,
)

CLASS_WIDTH = 512
"""Width of class embeddings (ours)."""
SMALLEST_BLOCK = 4
"""Smallest height and width of the first block (StyleGAN)."""
TRACKING_BETA = 0.998
"""Decay per step of the tracked mean of the mapping network (ours)."""


def block_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes (h, w) of a generator's blocks, smallest first: `size` halved repeatedly, to SMALLEST_BLOCK."""
    sizes = [size]
    while all(side % 2 == 0 and side // 2 >= SMALLEST_BLOCK for side in sizes[0]):
        sizes.insert(0, (sizes[0][0] // 2, sizes[0][1] // 2))
    return sizes


def channels_at(size: tuple[int, int], base: int, maximum: int) -> int:
    """Channels of a block: base / larger side, at most `maximum` (StyleGAN2; StyleGAN-T, table 4)."""
    return max(1, min(base // max(size), maximum))


@dataclass(frozen=True, eq=False)
class BlockStyle:
    """Inputs of one block for B rows. In style mixing, the blocks of an image have different ones."""

    w: Tensor
    """[B, D]: the style of each layer is an affine map of it."""
    noise: Tensor
    """Spatial noise [B, convolutions, h, w]."""
    tokens: Tensor | None = None
    """Tokens of the text [B, L, D'], for blocks with attention to them."""
    mask: Tensor | None = None
    """Mask of the tokens [B, L], 0 for padding."""

    def rows(self, rows: Tensor) -> "BlockStyle":
        """Select rows by their numbers, int64 [n], with repetition."""
        selected = [None if t is None else t[rows] for t in (self.w, self.noise, self.tokens, self.mask)]
        return BlockStyle(*selected)  # type: ignore[arg-type]


class StyleGenerator(nn.Module, ABC):
    """Base of generators: (noise [B, N], condition, ...) -> image [B, c, h, w].

    A generator computes a style for each block from noise and condition, and draws the image with them. A
    row's noise is z, followed by the spatial noise of the convolutions from the first block on. A generator
    that has grown therefore uses the same numbers for its first blocks. `blocks` are the shard units.
    """

    mapping: MappingNetwork
    blocks: nn.ModuleList
    first_size: tuple[int, int]
    """Size of the input of the first block."""

    def __init__(self, z_dim: int, shape: ConditionShape) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.classes = nn.Embedding(shape.classes, CLASS_WIDTH) if shape.classes else None
        self.condition_width = shape.text_width or (CLASS_WIDTH if shape.classes else 0)
        self._sums: Tensor | None = None

    def forward(
        self,
        noise: Tensor,
        condition: Tensor | None,
        tokens: Tensor | None,
        mask: Tensor | None,
        prior: Tensor | None,
        psi: float,
    ) -> Tensor:
        """Generate an image [B, c, h, w].

        noise: [B, N]. condition: a vector [B, D] or class labels [B]. tokens: [B, L, D'], with mask [B, L].
        prior: an upsampler's small latents [B, c, h', w']. psi: truncation in [0, 1], 1 for none. A subclass
        uses the inputs that it needs; the others may be None.
        """
        return self.draw(self.styles(noise, condition, tokens, mask, psi), prior)

    @abstractmethod
    def styles(
        self,
        noise: Tensor,
        condition: Tensor | None,
        tokens: Tensor | None,
        mask: Tensor | None,
        psi: float,
    ) -> list[BlockStyle]:
        """Compute the style of each block; inputs as in `forward`."""

    @abstractmethod
    def draw(self, styles: Sequence[BlockStyle], prior: Tensor | None = None) -> Tensor:
        """Generate an image [B, c, h, w] from the style of each block."""

    @property
    def block_sizes(self) -> list[tuple[int, int]]:
        """Height and width of each block's output."""
        return [(height, width) for _, height, width in self.noise_sizes]

    def shard_units(self) -> list[nn.Module]:
        """The blocks that FSDP2 gathers one at a time."""
        return list(self.blocks)

    @property
    def noise_sizes(self) -> list[tuple[int, int, int]]:
        """Shapes (convolutions, h, w) of the spatial noise of the blocks."""
        return noise_sizes(list(self.blocks), self.first_size)

    @property
    def noise_width(self) -> int:
        """N, the length of a row's noise: z and the spatial noise."""
        return self.z_dim + sum(map(prod, self.noise_sizes))

    def split(self, noise: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Split noise [B, N] into z [B, z_dim] and spatial noise [B, convolutions, h, w] of each block."""
        z, spatial = noise.split([self.z_dim, noise.shape[1] - self.z_dim], dim=1)
        return z, split_noise(spatial, self.noise_sizes)

    def embed(self, condition: Tensor | None, like: Tensor) -> Tensor:
        """Embed a text vector [B, D'] or class labels [B]: [B, D] with mean square 1, in the dtype of `like`.

        Without a condition the result is [B, 0].
        """
        if condition is None or not self.condition_width:
            return like[:, :0]
        vector = condition if self.classes is None else self.classes(condition)
        return normalize_second_moment(vector).to(like.dtype)

    def map_truncated(self, x: Tensor, psi: float) -> Tensor:
        """Apply the mapping network f to x [B, D'], with truncation: mean + psi (f(x) - mean), [B, D].

        `mean` is the tracked mean of f (StyleGAN, section 3.4).
        """
        w: Tensor = self.mapping(x)
        # In a training step, add the rows and their number to the sums of the mean.
        if self._sums is not None and self.training:
            with torch.no_grad():
                count = torch.full_like(w[:1, 0].float(), len(w))
                self._sums += torch.cat([w.detach().float().sum(0), count])
        return w if psi == 1 else torch.lerp(self.mapping.mean.to(w.dtype), w, psi)

    def begin_step(self) -> None:
        """Reset the sums of the mean, to which previews and steps without an update may have added."""
        mean = self.mapping.mean
        self._sums = torch.zeros(len(mean) + 1, device=mean.device)

    def track_mean(self, steps: int) -> None:
        """Move the tracked mean toward the mean of f over this step's rows on all ranks.

        steps: earlier steps of the run. Call it on every rank, after the forward passes.
        """
        assert self._sums is not None, "begin_step must run first"
        sums = process_group.sum_in_order(self._sums)
        beta = warmed_up_beta(TRACKING_BETA, steps)
        self.mapping.mean.lerp_(sums[:-1] / sums[-1], 1 - beta)
        self._sums = None


def synthesize(blocks: nn.ModuleList, x: Tensor, styles: Sequence[BlockStyle]) -> Tensor:
    """Run the blocks of a synthesis network on x [B, C, h, w], each with its style: image [B, c, H, W]."""
    image: Tensor | None = None
    for block, style in zip(blocks, styles, strict=True):
        x, image = block(x, image, style.w, style.noise, style.tokens, style.mask)
    assert image is not None
    return image
