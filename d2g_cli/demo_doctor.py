"""`d2g demo` and `d2g doctor`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.config import Presets, pick
from d2g.core.errors import SettingError, UserError
from d2g_cli.common import (
    Json,
    TeacherOption,
    WorkOptions,
    configure_preset,
    emit,
    expand_options,
    finish_dry_run,
    one_process,
    presets_in_help,
    reporter,
)
from d2g_cli.launch import Processes, share_among_processes


def register_demo_doctor(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("demo", cls=presets_in_help(_demo_presets))(demo)
    app.command("doctor", cls=presets_in_help(_distill_presets))(doctor)


def _demo_presets() -> Presets[Any]:
    from miniature.config import DEMO_PRESETS

    return DEMO_PRESETS


def _distill_presets() -> Presets[Any]:
    from distill.config.presets import DISTILL_PRESETS

    return Presets({name: (recipe.about, recipe) for name, recipe in DISTILL_PRESETS.items()})


@expand_options
def demo(
    context: typer.Context,
    options: WorkOptions,
    out: Annotated[Path, typer.Option(help="Folder for the report, the images and everything else.")] = Path(
        "d2g-demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run of half a minute; its numbers mean little.")
    ] = False,
    processes: Processes = None,
) -> None:
    """Distill the bundled miniature teacher: pairs, both stages, evaluation, a report with images."""
    default = "quick" if quick else "default"
    config = configure_preset(_demo_presets(), default, options, {"seed": options.seed})
    if options.dry_run:
        finish_dry_run(config, options.as_json)
    from miniature.config import planned_seconds

    share_among_processes(context, processes, out, planned_seconds(config))
    from miniature.demo import run_demo

    result = run_demo(config, out, reporter)
    if result is not None:
        emit(result, options.as_json, f"images and curves: {result.report}")


@one_process
def doctor(
    preset: Annotated[
        str | None, typer.Option(help="Check also whether this preset of `d2g distill` would fit.")
    ] = None,
    teacher: TeacherOption = None,
    gpus: Annotated[int | None, typer.Option(help="Number of GPUs of that run (the preset's).")] = None,
    as_json: Json = False,
) -> None:
    """Show what this machine has, and what is missing or too small."""
    from d2g.core.environment import inspect_machine

    if gpus is not None and gpus < 1:
        raise SettingError(f"--gpus is {gpus}; expected 1 or more")
    if preset is None and (teacher is not None or gpus is not None):
        name = "--gpus" if teacher is None else "--teacher"
        raise SettingError(f"{name} needs a run to describe; give --preset NAME of `d2g distill` too")
    machine = inspect_machine()
    if preset is not None:
        machine |= _memory(preset, teacher, gpus, machine)
    emit(machine, as_json, "d2g doctor")


def _memory(preset: str, teacher: str | None, gpus: int | None, machine: dict[str, Any]) -> dict[str, Any]:
    """Predicted GiB per GPU of each stage of a preset, and the stages that do not fit, as problems."""
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
    # Each stage on the number of GPUs that it is meant for.
    for stage, config in recipe.items():
        config = replace(config, teacher=config.teacher if teacher is None else teacher)
        processes = gpus or config.engine.gpus or 1
        try:
            microbatch_size(config, processes)
        except SettingError as error:
            problems.append(f"{preset} {stage}: {error}")
            continue
        predicted = forecast(config, processes, recipe.model)
        if predicted is None:
            problems.append(f"{preset} {stage}: memory is unknown; give --teacher, a folder on this disk")
            continue
        memory[stage] = predicted
        # Compare with the first GPU of this machine.
        if machine["cuda"] and (problem := too_large(config, predicted["total"], machine["memory_gib"])):
            problems.append(f"{preset}: {problem}")
    return {"memory_gib_per_gpu": memory, "problems": problems}
