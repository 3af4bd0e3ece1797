"""3x3 convolutions, and transposed ones, with 36 multiplications instead of 144 for each 4x4 block of
outputs, in fp32 on a CPU.

Winograd's F(4x4, 3x3) (Lavin and Gray 2016, section 4.2), from blocks of 6x6 inputs. The transforms of blocks
are matrix products as well. Transformed filters take four times the memory of filters.

The rounding error is that of fp32, 3e-6 of the output instead of 1e-6. In bf16 it would be 2.7 %, so bf16
takes latent_lpips/winograd_2x2.py.
"""

import math

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


ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
)
"""Whether oneDNN multiplies matrices. `torch.bmm` takes MKL, which uses no AVX-512 on CPUs of AMD."""


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
    MAX_BLOCKS = 128  # with 512 channels, each of two buffers then takes 9 MB

    def conv3x3(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # Blocks of inputs, as views.
        inputs = _pad(x, 1)  # [B, 4r + 2, 4c + 2, C]
        blocks = inputs.unfold(1, 6, 4).unfold(2, 6, 4).permute(0, 1, 2, 4, 5, 3)  # [B, r, c, 6, 6, C]
        rows, columns = blocks.shape[1:3]
        result = x.new_empty(batch, rows, 4, columns, 4, self.transformed.shape[2])
        to_product, to_output = x.new_tensor(INPUT_TRANSFORM), x.new_tensor(OUTPUT_TRANSFORM)
        buffers = self._buffers(x, columns)
        # Transform, multiply, and transform back some of the blocks.
        for part in self.parts(batch, rows, columns):
            values = _both_axes(to_product, blocks[part].permute(3, 4, 0, 1, 2, 5), buffers)
            products = self._multiply(values.view(self.PRODUCTS, -1, channels), self.transformed.mT, buffers)
            outputs = _both_axes(to_output, products.view(6, 6, *values.shape[2:5], -1), buffers)
            result[part] = outputs.permute(2, 3, 0, 4, 1, 5)
        result += bias
        image = result.view(batch, 4 * rows, 4 * columns, -1)[:, :height, :width]
        return image.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def conv3x3_transposed(self, x: Tensor) -> Tensor:
        # Every step of `conv3x3` is linear: here are their transposes, in the opposite order.
        batch, channels, height, width = x.shape
        blocks = _pad(x, 0).unflatten(2, (-1, 4)).unflatten(1, (-1, 4))  # [B, r, 4, c, 4, K]
        rows, columns = blocks.shape[1], blocks.shape[3]
        result = x.new_zeros(batch, rows + 1, 4, columns + 1, 4, self.transformed.shape[1])
        to_product, to_input = x.new_tensor(OUTPUT_TRANSFORM).T, x.new_tensor(INPUT_TRANSFORM).T
        buffers = self._buffers(x, columns)
        # Transform, multiply, and transform back some of the blocks.
        for images, band in self.parts(batch, rows, columns):
            values = _both_axes(to_product, blocks[images, band].permute(2, 4, 0, 1, 3, 5), buffers)
            products = self._multiply(values.view(self.PRODUCTS, -1, channels), self.transformed, buffers)
            inputs = _both_axes(to_input, products.view(6, 6, *values.shape[2:5], -1), buffers)
            inputs = inputs.permute(2, 3, 0, 4, 1, 5)  # [b, r, 6, c, 6, C]
            # Add the blocks, whose last two rows and columns are the first two of their neighbors.
            below = slice(band.start + 1, band.stop + 1)
            for row, to_row, from_row in ((band, slice(4), slice(4)), (below, slice(2), slice(4, 6))):
                part, addend = result[images, row, to_row], inputs[:, :, from_row]
                part[:, :, :, :-1] += addend[..., :4, :]
                part[:, :, :, 1:, :2] += addend[..., 4:, :]
        image = result.view(batch, 4 * rows + 4, 4 * columns + 4, -1)[:, 1 : height + 1, 1 : width + 1]
        return image.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def _buffers(self, x: Tensor, columns: int) -> "Buffers":
        blocks = max(self.MAX_BLOCKS, columns)
        return Buffers(x, self.PRODUCTS * blocks * max(self.transformed.shape[1:]))

    def _multiply(self, values: Tensor, weights: Tensor, buffers: "Buffers") -> Tensor:
        """Multiply values [36, n, in] by weights [36, out, in]: [36, n, out]."""
        products = buffers.next(*values.shape[:2], weights.shape[1])
        if not ONEDNN or values.dtype != torch.float32:
            torch.bmm(values, weights.mT, out=products)
            return products
        for product, value, weight in zip(products, values, weights, strict=True):
            product.copy_(torch.ops.mkldnn._linear_pointwise(value, weight, None, "none", [], ""))
        return products


class Buffers:
    """Two buffers of `size` values, used in turns. New memory for each part of a convolution takes time."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.memory: list[Tensor] = list(like.new_empty(2, size))

    def next(self, *shape: int) -> Tensor:
        """Return the buffer that was not returned last. Its values are undefined."""
        self.memory.reverse()
        return self.memory[0][: math.prod(shape)].view(shape)


def _both_axes(matrix: Tensor, blocks: Tensor, buffers: Buffers) -> Tensor:
    """Multiply both axes of blocks [k, k, ...] by a matrix [m, k]: [m, m, ...]."""
    (m, k), rest = matrix.shape, blocks.shape[2:]
    if not blocks.is_contiguous():
        blocks = buffers.next(*blocks.shape).copy_(blocks)
    # Multiply the first axis, then the second.
    half, whole = buffers.next(m, k * rest.numel()), buffers.next(m, m, rest.numel())
    torch.mm(matrix, blocks.view(k, -1), out=half)
    torch.bmm(matrix.expand(m, m, k), half.view(m, k, -1), out=whole)
    return whole.view(m, m, *rest)


def _pad(x: Tensor, border: int) -> Tensor:
    """Pad [B, C, h, w] to multiples of four and by a border: [B, 4r + 2 border, 4c + 2 border, C]."""
    below, right = (-size % 4 + border for size in x.shape[2:])
    return F.pad(x, (border, right, border, below)).permute(0, 2, 3, 1).contiguous()
