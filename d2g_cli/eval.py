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
    emit,
    emit_table,
    expand_options,
    finish_dry_run,
    leave_process_group,
    one_process,
    presets_in_help,
    reporter,
    require_range,
    require_solver_options,
)
from d2g_cli.eval_options import (
    ProtocolOptions,
    RunOptions,
    SamplerOptions,
    eval_config,
    load_metrics,
    load_presets,
    refuse_unused_options,
)
from d2g_cli.eval_studies import eval_ledger, eval_prefer, eval_robustness
from d2g_cli.eval_tables import format_cell, readable_result
from d2g_cli.inputs import check_inputs, config_inputs

eval_app = typer.Typer(help="Measure students, teachers, pipelines and images.", no_args_is_help=True)
_Command = presets_in_help(load_presets, Metrics=load_metrics)

eval_app.command("prefer")(eval_prefer)
eval_app.command("ledger")(eval_ledger)
eval_app.command("robustness", cls=_Command)(eval_robustness)


@eval_app.command("run", cls=_Command)
@expand_options
def eval_run(options: RunOptions) -> None:
    """FID, CLIP score, precision and recall, and more, under a named protocol."""
    config = eval_config(options)
    refuse_unused_options(options, config)
    _check_source(config, options.dry_run)
    if options.dry_run:
        finish_dry_run(config, options.as_json, _plan(config), config_inputs(config, EVAL_INPUTS))
    from eval.runner.curves import run_every
    from eval.runner.run import run_evaluation

    with leave_process_group():
        result = (run_every if config.every else run_evaluation)(config, reporter)
        shown = result if options.as_json else readable_result(result)
        emit(shown, options.as_json, f"protocol {config.protocol.name}")


@eval_app.command("stats", cls=_Command)
@expand_options
def eval_stats(
    options: ProtocolOptions,
    images: Annotated[
        Path, typer.Option(help="Real images: COCO's folder as downloaded, a folder, parquet.")
    ],
    out: Annotated[
        Path, typer.Option(help="The .safetensors file to write, for --reference of `d2g eval run`.")
    ],
) -> None:
    """Compute the statistics of real images and a protocol's prompts once, in one file to pass on."""
    if out.suffix != ".safetensors":
        raise SettingError(f"--out is {out}; expected a name ending in .safetensors")
    config = eval_config(options)
    if options.dry_run:
        inputs = {"--images": images} | config_inputs(config, ("features", "weights"))
        finish_dry_run(config, options.as_json, _plan(config), inputs)
    from eval.runner.run import save_statistics

    with leave_process_group():
        emit(save_statistics(config, images, out, reporter), options.as_json, str(out))


@eval_app.command("curve", cls=_Command)
@expand_options
def eval_curve(
    options: SamplerOptions,
    over: Annotated[
        str,
        typer.Option(
            help="guidance=1,2,4 steps=1,2,4 noise_scale=0.7,1 or psi=0.7,1 (truncation) or checkpoints."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for curve.json, curve.png, report.html and parts to resume from.")
    ],
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of an earlier curve to draw in the same picture; repeatable."),
    ] = None,
) -> None:
    """FID against CLIP score over guidance, steps, truncation or checkpoints."""
    from eval.protocols.config import CurveRun

    setting, _, text = over.partition("=")
    try:
        # `checkpoints` has no values; CurveRun refuses the other settings without values.
        values = tuple(float(value) for value in text.split(",")) if text else ()
    except ValueError as error:
        raise SettingError(f"--over is {over!r}; expected for example guidance=1,2,4 ({error})") from error
    # The plan of one evaluation, repeated for each value.
    run = replace(eval_config(options), out=str(out))
    run = replace(run, metrics=run.metrics or ("fid", "clip"))
    refuse_unused_options(options, run)
    _check_source(run, options.dry_run)
    earlier = tuple(str(folder) for folder in beside or ())
    config = CurveRun(run=run, setting=setting, values=values, beside=earlier)
    if options.dry_run:
        plan = {"over": setting, "values": list(values), **_plan(run)}
        finish_dry_run(run, options.as_json, plan, config_inputs(run, EVAL_INPUTS) | {"--beside": beside})
    from eval.runner.curves import run_curve

    with leave_process_group():
        curve = run_curve(config, reporter)
        if options.as_json:
            emit({"out": str(out), **curve}, True, f"over {setting}")
        else:
            # One row per point; format_cell writes the interval beside its number.
            keys = [key for key in curve["points"][0] if key != "ci"]
            cells = [[format_cell(point, key) for key in keys] for point in curve["points"]]
            labels = [curve["labels"].get(key, key) for key in keys]
            emit_table(labels, cells, f"{curve['protocol']}: {out}")


