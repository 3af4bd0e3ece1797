"""Evaluate at several values of one setting: a curve, or the checkpoints of a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from d2g.core.atomic_files import write_atomically
from d2g.core.config import differing
from d2g.core.distributed import process_group
from d2g.core.errors import SettingError, UserError
from d2g.core.json_files import read_json_object
from d2g.core.progress import Progress, quiet
from eval.evaluation import Evaluation
from eval.measure.source import ImageSource
from eval.protocols.config import CurveRun, EvalRun
from eval.protocols.metric import number_labels
from eval.report.charts import Curve, plot_curve
from eval.report.html import write_report
from eval.report.page import fid_clip_curve, metrics_of, report_data
from eval.runner.result_files import write_result
from eval.runner.samplers import checkpoints
from eval.runner.session import EvalSession


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """One value of the setting, and the evaluation at this value."""

    value: float
    source: ImageSource
    evaluation: Evaluation

    def row(self, setting: str) -> dict[str, Any]:
        """The point as JSON."""
        result = self.evaluation.result
        return {setting: self.value, **result.numbers(), "ci": result.ci}


def run_curve(config: CurveRun, progress: Progress = quiet) -> dict[str, Any]:
    """Measure FID and CLIP score at several values of one setting (StyleGAN-T, Fig. 5).

    With an `out` folder, writes curve.json, curve.png, report.html, and the parts of each point from which an
    interrupted curve resumes. Raises SettingError for a setting that the sampler does not have.
    """
    # Check the settings, and read earlier curves to draw beside this one.
    _check(config)
    earlier = {folder: _read_curve(Path(folder), config) for folder in config.beside}
    session = EvalSession(config.run, progress)
    if not {"fid", "clip"} <= set(session.metrics):
        raise SettingError("a curve is of FID over CLIP score, so its metrics must have fid and clip")

    # Measure all points. Rank 0 writes the curve.
    with session.sole_evaluation():
        points = measure_points(session, config)
        facts = _facts(points, config.setting)
        if config.run.out is not None and process_group.rank() == 0:
            out = Path(config.run.out)
            write_atomically(out / "curve.json", json.dumps(facts, indent=1))
            rows = [{**row, "label": _label(row[config.setting])} for row in facts["points"]]
            lines = {config.setting: rows}
            if earlier:
                lines = {Path(out).name: rows}
                for folder, before in earlier.items():
                    _require_same_protocol(folder, before, facts)
                    lines[Path(folder).name] = [
                        {**row, "label": _label(row[config.setting])} for row in before["points"]
                    ]
            curve = fid_clip_curve(lines, label=facts["labels"]["fid"])
            plot_curve(curve, out / "curve.png")
            _write_report(out, points, config.setting, [curve])
        process_group.barrier()
    return facts


class CurveFile(TypedDict):
    """The fields that are read from an earlier curve.json."""

    protocol_sha256: str
    setting: str
    points: list[dict[str, Any]]
    models: dict[str, dict[str, str]]


def _read_curve(folder: Path, config: CurveRun) -> dict[str, Any]:
    """An earlier curve over the same setting. Raises UserError for a folder that has none, or another one."""
    if config.run.out is None or Path(config.run.out).name == folder.name:
        raise SettingError(f"--beside {folder} needs an --out of another name; both names are in the picture")
    facts = read_json_object(folder / "curve.json", "make one with `d2g eval curve`", CurveFile)
    if facts["setting"] != config.setting:
        raise SettingError(f"--beside {folder} is a curve over {facts['setting']}, not over {config.setting}")
    return facts


def _require_same_protocol(folder: str, before: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raise UserError for a curve that does not compare."""
    names = ("protocol_sha256", "models")
    if differ := differing({n: before[n] for n in names}, {n: facts[n] for n in names}):
        raise UserError(f"--beside {folder} does not compare: {'; '.join(differ)}; evaluate both alike")


def run_every(config: EvalRun, progress: Progress = quiet) -> dict[str, Any]:
    """Evaluate all checkpoints of a student's run: the newest one's result, and a row for each checkpoint.

    The rows are under `checkpoints`. With an `out` folder, writes result.json and rows.safetensors of the
    newest checkpoint, checkpoints.json, report.html with the numbers over training, and each checkpoint's
    parts.
    """
    if config.latency:
        raise SettingError("--latency is of one student; leave --every out")
    session = EvalSession(config, progress)
    with session.sole_evaluation():
        points = measure_points(session, CurveRun(run=config, setting="checkpoints"))
        facts, newest = _facts(points, "images"), points[-1].evaluation.result.to_json()
        if config.out is not None and process_group.rank() == 0:
            if config.out.endswith(".json"):
                write_atomically(Path(config.out), json.dumps(facts, indent=1))
            else:
                out = Path(config.out)
                write_result(out, points[-1].evaluation)
                write_atomically(out / "checkpoints.json", json.dumps(facts, indent=1))
                _write_report(out, points, "images", _over_training(facts))
        process_group.barrier()
    return newest | {"checkpoints": facts["points"]}


