"""LPIPS of the decoded images, or of the pixels themselves for a teacher in pixel space."""

from functools import partial

from d2g.diffusion.latents import decode
from distill.config.regression import RegressionConfig
from distill.losses.regression.base import FrozenNetworks, FunctionDistance, RegressionLoss
from latent_lpips.lpips import PixelLPIPS


def _build(config: RegressionConfig, networks: FrozenNetworks) -> FunctionDistance:
    """Build the published LPIPS on images decoded by the teacher's autoencoder."""
    metric = PixelLPIPS(
        config.lpips_net,
        config.lpips_weights or None,
        decode=partial(decode, networks.vae),
        resize=config.lpips_resize or None,
    )
    return FunctionDistance(metric)


LPIPS_LOSS = RegressionLoss(
    name="lpips",
    log_key="loss/lpips",
    build=_build,
    needs=frozenset({"vae"}),
    settings=("lpips_net", "lpips_weights", "lpips_resize"),
    describe=lambda config: (
        f" of {config.lpips_net}" + (f" at {config.lpips_resize} pixels" if config.lpips_resize else "")
    ),
)
