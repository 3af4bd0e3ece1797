"""All regression losses by name.

To add one, write `distill/losses/regression/NAME.py` with a `RegressionLoss`, and add NAME to
`RegressionName` in `distill/config/regression.py`, with the loss's settings if it has any. Presets, checks of
settings, monitoring and the model card follow from that.
"""

from importlib import import_module
from typing import get_args

from distill.config.regression import RegressionConfig, RegressionName
from distill.losses.regression.base import Network, RegressionLoss


def _load(name: str) -> RegressionLoss:
    """Return the `RegressionLoss` at the top level of the module `name`."""
    module = import_module(f"distill.losses.regression.{name}")
    (loss,) = (value for value in vars(module).values() if isinstance(value, RegressionLoss))
    assert loss.name == name, f"{name}.py defines the loss {loss.name}"
    return loss


REGRESSION_LOSSES: dict[str, RegressionLoss] = {name: _load(name) for name in get_args(RegressionName)}
"""Regression losses by their name in `regression.losses`."""


def regression_networks(config: RegressionConfig) -> frozenset[Network]:
    """The frozen networks that a run's regression losses need."""
    return frozenset(network for name in config.names for network in REGRESSION_LOSSES[name].needs)
