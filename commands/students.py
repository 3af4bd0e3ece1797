"""`d2g sample` and `d2g export`: use a finished student."""

from pathlib import Path
from typing import Annotated

import typer

from commands.common import (
    DryRun,
    Json,
    Out,
    Preset,
    Prompts,
    Sets,
    TeacherOption,
    configure,
    dry,
    emit,
    reporter,
)
from core.config import pick
from core.errors import SettingError


def sample(
    student: Annotated[
        str | None, typer.Option(help="Run folder, exported student, or a shipped name.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text; repeatable.")] = None,
    prompts: Prompts = None,
    out: Out = Path("samples"),
    num: Annotated[int | None, typer.Option(help="Images per prompt [1].")] = None,
    teacher: TeacherOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step [32].")] = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Annotated[int | None, typer.Option(help="Image i uses the noise of (seed, i) [0].")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Draw images in one step: PNGs that carry their prompt, and a grid."""
    from distill.config import SAMPLE_PRESETS

    options = {
        "student": student, "prompt": tuple(prompt) if prompt else None, "prompts": prompts, "num": num,
        "teacher": teacher, "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    config = configure(pick(SAMPLE_PRESETS, preset or "default", "preset"), options, sets)
    if dry_run:
        dry(config, as_json)
    from distill.sample import save_samples
    from pairgen.prompts import read_prompts

    texts = [*config.prompt, *(read_prompts(Path(config.prompts)) if config.prompts else [])]
    if not texts:
        raise SettingError("nothing to draw; give --prompt TEXT or --prompts FILE")
    texts = [text for text in texts for _ in range(config.num)]
    drawn = save_samples(config.student, texts, out, config.seed, config.batch_size, config.teacher, reporter)
    emit(drawn, as_json, "samples")


def export(
    student: Annotated[str, typer.Option(help="Run folder.")],
    out: Out,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp16",
    as_json: Json = False,
) -> None:
    """Write a run's student as a small safetensors folder that `sample` and `distill gan --init` take."""
    from distill.export import export_student

    emit(export_student(student, out, dtype), as_json, "export")
