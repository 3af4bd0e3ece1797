"""Perceptual distances between latents: LatentLPIPS and its augmented form, E-LatentLPIPS."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import latent_lpips` does not load torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
