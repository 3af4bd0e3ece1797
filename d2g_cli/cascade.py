"""`d2g teacher cascade`: train a small Wuerstchen, a cascade of teachers."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.config import Presets, pick
from d2g_cli.common import (
    Out,
    WorkOptions,
    configure_preset,
    emit,
    expand_options,
    finish_dry_run,
    one_process,
    presets_in_help,
    reporter,
)


def register_cascade(app: typer.Typer) -> None:
    """Add the command to the group `d2g teacher`."""
    app.command("cascade", cls=presets_in_help(_presets))(teacher_cascade)


def _presets() -> Presets[Any]:
    from teacher_training.cascade.config import CASCADE_PRESETS

    return CASCADE_PRESETS


@dataclass(frozen=True, kw_only=True)
class CascadeOptions(WorkOptions):
    """Options of `d2g teacher cascade`."""

    data: Annotated[str | None, typer.Option(help="scenes, an image folder, or image-parquet.")] = None


@one_process
@expand_options
def teacher_cascade(
    options: CascadeOptions,
    out: Out = Path("cascade"),
    parts: Annotated[str, typer.Option(help="Parts to train, comma-separated.")] = "vqgan,stage_b,stage_c",
) -> None:
    """Train a small Wuerstchen on captioned images: VQGAN, stage B with a semantic compressor, stage C."""
    settings = {"data": options.data, "seed": options.seed}
    config = configure_preset(_presets(), "scenes", options, settings)
    from teacher_training.cascade.config import CASCADE_PARTS

    names = tuple(parts.split(","))
    for name in names:
        pick(dict.fromkeys(CASCADE_PARTS), name, "part")
    if options.dry_run:
        finish_dry_run(config, options.as_json, inputs={"--data": config.data})
    from miniature.registration import register_training_scenes
    from teacher_training.cascade.train import train_cascade

    register_training_scenes()
    emit(asdict(train_cascade(config, out, names, reporter)), options.as_json, "cascade")
