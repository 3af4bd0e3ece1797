"""Scores for a student's card: those that were measured on its weights, or on images, which are named so."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2g.core.errors import UserError
from distill.sampling import student_folder


def own_results(student: str, files: Sequence[str]) -> list[dict[str, Any]]:
    """Results of `d2g eval run`, each its JSON or the folder that holds it. Raises UserError for one that is
    none, or that was not measured on the weights that `student` has on disk, before any export of them.

    Those of images are taken, as nothing in them says who drew them: `score_lines` calls them what they are.
    """
    results = [_read(_file(given)) for given in files]
    own = _weights(student) if files else ""
    for given, result in zip(files, results, strict=True):
        source = _source(result)
        weights = str(source.get("weights_sha256") or "")
        if source.get("kind") != "images" and (source.get("kind") != "student" or weights != own):
            named = f", {source['name']}" if source.get("name") else ""
            got = f"a {source['kind']}{named}" if source.get("kind") else "a source that it does not name"
            raise UserError(
                f"--scores {_file(given)} is of {got}, weights {weights[:16] or 'not named'}; expected one "
                f"of the student {student}, weights {own[:16]}; make one with "
                f"`d2g eval run --student {student} --out FOLDER`"
            )
    return results


def score_lines(result: Mapping[str, Any]) -> list[str]:
    """One result's lines of a card: its protocol, what was measured, the numbers."""
    numbers = {k: result.get(k) for k in ("fid", "kid", "clip_score", "precision", "recall")}
    numbers |= result.get("extra", {})
    counts = ", ".join(f"{v:,} {k}" for k, v in result.get("counts", {}).items())
    told = f"`{result['protocol_sha256'][:16]}`; {counts or 'counts not given'}"
    return [
        f"Protocol `{result['protocol']}` ({told}), of {_measured(_source(result))}:",
        "",
        "| measure | value |",
        "|---|---|",
        *(f"| {k} | {v:.4g} |" for k, v in numbers.items() if isinstance(v, int | float)),
        "",
    ]


def _measured(source: Mapping[str, Any]) -> str:
    if source["kind"] == "images":
        name = Path(str(source.get("name", ""))).name
        return f"the images in `{name}`, which nobody has checked to be this student's"
    precision, scale = source.get("precision", "fp32"), source.get("noise_scale", 1.0)
    text = "these weights" + (f", in {precision}" if precision != "fp32" else "")
    return text + (f", noise scaled by {scale:g}" if scale != 1 else "")


def _file(given: str) -> Path:
    return Path(given) / "result.json" if Path(given).is_dir() else Path(given)


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"protocol", "protocol_sha256"} <= result.keys():
            raise ValueError("it names no protocol")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"--scores {path} is no evaluation result ({error}); make one with `d2g eval run --out`"
        ) from error
    return result


def _source(result: Mapping[str, Any]) -> Mapping[str, Any]:
    source = result.get("source")
    return source if isinstance(source, dict) else {}


def _weights(student: str) -> str:
    """As an evaluation names them."""
    path = student_folder(student)[0] / "ema.safetensors"
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; export another run or checkpoint"
        ) from error
