"""Scores on a model card: only results measured on the exported weights, or on images, labeled as such."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from d2g.core.errors import UserError
from d2g.core.json_files import check_type, parse_json
from d2g.core.regular_files import open_regular
from d2g.vision.weights import file_sha256
from distill.student_files import student_folder

METRICS = ("fid", "kid", "clip_score", "precision", "recall")


def own_results(student: str, files: Sequence[str]) -> list[dict[str, Any]]:
    """Read results of `d2g eval run`, each given as its JSON file or the folder that holds it.

    Raises UserError for a file that is no result, and for a result that was not measured on the weights that
    `student` has on disk before the export. Results of image folders are accepted, because nothing in them
    says which network drew the images; `score_table` labels them.
    """
    results = [_read_result(_result_file(file)) for file in files]
    own_sha256 = _weights_sha256(student) if files else ""
    for file, result in zip(files, results, strict=True):
        source = _source(result)
        weights = str(source.get("weights_sha256") or "")
        # A result of other weights says nothing about this student.
        if source.get("kind") != "images" and (source.get("kind") != "student" or weights != own_sha256):
            name = f", {source['name']}" if source.get("name") else ""
            got = f"a {source['kind']}{name}" if source.get("kind") else "a source that it does not name"
            raise UserError(
                f"--scores {_result_file(file)} is of {got}, weights {weights[:16] or 'not named'}; expected "
                f"one of the student {student}, weights {own_sha256[:16]}; make one with "
                f"`d2g eval run --student {student} --out FOLDER`"
            )
    return results


def is_own_result(student: str, file: str) -> bool:
    """Whether a result was measured on the weights of a student. Raises UserError for a file that is none."""
    source = _source(_read_result(_result_file(file)))
    return source.get("kind") == "student" and source.get("weights_sha256") == _weights_sha256(student)


def score_table(result: Mapping[str, Any]) -> dict[str, Any]:
    """Contents of one result on the card: protocol, digest, counts, subject, how it was drawn, numbers, and
    whether they were measured on the exported weights."""
    numbers = {name: result.get(name) for name in METRICS} | result.get("extra", {})
    return {
        "protocol": result["protocol"],
        "digest": result["protocol_sha256"][:16],
        "counts": ", ".join(f"{count:,} {name}" for name, count in result.get("counts", {}).items()),
        "subject": _subject(_source(result)),
        "sampling": _sampling_settings(_source(result)),
        "measured_on_weights": _source(result)["kind"] == "student",
        "numbers": {name: value for name, value in numbers.items() if isinstance(value, int | float)},
    }


def eval_results(table: Mapping[str, Any], task: str) -> list[Any]:
    """The numbers of one `score_table` as huggingface_hub.EvalResult, for the card's model-index of a `task`.

    Empty for images that nobody has checked to be this student's.
    """
    from huggingface_hub import EvalResult

    if not table["measured_on_weights"]:
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=table["protocol"],
            dataset_name=f"{table['protocol']} ({table['digest']}{table['sampling']})",
            metric_type=name,
            metric_value=value,
            verified=False,
        )
        for name, value in table["numbers"].items()
        if math.isfinite(value)
    ]


def _subject(source: Mapping[str, Any]) -> str:
    """Describe in words what the numbers were measured on."""
    if source["kind"] == "images":
        name = Path(str(source.get("name", ""))).name
        return f"the images in `{name}`, which nobody has checked to be this student's"
    return f"these weights{_sampling_settings(source)}"


def _sampling_settings(source: Mapping[str, Any]) -> str:
    """How a student drew its images where that is not usual: precision, guidance, truncation; "" if it is."""
    precision, scale = source.get("precision", "fp32"), source.get("noise_scale", 1.0)
    text = f", in {precision}" if precision != "fp32" else ""
    guidance = source.get("guidance")
    text += f", at guidance {guidance:g}" if isinstance(guidance, int | float) else ""
    return text + (f", noise scaled by {scale:g}" if scale != 1 else "")


def _result_file(path: str) -> Path:
    return Path(path) / "result.json" if Path(path).is_dir() else Path(path)


class Result(TypedDict):
    """The fields that the card takes from a result of `d2g eval run`."""

    protocol: str
    protocol_sha256: str
    counts: NotRequired[dict[str, int]]
    extra: NotRequired[dict[str, float | None]]


def _read_result(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            result: dict[str, Any] = parse_json(file.read())
        check_type(result, Result)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--scores {path} is no evaluation result ({error}); make one with `d2g eval run --out`"
        ) from error
    return result


def _source(result: Mapping[str, Any]) -> Mapping[str, Any]:
    source = result.get("source")
    return source if isinstance(source, dict) else {}


def _weights_sha256(student: str) -> str:
    """SHA-256 of the student's weights file, as evaluation results record it."""
    path = student_folder(student)[0] / "ema.safetensors"
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; export another run or checkpoint"
        ) from error
