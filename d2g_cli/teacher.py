"""`d2g teacher`: train or inspect a teacher."""

from pathlib import Path
from typing import Annotated

import typer

from d2g_cli.common import DryRun, Json, Out, Preset, Seed, Sets, chosen, dry, emit, reporter

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
    from miniature.registration import register_scenes
    from teacher_training.config import TEACHER_PRESETS
    from teacher_training.train import train_teacher

    register_scenes()
    config = chosen(TEACHER_PRESETS, preset or "scenes", {"data": data, "seed": seed}, sets)
    if dry_run:
        dry(config, as_json)
    emit(train_teacher(config, out, tuple(stages.split(",")), reporter), as_json, "teacher")


@app.command("info")
def teacher_info(teacher: str, as_json: Json = False) -> None:
    """What was found in a teacher's folder."""
    from d2g.diffusion.teacher import describe_teacher

    emit(describe_teacher(teacher), as_json, teacher)
