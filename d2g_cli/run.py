"""`d2g run`: everything from a folder of pictures to a student."""

import shlex
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.config import Presets, pick
from d2g.core.errors import SettingError
from d2g.core.logs import logger
from d2g_cli.common import (
    WorkOptions,
    configure,
    emit,
    expand_options,
    finish_dry_run,
    is_rank_0,
    leave_process_group,
    presets_in_help,
    reporter,
)
from d2g_cli.inputs import check_inputs
from d2g_cli.launch import Processes, share_among_processes


def register_run(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("run", cls=presets_in_help(_presets))(run)


def _presets() -> Presets[Any]:
    from teacher_training.full_run.config import FULL_RUN_PRESETS

    return FULL_RUN_PRESETS


@dataclass(frozen=True, kw_only=True)
class FullRunOptions(WorkOptions):
    """Options of `d2g run`."""

    data: Annotated[str | None, typer.Option(help="Folder of captioned pictures, or image-parquet.")] = None
    teacher: Annotated[
        str | None, typer.Option(help="Teacher to distill, in place of training one on the pictures.")
    ] = None
    minutes: Annotated[
        float | None,
        typer.Option(help="Minutes for all parts on this machine (the preset's); 0: as the settings say."),
    ] = None
    features: Annotated[
        str | None, typer.Option(help="Feature network, as --features of `d2g eval run`.")
    ] = None
    features_input: Annotated[
        str | None, typer.Option(help="Input of that network, as --features-input of `d2g eval run`.")
    ] = None


@expand_options
def run(
    context: typer.Context,
    options: FullRunOptions,
    out: Annotated[
        Path, typer.Option(help="Folder for everything. Run the same command again to resume.")
    ] = Path("d2g-run"),
    parts: Annotated[
        str, typer.Option(help="Parts to do, comma-separated.")
    ] = "teacher,pairs,ode,gan,eval,export",
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Continue even if the teacher is not trained.")
    ] = False,
    processes: Processes = None,
) -> None:
    """Make a student of a folder of pictures: teacher, pairs, both stages, evaluation, export, report."""
    config = _run_config(options, untrained)
    check_inputs(
        {"--data": config.data, "--teacher": config.pretrained_teacher, "--features": config.features}
    )
    share_among_processes(context, processes, out, 60 * config.minutes or inf)
    from d2g.core.distributed import process_group
    from teacher_training.full_run.plan import PARTS, plan_run
    from teacher_training.full_run.run import run_parts

    # Unknown parts are refused before anything is loaded.
    names = tuple(parts.split(","))
    for name in names:
        pick(dict.fromkeys(PARTS), name, "part")
    with leave_process_group(typer.Exit):
        process_group.init(long_waits=True)
        # Plan, then stop (--dry-run) or run the parts.
        config, plan = plan_run(config, out)
        for line in plan.lines():
            logger.info(line)
        if options.dry_run:
            facts = {"lengths": plan.lengths, "minutes": plan.minutes, "measured_on": plan.measured_on}
            teacher = None if plan.teacher is None else asdict(plan.teacher)
            finish_dry_run(config, options.as_json, {"plan": facts | {"teacher": teacher}})
        summary = run_parts(config, plan, out, names, reporter, _command(options, out, untrained))
        if summary is not None:
            emit(asdict(summary), options.as_json, f"report: {summary.report}")


def _run_config(options: FullRunOptions, untrained: bool) -> Any:
    """The settings of a run. Raises SettingError for settings that another one makes useless."""
    if options.preset is None and is_rank_0():
        logger.info("no --preset: quick, half an hour; --preset evening or night train better students")
    config = pick(_presets(), options.preset or "quick", "preset")
    _refuse_without_effect(options, config.minutes if options.minutes is None else options.minutes)
    if options.teacher is not None:
        config = _with_stages_for(config, options.teacher)
    # Options become settings; one seed serves all parts.
    settings: dict[str, Any] = {
        "data": options.data,
        "teacher.data": options.data,
        "pretrained_teacher": options.teacher,
        "minutes": options.minutes,
        "features": options.features,
        "features_input": options.features_input,
        "stop_untrained": False if untrained else None,
    }
    if options.seed is not None:
        from d2g.core.seeds import checked_key

        checked_key("seed", options.seed)
        settings |= {f"{part}.seed": options.seed for part in ("teacher", "pairs", "ode", "gan")}
    config = configure(config, settings, options.sets)
    if not options.data:
        raise SettingError("--data is not set; give the folder of your pictures")
    return config


def _refuse_without_effect(options: FullRunOptions, minutes: float) -> None:
    """Raise SettingError for a setting that an option or an earlier part chooses."""
    from teacher_training.full_run.plan import PART_LENGTHS

    chosen = {"data", "pretrained_teacher", "teacher.data", "pairs.prompts", "pairs.teacher"}
    chosen |= {f"{stage}.{name}" for stage in ("ode", "gan") for name in ("teacher", "pairs", "init")}
    lengths = {*PART_LENGTHS.values(), *TEACHER_LENGTHS} - {"eval_images"}
    for assignment in options.sets or []:
        name, reason = assignment.partition("=")[0].strip(), ""
        if name in chosen:
            reason = "options and earlier parts choose it"
        elif minutes and name in lengths:
            reason = "the minutes choose the lengths; give --minutes 0 for the settings' own"
        elif options.teacher and name.startswith("teacher.") and name not in DATA_SETTINGS:
            reason = "--teacher is there already"
        if reason:
            raise SettingError(f"--set {name} has no effect: {reason}; leave it out")


TEACHER_LENGTHS = (
    *("teacher.minutes", "teacher.vae.fit.images", "teacher.unet.fit.images", "teacher.lpips.trunk.images"),
    *("teacher.lpips.triplets", "teacher.clip.images", "teacher.clip.minutes"),
)
"""Lengths of the teacher's training, which `--minutes` chooses."""
DATA_SETTINGS = ("teacher.column", "teacher.images", "teacher.seed", "teacher.caption_template")
"""Settings of the teacher's training that tell how the pictures are read."""


def _with_stages_for(config: Any, teacher: str) -> Any:
    """The config with the stages' presets for a teacher of this size."""
    from distill.config.presets import DISTILL_PRESETS
    from distill.planning.choose_preset import choose_preset

    stages = {}
    for stage in ("ode", "gan"):
        name, reason = choose_preset(teacher, stage)
        if is_rank_0():
            logger.info("stage %s: preset %s, because %s", stage, name, reason)
        stages[stage] = DISTILL_PRESETS[name][stage]
    return replace(config, **stages)


def _command(options: FullRunOptions, out: Path, untrained: bool) -> str:
    """The command line of these options, which finishes an interrupted run."""
    names = ("preset", "data", "teacher", "minutes", "features", "features_input", "seed")
    values = [(f"--{name.replace('_', '-')}", getattr(options, name)) for name in names]
    values += [("--set", assignment) for assignment in options.sets or []]
    words = [word for name, value in values if value is not None for word in (name, f"{value}")]
    words += ["--untrained"] if untrained else []
    return shlex.join(["d2g", "run", *words, "--out", str(out)])
