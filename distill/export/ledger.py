"""The cost of a student: the columns of Wuerstchen's table 2 that follow from its runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from d2g.core.errors import UserError
from distill.config.export import CardOptions
from distill.export.card_history import pair_stores, read_history, teacher_evaluations
from distill.export.card_scores import is_own_result, own_results
from distill.export.model_card import kg_co2
from distill.student_files import student_tensors

SCORES = ("fid", "is", "clip_score", "pickscore")
"""Numbers of results in a ledger, where they were measured."""


def ledger_rows(
    students: Sequence[str], scores: Sequence[str], options: CardOptions, pair_hours: float | None = None
) -> list[dict[str, Any]]:
    """A `ledger_row` of each student. scores: results of `d2g eval run`, each of one of the students.

    Raises UserError as `ledger_row` does, and for a result of none of the students.
    """
    scores_of: dict[str, list[str]] = {student: [] for student in students}
    for file in scores:
        owners = [student for student in students if is_own_result(student, file)]
        if not owners:
            raise UserError(
                f"--scores {file} is of none of the students; make one with `d2g eval run --student`"
            )
        for owner in owners:
            scores_of[owner].append(file)
    return [ledger_row(student, files, options, pair_hours) for student, files in scores_of.items()]


def ledger_row(
    student: str, scores: Sequence[str], options: CardOptions, pair_hours: float | None = None
) -> dict[str, Any]:
    """The cost and scores of one student (Wuerstchen, table 2). Values that are not recorded are None.

    - parameters: of the network that draws images; steps: 1.
    - samples: training images of all runs of the student.
    - pairs: number of pairs; pair_evaluations: the teacher's network evaluations for them.
    - device_hours: of the runs. pair_hours: of generating the pairs, from the caller: no store records them.
    - kg_co2: emissions of both; pairs_share: the share of the pairs.
    - protocols: of the scores, with their digests; numbers under different ones do not compare.
    - gap: why earlier runs are missing; "" if all are present.
    - scores: results of this student (`own_results`).

    Raises UserError for a damaged run and for results of another student.
    """
    history = read_history(student)
    specs, missing = pair_stores(history)
    training, results = history.device_hours, own_results(student, scores)
    # The pairs are part of the cost where there are some, known or not. An exported student records none.
    makes_pairs = bool(specs or missing or not history.stages)
    knows_pairs = bool(history.stages) and not missing
    if makes_pairs and pair_hours is None:
        hours = None
    else:
        hours = None if training is None else training + (pair_hours or 0.0)
    weights = student_tensors(student)
    return {
        "student": student,
        "parameters": sum(t.numel() for t in weights.values() if t.is_floating_point()),
        "steps": 1,
        **{key: _number(results, key, student) for key in SCORES},
        "protocols": _protocols(results),
        "samples": sum(stage.config.train.images for stage in history.stages) or None,
        "pairs": sum(spec.num_pairs for spec in specs) if knows_pairs else None,
        "pair_evaluations": teacher_evaluations(specs) if knows_pairs else None,
        "device_hours": training,
        "pair_hours": pair_hours if makes_pairs else 0.0,
        "kg_co2": None if hours is None else kg_co2(hours, options),
        "pairs_share": (pair_hours or 0.0) / hours if hours else None,
        "assumed": f"{options.watts:g} W, PUE {options.pue:g}, {options.kg_per_kwh:g} kg CO2 per kWh",
        "gap": history.gap,
    }


def _protocols(results: Sequence[Mapping[str, Any]]) -> str | None:
    """Names and digests of the protocols of results; None without results."""
    names = dict.fromkeys(f"{result['protocol']} {result['protocol_sha256'][:12]}" for result in results)
    return ", ".join(names) or None


def _number(results: Sequence[Mapping[str, Any]], key: str, student: str) -> float | None:
    """The number of the results that have it; None if none has.

    Raises UserError for different values: of other protocols, guidance scales or truncations.
    """
    found = (result.get(key, result.get("extra", {}).get(key)) for result in results)
    values = list(dict.fromkeys(float(value) for value in found if isinstance(value, int | float)))
    if len(values) > 1:
        listed = ", ".join(f"{value:g}" for value in values)
        raise UserError(f"--scores has several {key} of student {student}: {listed}; give one of them")
    return values[0] if values else None