def measure_points(session: EvalSession, config: CurveRun) -> list[CurvePoint]:
    """Evaluate every point. Networks and reference are loaded once; each point has its own work folder.

    Raises UserError for a checkpoint that does not exist.
    """
    folders: Mapping[float, Path | None] = dict.fromkeys(config.values)
    if config.setting == "checkpoints":
        folders = _checkpoints(str(config.run.student), config.values)
    points: list[CurvePoint] = []
    for value, folder in folders.items():
        session.progress(f"points over {config.setting}", len(points), len(folders))
        source, evaluation = session.measure(run_at(config, value), folder)
        points.append(CurvePoint(value=value, source=source, evaluation=evaluation))
    session.progress(f"points over {config.setting}", len(points), len(folders))
    return points


def run_at(config: CurveRun, value: float) -> EvalRun:
    """The run at one value, with folders of its own."""
    run, name = config.at(value), f"{config.setting}-{_label(value)}"
    if run.keep is not None:
        run = replace(run, keep=str(Path(run.keep) / name))
    if run.work is not None:
        return replace(run, work=str(Path(run.work) / name))
    if run.out is not None and not run.out.endswith(".json"):
        return replace(run, work=str(Path(run.out) / "work" / name))
    return run


def _label(value: float) -> str:
    """The value in names and labels: the images of a checkpoint with all their digits."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:g}"


def _checkpoints(run: str, values: Sequence[float]) -> dict[float, Path | None]:
    """Checkpoint folders by their number of training images: those of `values`, or all."""
    listed = process_group.gather_objects(checkpoints(run))[0]  # those that rank 0 sees
    folders: dict[float, Path | None] = {float(folder.name): folder for folder in listed}
    if missing := sorted(set(values) - set(folders)):
        known = ", ".join(f"{number:.0f}" for number in folders)
        raise UserError(f"{run} has no checkpoint at {missing[0]:.0f} images; it has {known}")
    return {value: folders[value] for value in values or folders}


def _check(config: CurveRun) -> None:
    """Raise SettingError for a setting that the measured thing does not have."""
    run, setting = config.run, config.setting
    if run.out is not None and run.out.endswith(".json"):
        raise SettingError(f"--out is {run.out}; a curve writes several files, give a folder")
    student = run.student is not None
    sampler = not student and run.images is None
    fits = {
        **dict.fromkeys(("noise_scale", "psi", "checkpoints"), student),
        "guidance": student or sampler,  # of students, only some take it
        "steps": sampler,
    }
    if not fits[setting]:
        kind = "a student" if student else "a teacher or pipeline" if sampler else "images"
        usable = ", ".join(name for name, fit in fits.items() if fit) or "none"
        raise SettingError(f"--over {setting} has no effect on {kind}; expected one of: {usable}")


def _facts(points: Sequence[CurvePoint], setting: str) -> dict[str, Any]:
    """The curve as JSON."""
    first = points[0].evaluation.result
    labels = number_labels(first.models)
    return {
        "protocol": first.protocol,
        "protocol_sha256": first.protocol_sha256,
        "setting": setting,
        "points": [point.row(setting) for point in points],
        "labels": {key: labels.get(key, key) for key in first.numbers()},
        "models": first.models,
        "notes": first.notes,
    }


def _over_training(facts: Mapping[str, Any]) -> list[Curve]:
    """A chart of each number over the images trained on."""
    labels, rows = facts["labels"], facts["points"]
    keys = [key for key in rows[0] if key not in ("images", "ci")]
    return [
        Curve(
            title=labels.get(key, key),
            x="images trained on",
            y=labels.get(key, key),
            lines={"student": [(row["images"], row[key]) for row in rows]},
        )
        for key in keys
    ]


def _write_report(out: Path, points: Sequence[CurvePoint], setting: str, curves: Sequence[Curve]) -> None:
    last = points[-1]
    data = report_data(str(last.source.facts["kind"]), last.source, last.evaluation, curves=curves)
    results = {f"{setting} {_label(point.value)}": point.evaluation.result for point in points}
    title = f"{last.evaluation.result.protocol}, over {setting}"
    write_report(out / "report.html", replace(data, title=title, metrics=metrics_of(results)))
