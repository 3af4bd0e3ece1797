"""3x3 convolutions, and transposed ones, with 36 multiplications instead of 144 for each 4x4 block of
outputs, in fp32 on a CPU.

Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray 2016, section 4.2): Y = A^T [(G w G^T) * (B^T d B)] A
for blocks d of 6x6 inputs, which overlap by two. The transforms of blocks are matrix products as well: of the
36 values of a block with B x B (Kronecker), which is one pass over memory. Transformed weights take four
times the memory of weights.

The rounding error is that of fp32, 3e-6 of the output instead of 1e-6. In bf16 it would be too large:
latent_lpips/winograd_2x2.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

INPUT_TRANSFORM = (
    (4.0, 0.0, -5.0, 0.0, 1.0, 0.0),
    (0.0, -4.0, -4.0, 1.0, 1.0, 0.0),
    (0.0, 4.0, -4.0, -1.0, 1.0, 0.0),
    (0.0, -2.0, -1.0, 2.0, 1.0, 0.0),
    (0.0, 2.0, -1.0, -2.0, 1.0, 0.0),
    (0.0, 4.0, 0.0, -5.0, 0.0, 1.0),
)
"""B^T."""
FILTER_TRANSFORM = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)
"""G."""
OUTPUT_TRANSFORM = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    (0.0, 1.0, -1.0, 2.0, -2.0, 0.0),
    (0.0, 1.0, 1.0, 4.0, 4.0, 0.0),
    (0.0, 1.0, -1.0, 8.0, -8.0, 1.0),
)
"""A^T."""


class Winograd4x4:
    """A 3x3 convolution with transformed weights [36, C, K], in their type."""

    PRODUCTS = 36
    """Transformed values of a filter."""
    MIN_CHANNELS = 128
    """Fewer channels leave too little work per transformed value."""
    MAX_BLOCKS = 256
    """Blocks per matrix product: with 512 channels, transformed inputs and outputs then take 38 MB."""

    def __init__(self, transformed: Tensor) -> None:
        self.transformed = transformed

    @staticmethod
    def transform(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Transform weights [K, C, 3, 3] to [36, C, K] in float64, and round once to `dtype`."""
        g = torch.tensor(FILTER_TRANSFORM, dtype=torch.float64)
        transformed = torch.einsum("ia,kcab,jb->ijck", g, weight.double(), g)
        return transformed.flatten(0, 1).to(dtype).contiguous()

    def conv3x3(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return F.conv2d(x, weight, bias, padding=1) of x [B, C, h, w] and bias [K]: [B, K, h, w],
        channels-last."""
        batch, channels, height, width = x.shape
        inputs = _pad(x, 1)  # [B, 4r + 2, 4c + 2, C]
        blocks = inputs.unfold(1, 6, 4).unfold(2, 6, 4)  # [B, r, c, C, 6, 6]
        rows, columns = blocks.shape[1:3]
        result = x.new_empty(batch, rows, 4, columns, 4, self.transformed.shape[2])
        to_product, to_output = _kronecker(INPUT_TRANSFORM, x.dtype), _kronecker(OUTPUT_TRANSFORM, x.dtype)
        for part in self._parts(batch, rows, columns):
            values = blocks[part].permute(4, 5, 0, 1, 2, 3)
            products = torch.bmm(
                (to_product @ values.reshape(self.PRODUCTS, -1)).view(self.PRODUCTS, -1, channels),
                self.transformed,
            )
            outputs = (to_output @ products.view(self.PRODUCTS, -1)).view(4, 4, *values.shape[2:5], -1)
            result[part] = outputs.permute(2, 3, 0, 4, 1, 5)
        result += bias
        image = result.view(batch, 4 * rows, 4 * columns, -1)[:, :height, :width]
        return image.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def conv3x3_transposed(self, x: Tensor) -> Tensor:
        """Return F.conv_transpose2d(x, weight, padding=1) of x [B, K, h, w]: [B, C, h, w], channels-last.

        Every step of `conv3x3` is linear, so this takes their transposes in the opposite order.
        """
        batch, channels, height, width = x.shape
        outputs = _pad(x, 0)
        blocks = outputs.unflatten(2, (-1, 4)).unflatten(1, (-1, 4))  # [B, r, 4, c, 4, K]
        rows, columns = blocks.shape[1], blocks.shape[3]
        result = x.new_zeros(batch, rows + 1, 4, columns + 1, 4, self.transformed.shape[1])
        to_product, to_input = _kronecker(OUTPUT_TRANSFORM, x.dtype).T, _kronecker(INPUT_TRANSFORM, x.dtype).T
        weights = self.transformed.transpose(1, 2)
        for images, band in self._parts(batch, rows, columns):
            values = blocks[images, band].permute(2, 4, 0, 1, 3, 5)
            products = torch.bmm(
                (to_product @ values.reshape(16, -1)).view(self.PRODUCTS, -1, channels), weights
            )
            inputs = (to_input @ products.view(self.PRODUCTS, -1)).view(6, 6, *values.shape[2:5], -1)
            inputs = inputs.permute(2, 3, 0, 4, 1, 5)  # [b, r, 6, c, 6, C]
            # Add the blocks, whose last two rows and columns are the first two of their neighbors.
            below = slice(band.start + 1, band.stop + 1)
            for row, to_row, from_row in ((band, slice(4), slice(4)), (below, slice(2), slice(4, 6))):
                part, addend = result[images, row, to_row], inputs[:, :, from_row]
                part[:, :, :, :-1] += addend[..., :4, :]
                part[:, :, :, 1:, :2] += addend[..., 4:, :]
        image = result.view(batch, 4 * rows + 4, 4 * columns + 4, -1)[:, 1 : height + 1, 1 : width + 1]
        return image.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def _parts(self, batch: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
        """Images and rows of blocks, as many as have MAX_BLOCKS blocks: some images, or some rows of one."""
        blocks = self.MAX_BLOCKS
        images, step = max(1, blocks // (rows * columns)), max(1, min(rows, blocks // columns))
        for image in range(0, batch, images):
            for row in range(0, rows, step):
                yield slice(image, image + images), slice(row, min(row + step, rows))


def _kronecker(matrix: tuple[tuple[float, ...], ...], dtype: torch.dtype) -> Tensor:
    """The transform of both axes of a block, whose values are in row-major order."""
    one_axis = torch.tensor(matrix, dtype=dtype)
    return torch.kron(one_axis, one_axis)


def _pad(x: Tensor, border: int) -> Tensor:
    """Pad [B, C, h, w] to multiples of four and by a border: [B, 4r + 2 border, 4c + 2 border, C]."""
    below, right = (-size % 4 + border for size in x.shape[2:])
    return F.pad(x, (border, right, border, below)).permute(0, 2, 3, 1).contiguous()
