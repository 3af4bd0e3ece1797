"""The functions behind `d2g eval`: one evaluation, reference statistics, a table of several results."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed import process_group
from d2g.core.errors import SettingError, UserError, first_line
from d2g.core.machine_errors import raise_machine_error
from d2g.core.progress import Progress, quiet
from d2g.core.tracking.run_directory import sole_owner
from eval.evaluation import Evaluation
from eval.images.folders import open_images
from eval.measure.build_reference import build_reference, reference_files, save_reference
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
from eval.runner.result_files import write_result
from eval.runner.session import EvalSession

NEAREST = 8
"""Images whose nearest training images the report shows."""
NEIGHBORS = 4
"""Training images shown beside each of them."""


def run_evaluation(config: EvalRun, progress: Progress = quiet) -> dict[str, Any]:
    """Measure a student, a teacher, a pipeline or images under a named protocol; return the result as JSON.

    With an `out` folder, writes result.json, rows.safetensors (scores of each image), report.html, and the
    parts from which an interrupted evaluation resumes. Raises SettingError when what to measure, or what to
    measure it with, is missing or given twice; UserError while another evaluation works in these folders.
    """
    session = EvalSession(config, progress)
    report = config.out is not None and not config.out.endswith(".json")
    if report and config.train is not None and not session.needs_features:
        raise SettingError("--train looks for neighbors in the protocol's features; add fid to the metrics")
    with session.sole_evaluation():
        source, evaluation = session.measure(config)
        # Every process measures its share of the training pictures.
        training_rows = _training_features(session) if report and config.train is not None else None
        try:
            if config.latency:
                timed = replace(evaluation.result, latency=latency(session, source))
                evaluation = replace(evaluation, result=timed)
        finally:  # the numbers are written even where the latency cannot be measured
            if process_group.rank() == 0:
                _write(session, source, evaluation, training_rows)
        process_group.barrier()
    return evaluation.result.to_json()


def latency(session: EvalSession, source: ImageSource) -> dict[str, Any]:
    """Measure the time per image, of a student beside its teacher; on rank 0 only."""
    if source.parts is None:
        raise SettingError("--latency times a sampler; images are already drawn, leave it out")
    if process_group.rank() != 0:
        return {}
    kind = str(source.facts["kind"])
    models = {kind: source.parts}
    if kind == "student" and session.teacher is not None:
        other = session.other if session.other and session.other.parts else None
        teacher = other or session.teacher_source(session.teacher, session.config)
        assert teacher.parts is not None, "a teacher is a sampler"
        models["teacher"] = teacher.parts
    repeats = session.config.latency_repeats
    warmup, progress = max(1, repeats // 5), session.progress
    return measure_latency(models, session.device, repeats=repeats, warmup=warmup, progress=progress)


def _write(
    session: EvalSession, source: ImageSource, evaluation: Evaluation, training_rows: Tensor | None
) -> None:
    """Write the files that the config asks for."""
    out = session.config.out
    if out is None:
        return
    # A file gets the numbers alone.
    if out.endswith(".json"):
        write_atomically(Path(out), json.dumps(evaluation.result.to_json(), indent=1))
        return
    # A folder also gets the scores of each image, and the report.
    folder = Path(out)
    write_result(folder, evaluation)
    nearest = []
    if training_rows is not None:
        nearest.append(_nearest_images(session, source, evaluation, training_rows))
    kind = str(source.facts["kind"])
    data = report_data(kind, source, evaluation, other=session.other, nearest=nearest)
    write_report(folder / "report.html", data)


def _training_features(session: EvalSession) -> Tensor:
    """The protocol's features of the training pictures. Call it on every rank."""
    assert session.config.train is not None
    net, size = session.networks.sets["features"], session.protocol.preprocessing
    training = image_source(open_images(session.config.train))
    assert training.count is not None
    measure = {"features": Measure(size=size, function=lambda images, _: net(images).float())}
    rows = measure_source(
        training, range(training.count), measure, work=MeasureOptions(), progress=session.progress
    )
    return rows.values["features"]


