"""`d2g sample` and `d2g export`: use a finished student."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.config import pick
from d2g_cli.common import (
    DryRun,
    Json,
    Out,
    Preset,
    Prompts,
    Sets,
    TeacherOption,
    chosen,
    configure,
    dry,
    emit,
    reporter,
)


def sample(
    student: Annotated[
        str | None, typer.Option(help="Run folder, exported student, or a shipped name.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text, or a class number (every class); repeatable.")
    ] = None,
    prompts: Prompts = None,
    out: Out = Path("samples"),
    num: Annotated[int | None, typer.Option(help="Images per prompt (1).")] = None,
    teacher: TeacherOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step (32).")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Scale to imitate, for a student that is told it (8).")
    ] = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Annotated[int | None, typer.Option(help="Image i uses the noise of (seed, i) (0).")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Draw images in one step: PNGs that carry their prompt, and a grid."""
    from distill.config.run import SAMPLE_PRESETS

    options = {
        "student": student, "prompt": tuple(prompt) if prompt else None, "prompts": prompts, "num": num,
        "teacher": teacher, "batch_size": batch_size, "seed": seed, "guidance": guidance,
    }  # fmt: skip
    config = chosen(SAMPLE_PRESETS, preset or "default", options, sets)
    if dry_run:
        dry(config, as_json)
    from distill.sampling import own_prompts, save_samples
    from pairgen.prompts import read_prompts

    texts = [*config.prompt, *(read_prompts(Path(config.prompts)) if config.prompts else [])]
    texts = texts or own_prompts(config.student, config.teacher)
    texts = [text for text in texts for _ in range(config.num)]
    drawn = save_samples(
        config.student, texts, out, config.seed, config.batch_size, config.teacher, config.guidance, reporter
    )
    emit(drawn, as_json, "samples")


def export(
    student: Annotated[str | None, typer.Option(help="Run folder, or exported student.")] = None,
    out: Out = Path("exported"),
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="safetensors (default), diffusers: a pipeline folder, lora: adapters only, or onnx.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16 (safetensors fp16, else fp32).")
    ] = None,
    teacher: TeacherOption = None,
    scores: Annotated[
        list[Path] | None, typer.Option(help="A result of `d2g eval run` for the card; repeatable.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="License of the teacher, if its folder states none.")
    ] = None,
    watts: Annotated[
        float | None, typer.Option(help="A device's mean power, for the CO2 of the card (400).")
    ] = None,
    kg_per_kwh: Annotated[
        float | None, typer.Option(help="CO2 of electricity, kg a kWh, for the card (0.48).")
    ] = None,
    preset: Preset = None,
    sets: Sets = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a student for others: small safetensors, a diffusers pipeline, adapters or ONNX, with a card."""
    from distill.config.export import EXPORT_PRESETS
    from distill.export.export import export

    config = pick(EXPORT_PRESETS, preset or "default", "preset")
    card: dict[str, Any] = {"scores": list(map(str, scores or [])) or None, "license": license}
    card |= {"watts": watts, "kg_per_kwh": kg_per_kwh}
    # With --set, not before: which formats have a card is known when all is.
    sets = [*(f"card.{k}={json.dumps(v)}" for k, v in card.items() if v is not None), *(sets or [])]
    config = configure(config, {"student": student, "format": form, "dtype": dtype, "teacher": teacher}, sets)
    if dry_run:
        dry(config, as_json)
    import torch

    emit(export(config, out, "cuda" if torch.cuda.is_available() else "cpu"), as_json, "export")
