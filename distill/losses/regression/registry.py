"""All regression losses by name.

To add one, write `distill/losses/regression/NAME.py` with a `RegressionLoss`, and add NAME to
`RegressionKind` in `distill/config/components.py`, with the loss's settings if it has any. Presets, checks of
settings, monitoring and the model card follow from that.
"""

from importlib import import_module
from typing import get_args

from distill.config.components import RegressionConfig, RegressionKind
from distill.losses.regression.base import Network, RegressionLoss


def _load(name: str) -> RegressionLoss:
    """The one `RegressionLoss` at the top level of the module `name`."""
    module = import_module(f"distill.losses.regression.{name}")
    (loss,) = (value for value in vars(module).values() if isinstance(value, RegressionLoss))
    assert loss.name == name, f"{name}.py defines the loss {loss.name}"
    return loss


REGRESSION_LOSSES: dict[str, RegressionLoss] = {name: _load(name) for name in get_args(RegressionKind)}
"""Entries by `regression.kind`."""


def regression_networks(config: RegressionConfig) -> frozenset[Network]:
    """The frozen networks that a run's regression needs, those of an added LatentLPIPS term included."""
    needs = REGRESSION_LOSSES[config.kind].needs
    return needs | {"latent_lpips"} if config.latent_lpips_weight > 0 else needs
