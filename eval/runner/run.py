"""What `d2g eval` calls: one evaluation, reference statistics, and several results in one table."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed import process_group
from d2g.core.errors import SettingError
from d2g.core.progress import Progress, quiet
from eval.evaluation import Evaluation
from eval.images.folders import open_images
from eval.measure.build_reference import build_reference, keep_reference, reference_files
from eval.measure.latency import measure_latency
from eval.measure.measure import Measure, measure_source
from eval.measure.rows import MeasureOptions
from eval.measure.source import ImageSource, image_source
from eval.metrics.nearest import nearest_neighbors
from eval.metrics.win_rate import win_rate
from eval.protocols.config import EvalRun
from eval.protocols.metric import number_labels, referenced_metrics
from eval.report.gallery import Pictures, beside_nearest
from eval.report.html import write_report
from eval.report.page import LazyImages, first_images, report_data
from eval.result import EvalResult, compare
from eval.runner.session import EvalSession

NEAREST = 8  # images whose neighbours in the training set the report shows
NEIGHBOURS = 4


def run_evaluation(config: EvalRun, progress: Progress = quiet) -> dict[str, Any]:
    """Measure a student, a teacher, a pipeline or images under a named protocol; the result as JSON.

    With an `out` folder: result.json, rows.safetensors (scores of each image), report.html, and the parts to
    go on from. Raises SettingError when what is to be measured, or what it is measured with, is missing or
    given twice.
    """
    bench = EvalSession(config, progress)
    source, found = bench.measure(config)
    if config.latency:
        found = replace(found, result=replace(found.result, latency=latency(bench, source)))
    if process_group.rank() == 0:
        _write(bench, source, found)
    process_group.barrier()
    return found.result.to_json()


def latency(bench: EvalSession, source: ImageSource) -> dict[str, Any]:
    """How long an image takes, of a student beside its teacher; on rank 0 only."""
    if source.parts is None:
        raise SettingError("--latency times a sampler; images are already drawn, leave it out")
    if process_group.rank() != 0:
        return {}
    kind = str(source.facts["kind"])
    models = {kind: source.parts}
    if kind == "student" and bench.teacher is not None:
        teacher = bench.other if bench.other and bench.other.parts else None
        models["teacher"] = (teacher or bench.teacher_source(bench.teacher, bench.config)).parts  # type: ignore[assignment]
    repeats = bench.config.latency_repeats
    return measure_latency(models, bench.device, repeats=repeats, warmup=max(1, repeats // 5))


def _write(bench: EvalSession, source: ImageSource, found: Evaluation) -> None:
    """The files that the config asks for."""
    out = bench.config.out
    if out is None:
        return
    text = json.dumps(found.result.to_json(), indent=1)
    if out.endswith(".json"):
        write_atomically(Path(out), text)
        return
    folder = Path(out)
    write_atomically(folder / "result.json", text)
    scores = {name: rows.contiguous() for name, rows in found.rows.values.items() if rows.ndim == 1}
    write_atomically(folder / "rows.safetensors", save(scores, {"prompts": json.dumps(found.rows.prompts)}))
    data = report_data(
        _name(source), source, found, other=bench.other, nearest=_nearest(bench, source, found)
    )
    write_report(folder / "report.html", data)


def _name(source: ImageSource) -> str:
    return str(source.facts["kind"])


def _nearest(bench: EvalSession, source: ImageSource, found: Evaluation) -> list[Pictures]:
    """The first images beside the training images that are nearest in the protocol's features."""
    if bench.config.train is None:
        return []
    if "features" not in found.rows.values:
        raise SettingError("--train looks for neighbours in the protocol's features; add fid to the metrics")
    net, size = bench.networks.sets["features"], bench.protocol.preprocessing
    training = image_source(open_images(bench.config.train))
    assert training.count is not None
    measure = {"features": Measure(size=size, function=lambda images, _: net(images).float())}
    rows = measure_source(
        training, range(training.count), measure, work=MeasureOptions(), progress=bench.progress
    )
    generated = found.rows.values["features"][:NEAREST]
    near = nearest_neighbors(
        generated, rows.values["features"].split(4096), k=min(NEIGHBOURS, training.count)
    )
    return [
        beside_nearest(
            near,
            first_images(source, len(generated)),
            LazyImages(training, training.count),
            found.rows.prompts[: len(generated)],
            features=net.name,
        )
    ]


# References and tables


def save_statistics(config: EvalRun, images: Path, out: Path, progress: Progress = quiet) -> dict[str, Any]:
    """Statistics of a protocol's real images, and its prompts, in one file for `--reference`.

    `images`: what people download (COCO's folder), or any folder or parquet. A run that was killed goes on
    when run again. Raises SettingError when no metric needs a reference.
    """
    metrics = config.metrics or config.protocol.metrics
    compared = tuple(referenced_metrics(metrics))
    if not compared:
        raise SettingError(f"metrics {', '.join(metrics)} need no reference; name some that do, say fid")
    bench = EvalSession(replace(config, images=str(images), metrics=compared), progress)
    files, prompts = reference_files(images, bench.protocol)
    work = MeasureOptions(batch_size=config.batch_size, folder=out.with_suffix(".work"))
    sets = bench.networks.sets
    built = build_reference(
        image_source(files),
        bench.protocol,
        sets,
        prompts=prompts,
        allow_fewer=config.allow_fewer,
        work=work,
        progress=progress,
    )
    keep_reference(built, out, work, bench.protocol.pr_images)
    networks = {name: {"name": net.name, "sha256": net.sha256} for name, net in sets.items()}
    return {"out": str(out), **built.facts, "prompts": len(prompts), "networks": networks}


def compare_results(paths: Sequence[Path]) -> dict[str, Any]:
    """A row per result, what to call its numbers, and who wins how often by PickScore, where the scores of
    each image were kept. Raises UserError for results that do not compare.
    """
    results = {str(path): EvalResult.load(path) for path in paths}
    rows = compare(results)
    scores = {name: _scores(Path(name)) for name in sorted(results)}
    wins = []
    names = [name for name, found in scores.items() if found is not None]
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            a, b = scores[first], scores[second]
            assert a is not None and b is not None
            found = win_rate(a, b)
            wins.append(
                {
                    "first": first,
                    "second": second,
                    "win_rate": found.rate,
                    "ci": list(found.interval),
                    "wins": found.wins,
                    "ties": found.ties,
                    "losses": found.losses,
                }
            )
    models = {name: facts for result in results.values() for name, facts in result.models.items()}
    any_of = next(iter(results.values()))
    labels = number_labels(models)
    keys = dict.fromkeys(key for result in results.values() for key in result.numbers())
    return {
        "protocol": any_of.protocol,
        "protocol_sha256": any_of.protocol_sha256,
        "labels": {key: labels.get(key, key) for key in keys},
        "results": rows,
        "pickscore_wins": wins,
    }


def _scores(folder: Path) -> Tensor | None:
    file = folder / "rows.safetensors"
    return load_file(file).get("pickscore") if file.is_file() else None
