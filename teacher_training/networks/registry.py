"""All networks that `d2g teacher train` can train, by name (`network`).

To add one, write `teacher_training/networks/NAME.py` with a `NetworkKind` at its top level, and add NAME and
its group of settings to `NetworkName` and `NETWORK_GROUPS` in `teacher_training/config.py`.
"""

from importlib import import_module
from typing import get_args

from teacher_training.config import NetworkName, TeacherConfig
from teacher_training.networks.kind import NetworkKind


def _load(name: str) -> NetworkKind:
    """The one `NetworkKind` at the top level of a network's module."""
    module = import_module(f"teacher_training.networks.{name}")
    (kind,) = (value for value in vars(module).values() if isinstance(value, NetworkKind))
    assert kind.name == name, f"{name}.py defines the network {kind.name}"
    return kind


NETWORKS: dict[str, NetworkKind] = {name: _load(name) for name in get_args(NetworkName)}
"""Networks by their name in the setting `network`."""


def network_of(config: TeacherConfig) -> NetworkKind:
    """The network that these settings train."""
    return NETWORKS[config.network]
