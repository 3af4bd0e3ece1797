"""`d2g demo` and `d2g doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from commands.common import DryRun, Json, Preset, Seed, Sets, configure, dry, emit, reporter
from core.config import pick


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
    from miniature.demo import PRESETS, run_demo

    config = configure(
        pick(PRESETS, preset or ("quick" if quick else "default"), "preset"), {"seed": seed}, sets
    )
    if dry_run:
        dry(config, as_json)
    result = run_demo(config, out, reporter)
    emit(result, as_json, f"pictures and curves: {result.report}")


def doctor(as_json: Json = False) -> None:
    """What this machine has, and what stands in the way."""
    from core.doctor import examine

    emit(examine(), as_json, "d2g doctor")
