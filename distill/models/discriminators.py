"""All discriminators by name (`gan.discriminator`).

To add one, write `distill/models/NAME_discriminator.py` with a `DiscriminatorKind` at its top level, and add
NAME to `DiscriminatorName` in `distill/config/discriminator.py`, with its settings if it has any.
"""

from importlib import import_module
from typing import get_args

from d2g.core.errors import SettingError
from d2g.diffusion import pretrained
from d2g.diffusion.pipelines import open_pipeline
from distill.config.discriminator import DiscriminatorConfig, DiscriminatorName
from distill.models.discriminator_kind import DiscriminatorKind
from distill.models.two_discriminators import both


def _load(name: str) -> DiscriminatorKind:
    """The one `DiscriminatorKind` at the top level of a discriminator's module, or two of them at once."""
    if "+" in name:
        return both(*map(_load, name.split("+")))
    module = import_module(f"distill.models.{name}_discriminator")
    (kind,) = (value for value in vars(module).values() if isinstance(value, DiscriminatorKind))
    assert kind.name == name, f"{name}_discriminator.py defines the discriminator {kind.name}"
    return kind


DISCRIMINATORS: dict[str, DiscriminatorKind] = {name: _load(name) for name in get_args(DiscriminatorName)}
"""Discriminators by their name in `gan.discriminator`."""


def check_discriminator(teacher: str, config: DiscriminatorConfig) -> None:
    """Raise SettingError for a discriminator that is not built from the teacher's kind of network, for sizes
    that its feature networks do not take, and for mix-and-match where no row has a condition that could be
    wrong; UserError for feature networks that are missing.
    """
    name, pipeline = config.discriminator, open_pipeline(teacher)
    kind, network = DISCRIMINATORS[name], pipeline.family.network
    if kind.networks and network not in kind.networks:
        fitting = [other for other, each in DISCRIMINATORS.items() if network in each.networks]
        raise SettingError(
            f"gan.discriminator is {name!r}, but the network of {teacher}, a {pipeline.kind}, is a "
            f"{network}; set gan.discriminator={' or '.join(fitting)}"
        )
    if kind.check is not None:
        kind.check(teacher)
    if kind.open_view is not None:  # raises for what the feature networks do not take
        kind.open_view(teacher, config, True)
    if config.mix_fraction and pretrained.is_unconditional(teacher):
        raise SettingError(
            f"gan.mix_fraction is {config.mix_fraction:g}, but {teacher} is unconditional: its rows have no "
            "text or class to mismatch; set gan.mix_fraction=0"
        )
