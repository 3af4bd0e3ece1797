"""`d2g distill`: train a one-step student."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from commands.common import (
    DryRun,
    Json,
    Out,
    Preset,
    Seed,
    Sets,
    TeacherOption,
    configure,
    dry,
    emit,
    reporter,
)
from commands.watch import watch

app = typer.Typer(help="Train a one-step student.", no_args_is_help=True)
app.command("watch")(watch)


def _distill(
    stage: str,
    preset: str | None,
    sets: list[str] | None,
    out: Path,
    dry_run: bool,
    as_json: bool,
    options: dict[str, Any],
    train_options: dict[str, Any],
) -> None:
    from core import dist
    from distill.presets import preset as distill_preset

    config = distill_preset(preset or "sd15-cfg8", stage)
    config = replace(config, train=configure(config.train, train_options, None))
    config = configure(config, options, sets)
    if dry_run:
        dry(config, as_json, _plan(config, preset or ""))
    from distill.train import train

    try:
        emit(train(config, out, reporter), as_json, f"distill {stage}")
    finally:
        dist.finish()


def _plan(config: Any, preset: str) -> dict[str, Any]:
    """What a run costs. Raises UserError where it cannot fit the GPU that is here."""
    from core import dist
    from core.doctor import examine
    from core.errors import UserError
    from distill.bookkeeping import plan
    from distill.memory import forecast, too_large

    gpus = config.engine.gpus or dist.world_size()
    memory, machine = forecast(config, gpus), examine()
    if memory and machine["cuda"] and (why := too_large(config, memory["total"], machine["memory_gib"])):
        raise UserError(why)
    return plan(config, preset, gpus) | {"memory_gib_per_gpu": memory or "unknown until the teacher is here"}


Pairs = Annotated[
    str | None, typer.Option(help="Folder of `d2g pairs generate`, or its URL (s3://, gs://, hf://).")
]
Lpips = Annotated[Path | None, typer.Option(help="LatentLPIPS folder [TEACHER/latent_lpips].")]
Minutes = Annotated[float | None, typer.Option(help="Stop after so long, with a checkpoint.")]
Images = Annotated[int | None, typer.Option(help="Training images, over all ranks.")]


@app.command("ode")
def distill_ode(
    pairs: Pairs = None,
    teacher: TeacherOption = None,
    out: Out = Path("runs/ode"),
    lpips: Lpips = None,
    minutes: Minutes = None,
    images: Images = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Stage 1: regress the teacher's latents from their noise in one step."""
    options = {"pairs": pairs, "teacher": teacher, "lpips": lpips, "seed": seed}
    _distill("ode", preset, sets, out, dry_run, as_json, options, {"minutes": minutes, "images": images})


@app.command("gan")
def distill_gan(
    pairs: Pairs = None,
    teacher: TeacherOption = None,
    out: Out = Path("runs/gan"),
    init: Annotated[str | None, typer.Option(help="Stage-1 run, or exported student, to start from.")] = None,
    lpips: Lpips = None,
    minutes: Minutes = None,
    images: Images = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Stage 2: add the text- and noise-conditional discriminator."""
    options = {"pairs": pairs, "teacher": teacher, "lpips": lpips, "init": init, "seed": seed}
    _distill("gan", preset, sets, out, dry_run, as_json, options, {"minutes": minutes, "images": images})
