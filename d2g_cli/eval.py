"""`d2g eval`: measure students, teachers, pipelines and images."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.config import pick
from d2g.core.errors import SettingError
from d2g_cli.common import (
    DryRun,
    Json,
    Preset,
    Prompts,
    Sets,
    TeacherOption,
    dry,
    emit,
    emit_table,
    finishing,
    reporter,
)
from d2g_cli.eval_options import (
    Batch,
    Clip,
    Features,
    Fewer,
    Guidance,
    Images,
    Keep,
    Metrics,
    NoiseSeed,
    Num,
    Pipeline,
    ProtocolName,
    Reference,
    Steps,
    Student,
    Weights,
    Work,
    configured,
)
from d2g_cli.eval_tables import cell, lines_of

app = typer.Typer(help="Measure students, teachers, pipelines and images.", no_args_is_help=True)


@app.command("run")
def eval_run(
    student: Student = None,
    teacher: TeacherOption = None,
    pipeline: Pipeline = None,
    images: Images = None,
    reference: Reference = None,
    protocol: ProtocolName = None,
    metrics: Metrics = None,
    against: Annotated[
        str | None, typer.Option(help="The other side of dreamsim, lpips, psnr: teacher or its kept images.")
    ] = None,
    features: Features = None,
    clip: Clip = None,
    weights: Weights = None,
    prompts: Prompts = None,
    num: Num = None,
    allow_fewer: Fewer = False,
    steps: Steps = None,
    guidance: Guidance = None,
    batch_size: Batch = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for result.json, report.html and parts to go on from; or a .json file."),
    ] = None,
    work: Work = None,
    keep: Keep = None,
    train: Annotated[
        Path | None, typer.Option(help="Training images, for the report's nearest neighbours.")
    ] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Also time an image, part by part.")] = False,
    every: Annotated[bool, typer.Option("--every", help="All checkpoints of a student's run.")] = False,
    preset: Preset = None,
    sets: Sets = None,
    seed: NoiseSeed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """FID, CLIP score, precision and recall, and more, under a named protocol."""
    config = configured(locals())
    if dry_run:
        dry(config, as_json, _plan(config))
    from eval.runner.curves import run_every
    from eval.runner.run import run_evaluation

    with finishing():
        result = (run_every if config.every else run_evaluation)(config, reporter)
        emit(result if as_json else lines_of(result), as_json, f"protocol {config.protocol.name}")


@app.command("stats")
def eval_stats(
    images: Annotated[
        Path, typer.Option(help="Real images: COCO's folder as downloaded, a folder, parquet.")
    ],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write, for `eval run --reference`.")],
    protocol: ProtocolName = None,
    metrics: Metrics = None,
    features: Features = None,
    weights: Weights = None,
    allow_fewer: Fewer = False,
    batch_size: Batch = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: NoiseSeed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Statistics of real images, and a protocol's prompts, computed once, in one file to hand on."""
    if out.suffix != ".safetensors":
        raise SettingError(f"--out is {out}; expected a name ending in .safetensors")
    config = configured({name: value for name, value in locals().items() if name not in ("images", "out")})
    if dry_run:
        dry(config, as_json, _plan(config))
    from eval.runner.run import save_statistics

    with finishing():
        emit(save_statistics(config, images, out, reporter), as_json, str(out))


@app.command("curve")
def eval_curve(
    over: Annotated[
        str, typer.Option(help="guidance=1,2,4 steps=1,2,4 noise_scale=0.7,1 (truncation) or checkpoints.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for curve.json, curve.png, report.html and parts.")],
    student: Student = None,
    teacher: TeacherOption = None,
    pipeline: Pipeline = None,
    reference: Reference = None,
    protocol: ProtocolName = None,
    metrics: Metrics = None,
    features: Features = None,
    clip: Clip = None,
    weights: Weights = None,
    prompts: Prompts = None,
    num: Num = None,
    allow_fewer: Fewer = False,
    steps: Steps = None,
    guidance: Guidance = None,
    batch_size: Batch = None,
    work: Work = None,
    keep: Keep = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: NoiseSeed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """FID against CLIP score over guidance, steps, truncation or checkpoints."""
    run = configured(locals())
    from eval.protocols.config import CurveRun

    setting, _, text = over.partition("=")
    try:
        values = tuple(float(value) for value in text.split(",")) if text else ()
    except ValueError as error:
        raise SettingError(f"--over is {over!r}; expected say guidance=1,2,4 ({error})") from error
    run = replace(run, metrics=run.metrics or ("fid", "clip"))
    config = CurveRun(run=run, setting=setting, values=values)
    if dry_run:
        dry(run, as_json, {"over": setting, "values": list(values), **_plan(run)})
    from eval.runner.curves import run_curve

    with finishing():
        made = run_curve(config, reporter)
        if as_json:
            emit({"out": str(out), **made}, as_json, f"over {setting}")
        else:
            keys = [key for key in made["points"][0] if key != "ci"]
            cells = [[cell(point, key) for key in keys] for point in made["points"]]
            emit_table([made["labels"].get(key, key) for key in keys], cells, f"{made['protocol']}: {out}")


@app.command("compare")
def eval_compare(results: list[Path], as_json: Json = False) -> None:
    """A table of several results, and win rates where PickScores were kept; refuses mixed protocols."""
    from eval.runner.run import compare_results
    from miniature.registration import register_eval_scenes

    register_eval_scenes()
    found = compare_results(results)
    if as_json:
        emit(found, as_json, "comparison")
        return
    rows, wins = found["results"], found["pickscore_wins"]
    lines = [[label, *(cell(row, key) for row in rows)] for key, label in found["labels"].items()]
    title = f"{found['protocol']} {found['protocol_sha256'][:12]}"
    emit_table(["", *(row["name"] for row in rows)], lines, title)
    shown = [[win["first"], win["second"], f"{win['win_rate']:.1%}"] for win in wins]
    if shown:
        emit_table(["PickScore prefers", "to", "in"], shown, "win rates")


@app.command("protocols")
def eval_protocols(
    name: Annotated[str | None, typer.Argument(help="One of them, in full.")] = None, as_json: Json = False
) -> None:
    """The named protocols, with the digest that stands in every result."""
    from eval.protocols.protocol import PROTOCOLS
    from miniature.registration import register_eval_scenes

    register_eval_scenes()
    if name is not None:
        chosen = pick(PROTOCOLS, name, "protocol")
        emit({**chosen.settings(), "metrics": list(chosen.metrics), "sha256": chosen.sha256()}, as_json, name)
        return
    every = {key: one.settings() if as_json else one.summary() for key, one in PROTOCOLS.items()}
    emit(every, as_json, "protocols")


def _plan(config: Any) -> dict[str, Any]:
    """What a dry run adds: the digest that results will bear, but for what is known later."""
    return {"protocol_sha256": config.protocol.sha256()}
