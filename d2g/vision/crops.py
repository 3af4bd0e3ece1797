"""Crops at a place of its own for each row, with all derivatives."""

import torch
from torch import Tensor


def crop_view(x: Tensor, side: int, uniform: Tensor) -> Tensor:
    """A square of `side` positions of each row of x [B, C, h, w], or all of a shorter side. uniform
    [B, 2 or more] in [0, 1): its place.
    """
    height, width = (min(side, length) for length in x.shape[2:])
    if (height, width) == x.shape[2:]:
        return x
    places = [
        (u * (length - part + 1)).long()
        for u, length, part in zip(uniform.unbind(1), x.shape[2:], (height, width), strict=False)
    ]
    return crop_rows(x, places[0], places[1], height, width)


def crop_rows(x: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """x [B, C, h, w] -> [B, C, height, width], row i from position (top[i], left[i]) on."""
    rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
    index = (top[:, None] + rows)[:, None, :, None]
    x = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
    index = (left[:, None] + columns)[:, None, None, :]
    return x.gather(3, index.expand(-1, x.shape[1], height, -1))
