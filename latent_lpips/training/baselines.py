"""What LatentLPIPS is measured against: squared error and SSIM, of pixels."""

import torch
from torch import Tensor
from torch.nn import functional as F

from d2g.core.errors import UserError

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def pixel_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error per image: [B, 3, H, W] -> [B]."""
    return (a - b).square().mean((1, 2, 3))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM per image in [-1, 1], mean over channels and positions: pixels [B, 3, H, W] in [-1, 1] -> [B].

    Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5, K 0.01 and 0.03, where the window fits. Raises
    UserError for images smaller than the window.
    """
    if min(a.shape[2:]) < WINDOW:
        raise UserError(f"SSIM takes images of {WINDOW} pixels or more, got {a.shape[3]}x{a.shape[2]}")
    c1, c2 = (K1 * 2) ** 2, (K2 * 2) ** 2  # the pixels' range is 2
    a, b = a.double(), b.double()  # differences of squares
    mean_a, mean_b, aa, bb, ab = (_blurred(x) for x in (a, b, a * a, b * b, a * b))
    variance = aa - mean_a.square() + bb - mean_b.square()
    covariance = ab - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    bottom = (mean_a.square() + mean_b.square() + c1) * (variance + c2)
    return (top / bottom).mean((1, 2, 3)).float()


def ssim_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - SSIM: [B], in [0, 2]."""
    return 1 - ssim(a, b)


def _blurred(x: Tensor) -> Tensor:
    at = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    kernel = torch.softmax(-at.square() / (2 * SIGMA**2), dim=0)
    flat = x.flatten(0, 1)[:, None]
    across = F.conv2d(F.conv2d(flat, kernel[None, None, None]), kernel[None, None, :, None])
    blurred: Tensor = across[:, 0].unflatten(0, x.shape[:2])
    return blurred
