"""Perceptual distance on latents: LatentLPIPS, its augmented ensemble, and their training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_lpips.config import AugmentConfig
    from latent_lpips.distance import ELatentLPIPS, LatentLPIPS
    from latent_lpips.lpips import PixelLPIPS
    from latent_lpips.weights import load

_HOMES = {
    "AugmentConfig": "config",
    "ELatentLPIPS": "distance",
    "LatentLPIPS": "distance",
    "PixelLPIPS": "lpips",
    "load": "weights",
}
__all__ = ["AugmentConfig", "ELatentLPIPS", "LatentLPIPS", "PixelLPIPS", "load"]


def __getattr__(name: str) -> Any:
    """Load torch only when a network is asked for: the command line lists presets without it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"latent_lpips.{_HOMES[name]}"), name)