@eval_app.command("export")
@one_process
def eval_export(
    benchmark: Annotated[
        str, typer.Option("--for", help="geneval, geneval2, dpg-bench, hpsv3, vqascore or t2i-compbench.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the images.")],
    prompts: Annotated[
        Path | None, typer.Option(help="The benchmark's prompt file; GenEval's is in the package.")
    ] = None,
    num: Annotated[int | None, typer.Option(help="Images per prompt (the benchmark's).")] = None,
    student: Annotated[
        str | None, typer.Option(help="Run folder, exported student, or a shipped name.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher to draw instead of a student.")] = None,
    prior: Annotated[
        str | None,
        typer.Option(help="Stage C of a cascade: a student for --student, else a teacher for --teacher."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps of the teacher (50).")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance of the teacher (3).")] = None,
    seed: Annotated[
        int, typer.Option(help="Image i has the noise of (seed, i); pairs have that of seed 0 by default.")
    ] = 1_000,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.")] = 32,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Draw the images of a prompt benchmark into the folder that its own tool reads. Resumes."""
    require_range(1, 10_000, batch_size=batch_size)
    require_range(0, 2**63 - 1, seed=seed)
    if num is not None:
        require_range(1, 1_000, num=num)
    require_solver_options(teacher, steps, guidance)
    if (student is None) == (teacher is None):
        raise SettingError("give one of --student and --teacher")
    inputs = {"--student": student, "--teacher": teacher, "--prior": prior, "--prompts": prompts}
    check_inputs(inputs)
    from eval.runner.benchmark_export import export_benchmark, plan_benchmark

    plan = plan_benchmark(benchmark, prompts, num)
    if dry_run:
        facts = {"benchmark": plan.layout.title, "prompts": len(plan.prompts), "images": len(plan.texts)}
        emit(facts, as_json, "dry run: nothing was drawn")
        return
    from d2g.core.distributed import process_group
    from d2g.diffusion.teacher_sampler import TEACHER_STEPS, SolverSettings, load_sampler
    from eval.runner.samplers import SamplingRequest, student_source, teacher_sampler_source

    request = SamplingRequest(prompts=plan.texts, seed=seed, device=process_group.own_device())
    if student is not None:
        source = student_source(student, request, prior=prior)
    else:
        solver = SolverSettings(steps=steps or TEACHER_STEPS, guidance=guidance, prior=prior)
        source = teacher_sampler_source(load_sampler(str(teacher), solver, request.device), request)
    emit(export_benchmark(plan, source, out, batch_size, reporter), as_json, f"for {plan.layout.title}")


@eval_app.command("compare")
@one_process
def eval_compare(
    results: Annotated[list[Path], typer.Argument(help="Results of `d2g eval run`.")], as_json: Json = False
) -> None:
    """Compare results in a table, with win rates if the results hold PickScores. Refuses mixed protocols."""
    from eval.runner.run import compare_results
    from miniature.registration import register_eval_scenes

    register_eval_scenes()
    comparison = compare_results(results)
    if as_json:
        emit(comparison, as_json, "comparison")
        return
    columns, wins = comparison["results"], comparison["pickscore_wins"]
    lines = [
        [label, *(format_cell(column, key) for column in columns)]
        for key, label in comparison["labels"].items()
    ]
    # Students may be compared with teachers of their own, or of other settings.
    if len(set(comparison["against"].values())) > 1:
        lines.append(["image by image with", *(comparison["against"][column["name"]] for column in columns)])
    title = f"{comparison['protocol']} {comparison['protocol_sha256'][:12]}"
    emit_table(["", *(column["name"] for column in columns)], lines, title)
    if wins:
        rows = [[win["first"], win["second"], f"{win['win_rate']:.1%}"] for win in wins]
        emit_table(["PickScore prefers", "to", "in"], rows, "win rates")


@eval_app.command("protocols")
@one_process
def eval_protocols(
    name: Annotated[str | None, typer.Argument(help="Show all settings of this protocol.")] = None,
    as_json: Json = False,
) -> None:
    """List the named protocols with the digest that every result states."""
    from eval.protocols.protocol import PROTOCOLS
    from miniature.registration import register_eval_scenes

    register_eval_scenes()
    if name is not None:
        protocol = pick(PROTOCOLS, name, "protocol")
        facts = {**protocol.settings(), "metrics": list(protocol.metrics), "sha256": protocol.sha256()}
        emit(facts, as_json, name)
        return
    protocols = {key: one.settings() if as_json else one.summary() for key, one in PROTOCOLS.items()}
    emit(protocols, as_json, "protocols")


EVAL_INPUTS = (
    *(
        "student",
        "prior",
        "teacher",
        "pipeline",
        "images",
        "reference",
        "against",
        "prompts",
        "features",
        "weights",
        "clip",
    ),
    "train",
)
"""Settings of an evaluation that name inputs."""


def _check_source(config: Any, dry_run: bool) -> None:
    """Check what is measured. A dry run also prints settings where nothing is chosen yet."""
    if config.sources or not dry_run:
        config.check_source()


def _plan(config: Any) -> dict[str, Any]:
    """The plan of a dry run: the protocol's digest without what is known only after loading the inputs."""
    return {"protocol_sha256": config.protocol.sha256()}
