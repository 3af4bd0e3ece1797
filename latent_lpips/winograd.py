"""What Winograd's convolutions have in common: a 3x3 convolution with transformed filters."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor


class Winograd(ABC):
    """A 3x3 convolution, padded by one, with transformed filters [PRODUCTS, C, K], in their type.

    Winograd's minimal filtering (Lavin and Gray 2016): blocks of inputs, which overlap by two, and the
    filters are transformed, multiplied, and transformed back, Y = A^T [(G w G^T) * (B^T d B)] A. The products
    of all blocks are PRODUCTS matrix products over channels.
    """

    FILTER_TRANSFORM: ClassVar[tuple[tuple[float, ...], ...]]
    """G."""
    PRODUCTS: ClassVar[int]
    """Transformed values of a filter."""
    MIN_CHANNELS: ClassVar[int]
    """Fewer channels leave too little work per transformed value."""
    MAX_BLOCKS: ClassVar[int]
    """Blocks per matrix product."""

    def __init__(self, transformed: Tensor) -> None:
        self.transformed = transformed

    @classmethod
    def transform(cls, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Transform weights [K, C, 3, 3] to [PRODUCTS, C, K] in float64, and round once to `dtype`."""
        g = torch.tensor(cls.FILTER_TRANSFORM, dtype=torch.float64)
        transformed = torch.einsum("ia,kcab,jb->ijck", g, weight.double(), g)
        return transformed.flatten(0, 1).to(dtype).contiguous()

    @abstractmethod
    def conv3x3(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return F.conv2d(x, weight, bias, padding=1) of x [B, C, h, w] and bias [K]: [B, K, h, w],
        channels-last."""

    @abstractmethod
    def conv3x3_transposed(self, x: Tensor) -> Tensor:
        """Return F.conv_transpose2d(x, weight, padding=1) of x [B, K, h, w]: [B, C, h, w], channels-last."""

    def parts(self, batch: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
        """Images and rows of blocks, as many as have MAX_BLOCKS blocks: some images, or some rows of one."""
        images, step = max(1, self.MAX_BLOCKS // (rows * columns)), max(1, self.MAX_BLOCKS // columns)
        for image in range(0, batch, images):
            for row in range(0, rows, step):
                yield slice(image, image + images), slice(row, min(row + step, rows))
