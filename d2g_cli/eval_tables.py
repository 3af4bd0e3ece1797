"""Results of evaluations as people see them."""

from typing import Any


def cell(row: dict[str, Any], key: str) -> str:
    """A number and its interval, where the row has them."""
    from eval.report.numbers import format_value

    return "" if row.get(key) is None else " ".join(format_value(row[key], row["ci"].get(key))).strip()


def lines_of(result: dict[str, Any]) -> dict[str, Any]:
    """What people want to see of a result."""
    from eval.result import EvalResult

    known = {key: value for key, value in result.items() if key in EvalResult.__dataclass_fields__}
    found = EvalResult(**known)
    lines: dict[str, Any] = dict(found.rows())
    counts = ", ".join(f"{number:,} {name}" for name, number in found.counts.items())
    lines |= {"source": str(found.source.get("name", "")), "counts": counts}
    lines |= {"protocol": f"{found.protocol} {found.protocol_sha256[:12]}"}
    lines |= {f"note {number}": note for number, note in enumerate(found.notes, 1)}
    for model, entry in found.latency.get("models", {}).items():
        one, best = entry["batch_1"], entry["best"]
        parts = ", ".join(f"{part} {ms:.4g}" for part, ms in one["parts_ms"].items())
        lines[f"{model}, an image"] = (
            f"{one['ms']:.4g} ms at batch 1 ({parts}); {best['ms_per_image']:.4g} ms at batch {best['batch']}"
        )
    for row in result.get("checkpoints", []):
        fields = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float) and k != "images")
        lines[f"{row['images']:.0f} images"] = fields
    return lines
