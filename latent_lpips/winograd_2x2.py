"""3x3 convolutions, and transposed ones, with 16 multiplications instead of 36 for each 2x2 block of outputs,
in bf16 on a CPU.

Winograd's F(2x2, 3x3) (Lavin and Gray 2016, section 4.1), from blocks of 4x4 inputs. Direct convolutions
already run at the peak of a CPU's bf16 units, so only fewer multiplications are faster: 1.5 times from 256
channels on. On CPUs with AMX the transforms take longer than the multiplications that they save.

The rounding error is larger, 0.6 % of the output instead of 0.2 %. It would move distances by more than 1 %
where the latents are nearly equal, so a forward pass convolves differences of features separately
(latent_lpips/fused.py). Convolutions in fp32 take larger blocks: latent_lpips/winograd_4x4.py.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_lpips.winograd import Winograd

PLAIN, MIRRORED = (0, 1, 2, 3), (3, 1, 2, 0)
"""Order of the rows of G w G^T. A transposed convolution convolves with mirrored weights, which exchanges the
outer ones."""


class Winograd2x2(Winograd):
    """Blocks of 2x2 outputs. A forward pass adds products in the bias' type, fp32 in a trunk."""

    FILTER_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
    PRODUCTS = 16
    MIN_CHANNELS = 256
    MAX_BLOCKS = 256  # transformed inputs of 512 channels then take 4 MiB, which fit a cache
    FORWARD_CHANNELS = 512
    """Forward passes take direct convolutions below it, and in the first layer of as many (fused.py)."""

    def conv3x3(self, x: Tensor, bias: Tensor) -> Tensor:
        return self._convolve(x, self.transformed, PLAIN, bias)

    def conv3x3_transposed(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.transformed.transpose(1, 2), MIRRORED)

    def _convolve(
        self, x: Tensor, weights: Tensor, order: tuple[int, ...], bias: Tensor | None = None
    ) -> Tensor:
        """Convolve x [B, in, h, w] with transformed weights [16, in, out], whose rows are in this order."""
        batch, _, height, width = x.shape
        rows, columns = -(-height // 2), -(-width // 2)
        # A border of one, and another row or column where the size is odd.
        border = (1, 1 + 2 * columns - width, 1, 1 + 2 * rows - height)
        padded = F.pad(x, border).permute(0, 2, 3, 1).contiguous()
        result = x.new_empty(batch, 2 * rows, 2 * columns, weights.shape[2])
        # Transform, multiply, and transform back some of the blocks.
        for images, band in self.parts(batch, rows, columns):
            tiles = _transform_input(padded[images, 2 * band.start : 2 * band.stop + 2], order)
            products = torch.bmm(tiles.view(16, -1, x.shape[1]), weights).view(4, 4, *tiles.shape[2:5], -1)
            _transform_output(products, result[images, 2 * band.start : 2 * band.stop], order, bias)
        return result[:, :height, :width].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _transform_input(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Transform padded inputs [b, 2r + 2, 2c + 2, C] to [4, 4, b, r, c, C]."""
    batch, height, width, channels = x.shape
    rows, columns = height // 2 - 1, width // 2 - 1
    # Along the height, then along the width: d0 - d2, d1 + d2, d2 - d1, d1 - d3.
    half = x.new_empty(4, batch, rows, width, channels)
    _differences(x.unflatten(1, (rows + 1, 2)).movedim(2, 0), [half[k] for k in order], 1)
    tiles = x.new_empty(4, 4, batch, rows, columns, channels)
    _differences(half.unflatten(3, (columns + 1, 2)).movedim(4, 0), [tiles[:, k] for k in order], 3)
    return tiles


def _differences(pairs: Tensor, out: list[Tensor], dim: int) -> None:
    """Write the four combinations of neighbors; `pairs` [2, ...] holds even and odd positions along `dim`."""
    count = pairs.shape[dim + 1] - 1
    d0, d1 = (part.narrow(dim, 0, count) for part in pairs)
    d2, d3 = (part.narrow(dim, 1, count) for part in pairs)
    torch.sub(d0, d2, out=out[0])
    torch.add(d1, d2, out=out[1])
    torch.sub(d2, d1, out=out[2])
    torch.sub(d1, d3, out=out[3])


def _transform_output(products: Tensor, out: Tensor, order: tuple[int, ...], bias: Tensor | None) -> None:
    """Transform products [4, 4, b, r, c, K] to outputs [b, 2r, 2c, K]; with a bias [K], in its type."""
    products = products if bias is None else products.to(bias.dtype)
    half = torch.stack(_sums([products[k] for k in order]))
    blocks = out.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [b, r, 2, c, 2, K]
    for column, values in enumerate(_sums([half[:, k] for k in order])):
        if bias is not None:
            values += bias
        blocks[:, :, :, :, column].copy_(values.permute(1, 2, 0, 3, 4))


def _sums(m: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return m0 + m1 + m2 and m1 - m2 - m3."""
    return (m[1] + m[2]).add_(m[0]), (m[1] - m[2]).sub_(m[3])
