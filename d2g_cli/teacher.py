"""`d2g teacher`: train or inspect a teacher."""

from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.config import Presets
from d2g_cli.common import (
    Json,
    Out,
    WorkOptions,
    configure_preset,
    emit,
    emit_table,
    expand_options,
    finish_dry_run,
    one_process,
    presets_in_help,
    reporter,
)

app = typer.Typer(help="Train or inspect a teacher.", no_args_is_help=True)


def _presets() -> Presets[Any]:
    from teacher_training.config import TEACHER_PRESETS

    return TEACHER_PRESETS


@app.command("train", cls=presets_in_help(_presets))
@expand_options
def teacher_train(
    options: WorkOptions,
    data: Annotated[str | None, typer.Option(help="scenes, an image folder, or image-parquet.")] = None,
    out: Out = Path("teacher"),
    stages: Annotated[str, typer.Option(help="Stages to run, comma-separated.")] = "data,vae,unet,lpips,clip",
) -> None:
    """Train a small Stable-Diffusion-shaped teacher on captioned images."""
    config = configure_preset(_presets(), "scenes", options, {"data": data, "seed": options.seed})
    if options.dry_run:
        finish_dry_run(config, options.as_json)
    from miniature.registration import register_training_scenes
    from teacher_training.train import train_teacher

    register_training_scenes()
    emit(train_teacher(config, out, tuple(stages.split(",")), reporter), options.as_json, "teacher")


@app.command("list")
@one_process
def teacher_list(as_json: Json = False) -> None:
    """List the model families and the stages that support them."""
    from d2g.diffusion.families.registry import STAGE_COLUMNS, stage_table

    rows = stage_table()
    if as_json:
        emit({"families": rows}, as_json, "families")
    else:
        emit_table(STAGE_COLUMNS, [[row[column] for column in STAGE_COLUMNS] for row in rows], "families")


@app.command("info")
@one_process
def teacher_info(
    teacher: Annotated[str, typer.Argument(help="Folder, hub id or shipped name.")], as_json: Json = False
) -> None:
    """Describe a teacher; for one of `d2g teacher train`, say whether it is trained, too."""
    from d2g.diffusion.pipelines import resolve
    from d2g.diffusion.teacher import describe_teacher
    from teacher_training.verdict import recorded_verdict

    facts = describe_teacher(teacher)
    verdict = recorded_verdict(resolve(teacher)) or {"verdict": NO_RECORD}
    emit(facts | {key: verdict.get(key) for key in ("trained", "verdict", "numbers")}, as_json, teacher)


NO_RECORD = "unknown: the folder holds no record of its training"
"""The verdict on a teacher that `d2g teacher train` has not made."""
