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
from distill.models.two_discriminators import combine_kinds


def _load(name: str) -> DiscriminatorKind:
    """Return the `DiscriminatorKind` of the module `name`_discriminator, or that of two joined by "+"."""
    if "+" in name:
        return combine_kinds(*map(_load, name.split("+")))
    module = import_module(f"distill.models.{name}_discriminator")
    (kind,) = (value for value in vars(module).values() if isinstance(value, DiscriminatorKind))
    assert kind.name == name, f"{name}_discriminator.py defines the discriminator {kind.name}"
    return kind


DISCRIMINATORS: dict[str, DiscriminatorKind] = {name: _load(name) for name in get_args(DiscriminatorName)}
"""Discriminators by their name in `gan.discriminator`."""


def check_discriminator(teacher: str, config: DiscriminatorConfig) -> None:
    """Check that a run's discriminator fits its teacher.

    Raises SettingError if the discriminator needs another kind of network, if the feature networks do not
    support the image size, and for mix-and-match with an unconditional teacher. Raises UserError if weights
    of feature networks are missing.
    """
    name, pipeline = config.discriminator, open_pipeline(teacher)
    kind, network = DISCRIMINATORS[name], pipeline.family.network
    if kind.networks and network not in kind.networks:
        fitting = [other for other, candidate in DISCRIMINATORS.items() if network in candidate.networks]
        raise SettingError(
            f"gan.discriminator is {name!r}, but the network of {teacher}, a {pipeline.kind}, is a "
            f"{network}; set gan.discriminator={' or '.join(fitting)}"
        )
    if kind.check is not None:
        kind.check(teacher)
    if kind.open_pixel_features is not None:  # raises for sizes and files that do not fit
        kind.open_pixel_features(teacher, config, True)
    if config.mix_fraction and pretrained.is_unconditional(teacher):
        raise SettingError(
            f"gan.mix_fraction is {config.mix_fraction:g}, but {teacher} is unconditional: its rows have no "
            "text or class to mismatch; set gan.mix_fraction=0"
        )
