"""3x3 convolutions, and transposed ones, with 16 multiplications instead of 36 for each 2x2 block of outputs,
in bf16 on a CPU.

Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray 2016, section 4.1): blocks of 4x4 inputs, which
overlap by two, and the weights are transformed, multiplied, and transformed back, Y = A^T [(G w G^T) * (B^T d
B)] A. The products of all blocks are 16 matrix products over channels. Direct convolutions already run at the
peak of a CPU's bf16 units, so only fewer multiplications are faster: 1.5 times from 256 channels on. On
CPUs with AMX the transforms take longer than the multiplications that they save.

The rounding error is larger, 0.6 % of the output instead of 0.2 %. It would move distances by more than 1 %
where the latents are nearly equal, so a forward pass convolves differences of latents apart from the latents
(latent_lpips/fused.py). Convolutions in fp32 take larger blocks: latent_lpips/winograd_4x4.py.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
"""Transform of weights along one axis."""
PLAIN, MIRRORED = (0, 1, 2, 3), (3, 1, 2, 0)
"""Order of the rows of G w G^T. A transposed convolution convolves with mirrored weights, which exchanges the
outer ones."""


class Winograd2x2:
    """A 3x3 convolution with transformed weights [16, C, K], in their type."""

    PRODUCTS = 16
    """Transformed values of a filter."""
    MIN_CHANNELS = 256
    """Fewer channels leave too little work per transformed value."""
    FORWARD_CHANNELS = 512
    """Forward passes take direct convolutions below it, and in the first layer of as many (fused.py)."""
    MAX_BLOCKS = 256
    """Blocks per matrix product: transformed inputs of 512 channels then take 4 MiB, which fit a cache."""

    def __init__(self, transformed: Tensor) -> None:
        self.transformed = transformed

    @staticmethod
    def transform(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Transform weights [K, C, 3, 3] to [16, C, K], in their own type, and round once to `dtype`."""
        g = torch.tensor(G, dtype=weight.dtype)
        transformed = torch.einsum("ia,kcab,jb->ijck", g, weight, g)
        return transformed.flatten(0, 1).to(dtype).contiguous()

    def conv3x3(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return F.conv2d(x, weight, bias, padding=1) of x [B, C, h, w] and bias [K]: [B, K, h, w],
        channels-last. Products are added in the bias' type, fp32 in a trunk: errors of a forward pass flip
        ReLUs."""
        return _convolve(x, self.transformed, PLAIN, self.MAX_BLOCKS, bias)

    def conv3x3_transposed(self, x: Tensor) -> Tensor:
        """Return F.conv_transpose2d(x, weight, padding=1) of x [B, K, h, w]: [B, C, h, w], channels-last."""
        return _convolve(x, self.transformed.transpose(1, 2), MIRRORED, self.MAX_BLOCKS)


def _convolve(
    x: Tensor, weights: Tensor, order: tuple[int, ...], blocks: int, bias: Tensor | None = None
) -> Tensor:
    """Convolve x [B, in, h, w] with transformed weights [16, in, out], whose rows are in this order, as many
    blocks at a time."""
    batch, _, height, width = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    # A border of one, and another row or column where the size is odd.
    border = (1, 1 + 2 * columns - width, 1, 1 + 2 * rows - height)
    padded = F.pad(x, border).permute(0, 2, 3, 1).contiguous()
    result = x.new_empty(batch, 2 * rows, 2 * columns, weights.shape[2])
    # As many images, or rows of one image, as have so many blocks.
    images, step = max(1, blocks // (rows * columns)), max(1, min(rows, blocks // columns))
    for image in range(0, batch, images):
        for row in range(0, rows, step):
            end = min(row + step, rows)
            tiles = _transform_input(padded[image : image + images, 2 * row : 2 * end + 2], order)
            products = torch.bmm(tiles.view(16, -1, x.shape[1]), weights).view(4, 4, *tiles.shape[2:5], -1)
            part = result[image : image + images, 2 * row : 2 * end]
            _transform_output(products, part, order, bias)
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
