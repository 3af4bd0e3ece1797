"""All families: every complete `Family` class in the files of this package. A new file registers itself."""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping

from d2g.diffusion import families
from d2g.diffusion.families.base import SCHEDULE_NAMES, Family, ScheduleKind


def _discover() -> dict[str, Family]:
    """Families by name, in the order of the file names."""
    discovered: dict[str, Family] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(families.__path__)):
        if name == "registry":
            continue
        module = importlib.import_module(f"{families.__name__}.{name}")
        # Take classes defined in this file, not those that it imports.
        for value in vars(module).values():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, Family) and not inspect.isabstract(value):
                discovered[value.name] = value()
    return discovered


FAMILIES: Mapping[str, Family] = _discover()
"""Every family by its short name."""

STAGE_COLUMNS = ("family", "pairs", "regression", "GAN", "LoRA", "export")


def stage_table() -> list[dict[str, str]]:
    """The table of families and the stages that support them: one row per family, texts by
    `STAGE_COLUMNS`."""
    return [
        {
            "family": family.title,
            "pairs": "yes",
            "regression": _cell(family, family.regression),
            "GAN": _cell(family, family.gan),
            "LoRA": _cell(family, family.lora),
            "export": _formats(family),
        }
        for family in FAMILIES.values()
    ]


def _cell(family: Family, kinds: tuple[ScheduleKind, ...]) -> str:
    """yes, no, or yes with the kinds of schedule that the family has and the stage does not support."""
    condition = _condition(family, kinds)
    if not kinds:
        return "no"
    return f"yes, {condition}" if condition else "yes"


def _formats(family: Family) -> str:
    """The formats of `d2g export`, each with its conditions."""
    formats = []
    for export in family.exports:
        only = "unconditional only" if export.unconditional_only else ""
        conditions = ", ".join(filter(None, [_condition(family, export.schedules), only]))
        conditions += f": {export.reason}" if export.reason else ""
        formats.append(f"{export.name} ({conditions})" if conditions else export.name)
    if not formats:
        return "no"
    return "; ".join(filter(None, [", ".join(formats), family.not_exported]))


def _condition(family: Family, kinds: tuple[ScheduleKind, ...]) -> str:
    missing = [SCHEDULE_NAMES[kind] for kind in family.schedules if kind not in kinds]
    return f"not {' or '.join(missing)}" if missing else ""
