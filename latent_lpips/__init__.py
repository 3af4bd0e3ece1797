"""Perceptual distances between latents: LatentLPIPS and its augmented form, E-LatentLPIPS."""

from typing import TYPE_CHECKING

from d2g.core.lazy_names import lazy_names

if TYPE_CHECKING:
    from latent_lpips.config import AugmentConfig
    from latent_lpips.distance import ELatentLPIPS, LatentLPIPS
    from latent_lpips.lpips import PixelLPIPS
    from latent_lpips.weights import load_lpips

_MODULES = {
    "AugmentConfig": "latent_lpips.config",
    "ELatentLPIPS": "latent_lpips.distance",
    "LatentLPIPS": "latent_lpips.distance",
    "PixelLPIPS": "latent_lpips.lpips",
    "load_lpips": "latent_lpips.weights",
}
__all__ = ["AugmentConfig", "ELatentLPIPS", "LatentLPIPS", "PixelLPIPS", "load_lpips"]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
