"""LatentLPIPS without transforms."""

from distill.config.regression import RegressionConfig
from distill.losses.regression.base import FrozenNetworks, FunctionDistance, RegressionLoss


def _build(config: RegressionConfig, networks: FrozenNetworks) -> FunctionDistance:
    """Build LatentLPIPS without transforms."""
    assert networks.latent_lpips is not None
    return FunctionDistance(networks.latent_lpips)


LATENT_LPIPS_LOSS = RegressionLoss(
    name="latent_lpips", log_key="loss/latent_lpips", build=_build, needs=frozenset({"latent_lpips"})
)
