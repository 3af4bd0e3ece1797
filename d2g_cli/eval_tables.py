"""Results of evaluations as text for people."""

from typing import Any


def format_cell(row: dict[str, Any], key: str) -> str:
    """A number and its confidence interval; empty if the row has no such number."""
    from eval.report.numbers import format_value

    return "" if row.get(key) is None else " ".join(format_value(row[key], row["ci"].get(key))).strip()


def readable_result(result: dict[str, Any]) -> dict[str, Any]:
    """A result as lines of a table: metrics, source, counts, protocol, notes, latency, checkpoints."""
    from eval.result import EvalResult

    # The result of `eval run` holds more than an EvalResult, for example checkpoints.
    known = {key: value for key, value in result.items() if key in EvalResult.__dataclass_fields__}
    evaluation = EvalResult(**known)
    lines: dict[str, Any] = dict(evaluation.rows())
    counts = ", ".join(f"{number:,} {name}" for name, number in evaluation.counts.items())
    lines["source"] = str(evaluation.source.get("name", ""))
    if evaluation.against:
        lines["image by image with"] = str(evaluation.against.get("name", ""))
    lines["counts"] = counts
    lines |= {"protocol": f"{evaluation.protocol} {evaluation.protocol_sha256[:12]}"}
    lines |= {f"note {number}": note for number, note in enumerate(evaluation.notes, 1)}
    # Latency of each model, and the numbers of each checkpoint.
    for model, entry in evaluation.latency.get("models", {}).items():
        single, best = entry["batch_1"], entry["best"]
        parts = ", ".join(f"{part} {ms:.4g}" for part, ms in single["parts_ms"].items())
        lines[f"{model}, an image"] = (
            f"{single['ms']:.4g} ms at batch 1 ({parts}); "
            f"{best['ms_per_image']:.4g} ms at batch {best['batch']}"
        )
    for row in result.get("checkpoints", []):
        metrics = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float) and k != "images")
        lines[f"{row['images']:.0f} images"] = metrics
    return lines
