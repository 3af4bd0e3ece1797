"""LatentLPIPS without transforms."""

from distill.config.components import RegressionConfig
from distill.losses.regression.base import FrozenNetworks, FunctionDistance, RegressionLoss


def build(config: RegressionConfig, networks: FrozenNetworks) -> FunctionDistance:
    """LatentLPIPS of the latents as they are."""
    assert networks.latent_lpips is not None
    return FunctionDistance(networks.latent_lpips)


LOSS = RegressionLoss(
    name="latent_lpips", log_key="loss/latent_lpips", build=build, needs=frozenset({"latent_lpips"})
)