def _nearest_images(
    session: EvalSession, source: ImageSource, evaluation: Evaluation, training_rows: Tensor
) -> Pictures:
    """The first images beside the training images that are nearest in the protocol's features."""
    assert session.config.train is not None
    rows, count = evaluation.rows, len(training_rows)
    # The training rows are compared in chunks to bound the distance matrix.
    generated = rows.values["features"][:NEAREST]
    near = nearest_neighbors(generated, training_rows.split(4096), k=min(NEIGHBORS, count))
    return beside_nearest(
        near,
        first_images(source, len(generated)),
        LazyImages(image_source(open_images(session.config.train)), count),
        rows.prompts[: len(generated)],
        features=session.networks.sets["features"].name,
    )


def save_statistics(config: EvalRun, images: Path, out: Path, progress: Progress = quiet) -> dict[str, Any]:
    """Write statistics of a protocol's real images, and its prompts, to one file for `--reference`.

    `images`: COCO's folder as downloaded, or any folder or parquet file. An interrupted run resumes when run
    again. Raises SettingError when no metric needs a reference.
    """
    metrics = config.metrics or config.protocol.metrics
    compared = tuple(referenced_metrics(metrics))
    if not compared:
        raise SettingError(f"metrics {', '.join(metrics)} need no reference; name some that do, say fid")
    session = EvalSession(replace(config, images=str(images), metrics=compared), progress)
    folder = out.with_suffix(".work")
    work = MeasureOptions(batch_size=config.batch_size, folder=folder)
    with sole_owner(folder, "measures in"):
        # Measure the images of the protocol's reference set.
        files, prompts = reference_files(images, session.protocol)
        sets = session.networks.sets
        reference = build_reference(
            image_source(files),
            session.protocol,
            sets,
            prompts=prompts,
            allow_fewer=config.allow_fewer,
            work=work,
            progress=progress,
        )
        # Write the file first: an interrupted run still finds its parts in the work folder.
        save_reference(reference, out, work, session.protocol.pr_images)
    networks = {name: {"name": net.name, "sha256": net.sha256} for name, net in sets.items()}
    return {"out": str(out), **reference.facts, "prompts": len(prompts), "networks": networks}


def compare_results(paths: Sequence[Path]) -> dict[str, Any]:
    """Put several results in one table: a row per result, labels of its numbers, and PickScore win rates.

    `against`: what each was compared with image by image, which need not be the same.

    Win rates need the per-image scores that an `out` folder keeps. Raises UserError for results that do not
    compare.
    """
    results = {str(path): EvalResult.load(path) for path in paths}
    # Refuse results that do not compare before building the table.
    rows = compare(results)
    models = {name: facts for result in results.values() for name, facts in result.models.items()}
    first = next(iter(results.values()))
    labels = number_labels(models)
    # A dict keeps the columns in the order of their first result.
    keys = dict.fromkeys(key for result in results.values() for key in result.numbers())
    return {
        "protocol": first.protocol,
        "protocol_sha256": first.protocol_sha256,
        "labels": {key: labels.get(key, key) for key in keys},
        "results": rows,
        "against": {name: str(result.against.get("name", "")) for name, result in results.items()},
        "pickscore_wins": _win_rates(results),
    }


def _win_rates(results: Mapping[str, EvalResult]) -> list[dict[str, Any]]:
    """PickScore win rates of every two results that kept their scores."""
    names = sorted(results)
    scores = {name: values for name in names if (values := _pickscores(name, results[name])) is not None}
    wins = []
    for first, second in itertools.combinations(scores, 2):
        # How often the first image of a prompt scores higher.
        outcome = win_rate(scores[first], scores[second])
        wins.append(
            {
                "first": first,
                "second": second,
                "win_rate": outcome.rate,
                "ci": list(outcome.interval),
                "wins": outcome.wins,
                "ties": outcome.ties,
                "losses": outcome.losses,
            }
        )
    return wins


def _pickscores(name: str, result: EvalResult) -> Tensor | None:
    """The PickScores of the images of a result's folder. Raises UserError for damaged or foreign ones."""
    file = Path(name) / "rows.safetensors"
    if not file.is_file():
        return None
    try:
        scores = load_file(file).get("pickscore")
    except (OSError, SafetensorError) as error:
        raise_machine_error(error)
        raise UserError(f"{file} is damaged ({first_line(error)}); evaluate it again") from error
    images = result.counts.get("images")
    if scores is not None and scores.shape != (images,):
        raise UserError(
            f"{file} holds {scores.numel()} PickScores, the result is of {images} images; evaluate it again"
        )
    return scores
