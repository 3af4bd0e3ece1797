"""All families: every class of this package's files that is a complete `Family`. A new file registers itself."""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping

from d2g.diffusion import families
from d2g.diffusion.families.base import SCHEDULE_NAMES, Family, ScheduleKind


def _discover() -> dict[str, Family]:
    """Family by name, in the order of the file names."""
    found: dict[str, Family] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(families.__path__)):
        if name == "registry":
            continue
        module = importlib.import_module(f"{families.__name__}.{name}")
        for value in vars(module).values():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, Family) and not inspect.isabstract(value):
                found[value.name] = value()
    return found


FAMILIES: Mapping[str, Family] = _discover()
"""Every family by its short name."""

STAGE_COLUMNS = ("family", "pairs", "regression", "GAN", "LoRA", "export")


def stage_table() -> list[dict[str, str]]:
    """The table of families and the stages that work for them: one row per family, texts by `STAGE_COLUMNS`."""
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
    """yes, no, or yes with the kinds of schedule, where a stage does not work for all that the family has."""
    if set(kinds) == set(family.schedules):
        return "yes"
    return f"yes, {_only(kinds)}" if kinds else "no"


def _formats(family: Family) -> str:
    """The formats of `d2g export`, each with its condition."""
    formats = []
    for export in family.exports:
        conditions = [] if set(export.schedules) == set(family.schedules) else [_only(export.schedules)]
        conditions += ["unconditional only"] if export.unconditional_only else []
        formats.append(f"{export.name} ({', '.join(conditions)})" if conditions else export.name)
    return ", ".join(formats) or "no"


def _only(kinds: tuple[ScheduleKind, ...]) -> str:
    return f"{' or '.join(SCHEDULE_NAMES[kind] for kind in kinds)} only"
