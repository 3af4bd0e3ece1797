"""Perceptual distance on latents: LatentLPIPS, its augmented ensemble, and their training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_lpips.metric import ELatentLPIPS, LatentLPIPS

__all__ = ["ELatentLPIPS", "LatentLPIPS"]


def __getattr__(name: str) -> Any:
    """Load torch only when a network is asked for: the command line lists presets without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from latent_lpips import metric

    return getattr(metric, name)
