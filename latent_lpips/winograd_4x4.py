"""3x3 convolutions, and transposed ones, with 36 multiplications instead of 144 for each 4x4 block of
outputs, in fp32 on a CPU.

Winograd's F(4x4, 3x3) (Lavin and Gray 2016, section 4.2), from blocks of 6x6 inputs. The transform of a block
is a matrix product as well, of its 36 values with the Kronecker product of B^T and itself: one pass over
memory. Transformed filters take four times the memory of filters.

The rounding error is that of fp32, 3e-6 of the output instead of 1e-6. In bf16 it would be 2.7 %, so bf16
takes latent_lpips/winograd_2x2.py.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_lpips.winograd import Winograd

INPUT_TRANSFORM = (
    (4.0, 0.0, -5.0, 0.0, 1.0, 0.0),
    (0.0, -4.0, -4.0, 1.0, 1.0, 0.0),
    (0.0, 4.0, -4.0, -1.0, 1.0, 0.0),
    (0.0, -2.0, -1.0, 2.0, 1.0, 0.0),
    (0.0, 2.0, -1.0, -2.0, 1.0, 0.0),
    (0.0, 4.0, 0.0, -5.0, 0.0, 1.0),
)
"""B^T."""
OUTPUT_TRANSFORM = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    (0.0, 1.0, -1.0, 2.0, -2.0, 0.0),
    (0.0, 1.0, 1.0, 4.0, 4.0, 0.0),
    (0.0, 1.0, -1.0, 8.0, -8.0, 1.0),
)
"""A^T."""


class Winograd4x4(Winograd):
    """Blocks of 4x4 outputs."""

    FILTER_TRANSFORM = (
        (1 / 4, 0.0, 0.0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0.0, 0.0, 1.0),
    )
    PRODUCTS = 36
    MIN_CHANNELS = 128
    MAX_BLOCKS = 256  # with 512 channels, transformed inputs and outputs then take 38 MB

    def conv3x3(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # Blocks of inputs, as views.
        inputs = _pad(x, 1)  # [B, 4r + 2, 4c + 2, C]
        blocks = inputs.unfold(1, 6, 4).unfold(2, 6, 4)  # [B, r, c, C, 6, 6]
        rows, columns = blocks.shape[1:3]
        result = x.new_empty(batch, rows, 4, columns, 4, self.transformed.shape[2])
        to_product, to_output = _kronecker(INPUT_TRANSFORM, x.dtype), _kronecker(OUTPUT_TRANSFORM, x.dtype)
        # Transform, multiply, and transform back some of the blocks.
        for part in self.parts(batch, rows, columns):
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
        # Every step of `conv3x3` is linear: here are their transposes, in the opposite order.
        batch, channels, height, width = x.shape
        outputs = _pad(x, 0)
        blocks = outputs.unflatten(2, (-1, 4)).unflatten(1, (-1, 4))  # [B, r, 4, c, 4, K]
        rows, columns = blocks.shape[1], blocks.shape[3]
        result = x.new_zeros(batch, rows + 1, 4, columns + 1, 4, self.transformed.shape[1])
        to_product, to_input = _kronecker(OUTPUT_TRANSFORM, x.dtype).T, _kronecker(INPUT_TRANSFORM, x.dtype).T
        weights = self.transformed.transpose(1, 2)
        # Transform, multiply, and transform back some of the blocks.
        for images, band in self.parts(batch, rows, columns):
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


def _kronecker(matrix: tuple[tuple[float, ...], ...], dtype: torch.dtype) -> Tensor:
    """The transform of both axes of a block, whose values are in row-major order."""
    one_axis = torch.tensor(matrix, dtype=dtype)
    return torch.kron(one_axis, one_axis)


def _pad(x: Tensor, border: int) -> Tensor:
    """Pad [B, C, h, w] to multiples of four and by a border: [B, 4r + 2 border, 4c + 2 border, C]."""
    below, right = (-size % 4 + border for size in x.shape[2:])
    return F.pad(x, (border, right, border, below)).permute(0, 2, 3, 1).contiguous()
