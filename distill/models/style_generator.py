"""What the generators with styles share: the split of their noise, the condition, and the tracked mean of the
mapping network.
"""

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
"""Width of the embedding of a class, where the condition is no text (ours)."""
SMALLEST_BLOCK = 4
"""Smallest height and width of the first block (StyleGAN)."""
TRACKING_BETA = 0.998
"""Decay per step of the tracked mean of the mapping network (ours)."""


def block_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes of the blocks of a generator of h x w, from the first: halves of it down to SMALLEST_BLOCK."""
    sizes = [size]
    while all(side % 2 == 0 and side // 2 >= SMALLEST_BLOCK for side in sizes[0]):
        sizes.insert(0, (sizes[0][0] // 2, sizes[0][1] // 2))
    return sizes


def channels_at(size: tuple[int, int], base: int, most: int) -> int:
    """Channels of a block: base / size, at most `most` (StyleGAN2; base and most: StyleGAN-T, table 4)."""
    return max(1, min(base // max(size), most))


@dataclass(frozen=True, eq=False)
class BlockStyle:
    """What one block draws B rows by. Blocks of one image may have theirs from different inputs."""

    w: Tensor
    """[B, D]: the styles are affine maps of it."""
    noise: Tensor
    """Spatial noise [B, convolutions, h, w]."""
    tokens: Tensor | None = None
    """Tokens of the text [B, L, D'], for blocks with attention to them."""
    mask: Tensor | None = None
    """[B, L]: 0 for padding."""

    def rows(self, rows: Tensor) -> "BlockStyle":
        """The style of some rows, int64 [n], repeats allowed."""
        picked = [None if t is None else t[rows] for t in (self.w, self.noise, self.tokens, self.mask)]
        return BlockStyle(*picked)  # type: ignore[arg-type]


class StyleGenerator(nn.Module, ABC):
    """Base of generators (noise [B, N], condition, ...) -> image [B, c, h, w].

    They read noise and condition into styles, one for each block, and draw with these. The noise of a row is
    z, then the spatial noise of the convolutions from the first block on, so that a generator that has grown
    sees the same numbers first. `blocks` are its shard units.
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
        """noise [B, N]; the condition's vector [B, D], classes [B], or None; tokens [B, L, D'] with their
        mask; an upsampler's small latents -> image [B, c, h, w]. Each network reads what it needs of them."""
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
        """The style of each block; inputs as in `forward`."""

    @abstractmethod
    def draw(self, styles: Sequence[BlockStyle], prior: Tensor | None = None) -> Tensor:
        """Styles of the blocks -> image [B, c, h, w]."""

    @property
    def block_sizes(self) -> list[tuple[int, int]]:
        """Height and width of what each block draws."""
        return [(height, width) for _, height, width in self.noise_sizes]

    def shard_units(self) -> list[nn.Module]:
        """The blocks that FSDP2 gathers at once."""
        return list(self.blocks)

    @property
    def noise_sizes(self) -> list[tuple[int, int, int]]:
        """Shapes (convolutions, h, w) of the spatial noise of the blocks."""
        return noise_sizes(list(self.blocks), self.first_size)

    @property
    def noise_width(self) -> int:
        """Numbers of noise that a row takes: z and the spatial noise."""
        return self.z_dim + sum(map(prod, self.noise_sizes))

    def split(self, noise: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Noise [B, N] -> z [B, z_dim] and the spatial noise of each block."""
        z, spatial = noise.split([self.z_dim, noise.shape[1] - self.z_dim], dim=1)
        return z, split_noise(spatial, self.noise_sizes)

    def embed(self, condition: Tensor | None, like: Tensor) -> Tensor:
        """The condition's vector with mean square 1: of a text [B, D], of class numbers [B], or of none.
        [B, D]; [B, 0] without a condition."""
        if condition is None or not self.condition_width:
            return like[:, :0]
        vector = condition if self.classes is None else self.classes(condition)
        return normalize_second_moment(vector).to(like.dtype)

    def mapped(self, x: Tensor, psi: float) -> Tensor:
        """f(x) [B, D], moved toward the tracked mean: mean + psi (f(x) - mean) (StyleGAN, section 3.4)."""
        f: Tensor = self.mapping(x)
        if self._sums is not None and self.training:
            with torch.no_grad():
                self._sums += torch.cat(
                    [f.detach().float().sum(0), torch.full_like(f[:1, 0].float(), len(f))]
                )
        return f if psi == 1 else torch.lerp(self.mapping.mean.to(f.dtype), f, psi)

    def begin_step(self) -> None:
        """Forget what earlier passes added to the sums of the mean: previews, and steps without an update."""
        mean = self.mapping.mean
        self._sums = torch.zeros(len(mean) + 1, device=mean.device)

    def track_mean(self, steps: int) -> None:
        """Move the tracked mean toward f's mean over this step's rows on all ranks, after `steps` steps.
        Call it on every rank, after the forward passes."""
        assert self._sums is not None, "begin_step must run first"
        sums = process_group.sum_in_order(self._sums)
        beta = warmed_up_beta(TRACKING_BETA, steps)
        self.mapping.mean.lerp_(sums[:-1] / sums[-1], 1 - beta)
        self._sums = None


def synthesize(blocks: nn.ModuleList, x: Tensor, styles: Sequence[BlockStyle]) -> Tensor:
    """The image of a synthesis network's blocks from their input x [B, C, h, w], each with its style."""
    image: Tensor | None = None
    for block, style in zip(blocks, styles, strict=True):
        x, image = block(x, image, style.w, style.noise, style.tokens, style.mask)
    assert image is not None
    return image
