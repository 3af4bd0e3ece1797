"""`d2g eval`: measure students, teachers and images."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from commands.common import DryRun, Json, Preset, Prompts, Sets, TeacherOption, configure, dry, emit, reporter
from core.config import pick
from core.errors import SettingError

app = typer.Typer(help="Measure students, teachers and images.", no_args_is_help=True)


@app.command("run")
def eval_run(
    student: Annotated[
        str | None, typer.Option(help="Run folder, exported student, or a shipped name.")
    ] = None,
    teacher: TeacherOption = None,
    images: Annotated[Path | None, typer.Option(help="Folder or parquet of images to measure.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Real images: folder or parquet.")] = None,
    protocol: Annotated[str | None, typer.Option(help="Named protocol [custom].")] = None,
    metrics: Annotated[str | None, typer.Option(help="Of fid,kid,clip,pr, comma-separated.")] = None,
    features: Annotated[
        str | None, typer.Option(help="inception, inception-tf, squeezenet, clip, oracle.")
    ] = None,
    feature_weights: Annotated[
        str | None, typer.Option(help="Its weights file (clip: name or folder).")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP for the score: open_clip name:tag or folder.")
    ] = None,
    prompts: Prompts = None,
    num: Annotated[int | None, typer.Option(help="Images to draw [one per prompt].")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps of a teacher [50].")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance of a teacher [3].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per batch [64].")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Annotated[int | None, typer.Option(help="Image i uses the noise of (seed, i) [0].")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """FID, CLIP score, precision and recall of a student, a teacher or a folder of images."""
    from eval.config import PRESETS

    given = locals()
    names = (
        "student", "teacher", "images", "reference", "protocol", "features", "feature_weights", "clip",
        "prompts", "num", "steps", "guidance", "batch_size", "seed",
    )  # fmt: skip
    options = {name: given[name] for name in names} | {
        "metrics": tuple(metrics.split(",")) if metrics else None
    }
    config = configure(pick(PRESETS, preset or "default", "preset"), options, sets)
    if dry_run:
        dry(config, as_json)
    from miniature.judge import run_evaluation

    result = run_evaluation(**asdict(config), progress=reporter)
    if out is not None:
        from core.checkpoint import write_atomically

        write_atomically(out, json.dumps(result, indent=1))
    emit(result, as_json, f"protocol {config.protocol}")


@app.command("stats")
def eval_stats(
    images: Annotated[Path, typer.Option(help="Real images: folder or parquet.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write, for `eval run --reference`.")],
    features: Annotated[str, typer.Option(help="inception, inception-tf, squeezenet or clip.")],
    feature_weights: Annotated[str, typer.Option(help="Its weights file (clip: name or folder).")],
    protocol: Annotated[str, typer.Option(help="Named protocol.")] = "custom",
    as_json: Json = False,
) -> None:
    """Feature statistics of a reference set, computed once."""
    from miniature.judge import save_statistics

    if out.suffix != ".safetensors":
        raise SettingError(f"--out is {out}; expected a name ending in .safetensors")
    emit(save_statistics(images, out, protocol, features, feature_weights, reporter), as_json, str(out))


@app.command("compare")
def eval_compare(results: list[Path], as_json: Json = False) -> None:
    """A table of several results; refuses mixed protocols."""
    from eval.result import EvalResult, compare

    rows = compare({str(path): EvalResult.load(path) for path in results})
    emit({"results": rows}, as_json, "comparison")
