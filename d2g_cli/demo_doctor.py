"""`d2g demo` and `d2g doctor`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.config import pick
from d2g.core.errors import SettingError, UserError
from d2g_cli.common import DryRun, Json, Preset, Seed, Sets, TeacherOption, chosen, dry, emit, reporter


def demo(
    out: Annotated[Path, typer.Option(help="Folder for report, pictures and all that is made.")] = Path(
        "d2g-demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run of half a minute; its numbers mean little.")
    ] = False,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Distil the bundled miniature teacher: pairs, both stages, evaluation, a report with pictures."""
    from miniature.config import DEMO_PRESETS
    from miniature.demo import run_demo

    config = chosen(DEMO_PRESETS, preset or ("quick" if quick else "default"), {"seed": seed}, sets)
    if dry_run:
        dry(config, as_json)
    result = run_demo(config, out, reporter)
    emit(result, as_json, f"pictures and curves: {result.report}")


def doctor(
    preset: Annotated[str | None, typer.Option(help="Also: would this preset of `d2g distill` fit?")] = None,
    teacher: TeacherOption = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of that run (the preset's).")] = None,
    as_json: Json = False,
) -> None:
    """What this machine has, and what stands in the way."""
    from d2g.core.environment import examine

    if gpus is not None and gpus < 1:
        raise SettingError(f"--gpus is {gpus}; expected 1 or more")
    if preset is None and (teacher is not None or gpus is not None):
        name = "--gpus" if teacher is None else "--teacher"
        raise SettingError(f"{name} says of which run; give --preset NAME of `d2g distill` too")
    found = examine()
    if preset is not None:
        found |= _memory(preset, teacher, gpus, found)
    emit(found, as_json, "d2g doctor")


def _memory(preset: str, teacher: str | None, gpus: int | None, machine: dict[str, Any]) -> dict[str, Any]:
    """Predicted GiB per GPU of each stage, and the problems with what does not fit."""
    from d2g.diffusion.pipelines import SHIPPED
    from distill.config.presets import DISTILL_PRESETS
    from distill.config.run import microbatch_size
    from distill.planning.memory import forecast, too_large

    recipe = pick(DISTILL_PRESETS, preset, "preset")
    if teacher is not None and not (teacher in SHIPPED or Path(teacher).is_dir()):
        raise UserError(
            f"--teacher {teacher}: no such folder; memory is read from a teacher's files: give its folder on "
            f"this disk, or a shipped name: {', '.join(SHIPPED)}"
        )
    memory, problems = {}, list(machine["problems"])
    for stage, config in recipe.items():
        config = replace(config, teacher=config.teacher if teacher is None else teacher)
        many = gpus or config.engine.gpus or 1
        try:
            microbatch_size(config, many)
        except SettingError as error:
            problems.append(f"{preset} {stage}: {error}")
            continue
        predicted = forecast(config, many, recipe.model)
        if predicted is None:
            problems.append(f"{preset} {stage}: memory is unknown; give --teacher, a folder on this disk")
            continue
        memory[stage] = predicted
        if machine["cuda"] and (why := too_large(config, predicted["total"], machine["memory_gib"])):
            problems.append(f"{preset}: {why}")
    return {"memory_gib_per_gpu": memory, "problems": problems}
