"""`d2g teacher`: train or inspect a teacher."""

from pathlib import Path
from typing import Annotated

import typer

from d2g_cli.common import DryRun, Json, Out, Preset, Seed, Sets, chosen, dry, emit, emit_table, reporter

app = typer.Typer(help="Train or inspect a teacher.", no_args_is_help=True)


@app.command("train")
def teacher_train(
    data: Annotated[str | None, typer.Option(help="scenes, an image folder, or image-parquet.")] = None,
    out: Out = Path("teacher"),
    stages: Annotated[str, typer.Option(help="Which pieces, comma-separated.")] = "data,vae,unet,lpips,clip",
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a small Stable-Diffusion-shaped teacher on captioned pictures."""
    from miniature.registration import register_training_scenes
    from teacher_training.config import TEACHER_PRESETS
    from teacher_training.train import train_teacher

    register_training_scenes()
    config = chosen(TEACHER_PRESETS, preset or "scenes", {"data": data, "seed": seed}, sets)
    if dry_run:
        dry(config, as_json)
    emit(train_teacher(config, out, tuple(stages.split(",")), reporter), as_json, "teacher")


@app.command("list")
def teacher_list(as_json: Json = False) -> None:
    """List the model families and the stages that support them."""
    from d2g.diffusion.families.registry import STAGE_COLUMNS, stage_table

    rows = stage_table()
    if as_json:
        emit({"families": rows}, as_json, "families")
    else:
        emit_table(STAGE_COLUMNS, [[row[column] for column in STAGE_COLUMNS] for row in rows], "families")


@app.command("info")
def teacher_info(teacher: str, as_json: Json = False) -> None:
    """Describe a teacher from the files in its folder, without reading weights."""
    from d2g.diffusion.teacher import describe_teacher

    emit(describe_teacher(teacher), as_json, teacher)
