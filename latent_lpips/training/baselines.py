"""Pixel distances that LatentLPIPS is compared with: squared error and SSIM."""

from torch import Tensor

from d2g.core.errors import UserError

SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window in pixels; its sigma is 1.5 (Wang et al. 2004)."""


def pixel_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error per image: [B, 3, H, W] -> [B]."""
    return (a - b).square().mean((1, 2, 3))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM per image in [-1, 1], averaged over channels and positions: pixels [B, 3, H, W] in [-1, 1] -> [B].

    Computed by kornia in float64, at the positions where the whole window fits. Raises UserError for images
    smaller than the window.
    """
    from kornia.metrics import ssim as ssim_map

    if min(a.shape[2:]) < SSIM_WINDOW:
        raise UserError(f"SSIM takes images of {SSIM_WINDOW} pixels or more, got {a.shape[3]}x{a.shape[2]}")
    # Pixels span [-1, 1], a range of 2. Variances are differences of squares, hence float64.
    values: Tensor = ssim_map(a.double(), b.double(), SSIM_WINDOW, max_val=2.0, padding="valid")
    return values.mean((1, 2, 3)).float()


def ssim_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - SSIM per image, in [0, 2]: pixels [B, 3, H, W] in [-1, 1] -> [B]."""
    return 1 - ssim(a, b)
