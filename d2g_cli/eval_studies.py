"""Commands of `d2g eval` that study models and metrics: preferences of people, costs, robustness of FID."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

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
    reporter,
    require_range,
)
from d2g_cli.eval_options import ProtocolOptions, eval_config
from d2g_cli.inputs import check_inputs, config_inputs


@one_process
def eval_prefer(
    out: Annotated[Path, typer.Option(help="The .jsonl file of the answers; a study goes on in its file.")],
    first: Annotated[
        Path | None,
        typer.Option(help="Images of the first model: --keep of `d2g eval run`, or `d2g sample`."),
    ] = None,
    second: Annotated[
        Path | None, typer.Option(help="Images of the second model, of the same prompts.")
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Print a summary of the answers and open no page.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the orders and sides; each user has another order.")] = 0,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is open to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7861,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Serve a page on which people choose between two models, blind and side by side, or sum up answers."""
    require_range(1, 65535, port=port)
    require_range(0, 2**63 - 1, seed=seed)
    if out.suffix != ".jsonl":
        raise SettingError(f"--out is {out}; expected a name ending in .jsonl")
    if summary and (first or second):
        raise SettingError("--summary reads the answers alone; leave --first and --second out")
    if not summary and (first is None or second is None):
        raise SettingError("give --first and --second, the folders of both models' images, or --summary")
    check_inputs({"--out": out} if summary else {"--first": first, "--second": second})
    if dry_run:
        plan = {"first": str(first), "second": str(second), "out": str(out), "host": host, "port": port}
        emit(plan, as_json, "dry run: nothing was served")
        return
    from eval.study.answers import AnswerFile, read_answers, summarize_answers
    from eval.study.page import Contestants, PreferenceStudy, open_server

    if summary:
        study, answers = read_answers(out)
        facts = {"first": study.first, "second": study.second, **summarize_answers(answers)}
        emit(facts, as_json, f"{study.first} against {study.second}")
        return
    assert first is not None and second is not None
    contestants = Contestants.open(first, second)
    answer_file = AnswerFile(out, contestants.study(seed))
    server = open_server(PreferenceStudy(contestants, answer_file), host, port)
    address = f"http://{host}:{server.server_address[1]}"
    emit({"address": address, "out": str(out)}, as_json, f"open {address}; Ctrl-C ends it")
    with server:
        server.serve_forever()


@one_process
def eval_ledger(
    students: Annotated[list[str], typer.Argument(help="Runs of `d2g distill`, or exported students.")],
    scores: Annotated[
        list[str] | None,
        typer.Option(help="Result of `d2g eval run` of one of the students; repeatable."),
    ] = None,
    pair_hours: Annotated[
        float | None,
        typer.Option(help="Device hours of making the pairs, as `d2g pairs plan` predicts or a log says."),
    ] = None,
    watts: Annotated[float, typer.Option(help="Mean power of a device in watts.")] = 400.0,
    pue: Annotated[
        float, typer.Option(help="Power usage effectiveness of the data center, 1 or more.")
    ] = 1.0,
    kg_per_kwh: Annotated[
        float, typer.Option(help="Carbon intensity of electricity in kg CO2 per kWh.")
    ] = 0.48,
    as_json: Json = False,
) -> None:
    """Compare parameters, scores, device hours, training samples and kg CO2 of students."""
    from distill.config.export import CardOptions

    hours = 0.0 if pair_hours is None else pair_hours
    require_range(0, 1e9, pair_hours=hours, watts=watts, pue=pue, kg_per_kwh=kg_per_kwh)
    options = CardOptions(watts=watts, pue=pue, kg_per_kwh=kg_per_kwh)
    from distill.export.ledger import ledger_rows

    rows = ledger_rows(students, scores or [], options, pair_hours)
    if as_json:
        emit({"students": rows}, as_json, "ledger")
        return
    cells = [[key, *("" if row[key] is None else _cell(row[key]) for row in rows)] for key in rows[0]]
    emit_table(["", *(Path(row["student"]).name for row in rows)], cells, "ledger")


def _cell(value: Any) -> str:
    """A number with separated thousands, or text as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@expand_options
def eval_robustness(
    options: ProtocolOptions,
    images: Annotated[Path, typer.Option(help="Real images: a folder or parquet.")],
    num: Annotated[int, typer.Option(help="Number of images; 0: all.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A .json file for the numbers.")] = None,
) -> None:
    """Measure Frechet distances between images and their copies after JPEG, resampling or color changes."""
    require_range(0, 10**9, num=num)
    if out is not None and out.suffix != ".json":
        raise SettingError(f"--out is {out}; expected a name ending in .json")
    config = eval_config(options)
    if options.dry_run:
        plan = {"protocol_sha256": config.protocol.sha256()}
        inputs = {"--images": images} | config_inputs(config, ("features", "weights"))
        finish_dry_run(config, options.as_json, plan, inputs)
    from dataclasses import replace

    from d2g.core.atomic_files import write_atomically
    from eval.images.folders import open_images
    from eval.measure.robustness import robustness
    from eval.runner.session import EvalSession

    with leave_process_group():
        session = EvalSession(replace(config, images=str(images), metrics=("fid",)), reporter)
        facts = robustness(
            open_images(images),
            session.networks.sets["features"],
            session.protocol.preprocessing,
            count=num,
            batch_size=config.batch_size,
            progress=reporter,
        )
        facts = {"protocol": session.protocol.name, **facts}
        if out is not None:
            write_atomically(out, json.dumps(facts, indent=1))
        if options.as_json:
            emit(facts, True, "robustness")
            return
        rows = [[name, f"{value:.4g}"] for name, value in facts["distances"].items()]
        rows.append(["two random halves, unchanged", f"{facts['halves']:.4g}"])
        emit_table(["change", f"Frechet distance, {facts['features']}"], rows, f"{facts['images']} images")
