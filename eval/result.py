"""The result of an evaluation: numbers, what they were measured with, and which of them compare."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from core.config import differing
from core.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """Numbers and what they were measured with. None: not measured. `precision`, `recall`: at the first k."""

    protocol: str
    protocol_sha256: str
    fid: float | None = None
    kid: float | None = None
    clip_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    neighbours: dict[str, dict[str, float]] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    ci: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict of all fields."""
        result: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return result

    @classmethod
    def load(cls, file: str | Path) -> "EvalResult":
        """Read a result that was written as JSON. Raises UserError when the file is none."""
        try:
            return cls(**json.loads(Path(file).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{file} is no evaluation result ({error}); make one with `d2g eval run`"
            ) from error

    def rows(self) -> list[tuple[str, str]]:
        """(label, value) lines for people. Only Inception's Frechet distance is called FID."""
        net = self.models.get("features", {}).get("name", "")
        fid = "FID" if net.startswith("inception") else f"Frechet distance ({net} features)"
        named = {
            "fid": fid,
            "kid": fid.replace("FID", "KID").replace("Frechet", "Kernel"),
            "clip_score": f"CLIP score ({self.models.get('clip', {}).get('name', '')})",
            "precision": "Precision",
            "recall": "Recall",
        }
        lines = [(label, getattr(self, key), self.ci.get(key)) for key, label in named.items()]
        lines += [(name, value, None) for name, value in sorted(self.extra.items())]
        return [(label, _shown(value, interval)) for label, value, interval in lines if value is not None]


def _shown(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.4g}" + (f"  (95 %: {interval[0]:.4g} to {interval[1]:.4g})" if interval else "")


def compare(results: Mapping[str, EvalResult]) -> list[dict[str, Any]]:
    """Rows {name, fid, clip_score, …} of several results, sorted by name.

    Raises UserError unless all share protocol, networks and reference: other numbers do not compare.
    """
    if not results:
        raise UserError("no results to compare; give at least one")
    names = sorted(results)
    first = _footing(results[names[0]])
    for name in names[1:]:
        differ = differing(first, _footing(results[name]))
        if differ:
            raise UserError(f"{names[0]} and {name} do not compare: {'; '.join(differ)}; evaluate them alike")
    keys = ("fid", "kid", "clip_score", "precision", "recall")
    return [{"name": n, **{k: getattr(results[n], k) for k in keys}, **results[n].extra} for n in names]


def _footing(result: EvalResult) -> dict[str, Any]:
    counts = {"reference": result.counts.get("reference", 0), "images": result.counts["images"]}
    keys = {"protocol": result.protocol, "protocol_sha256": result.protocol_sha256}
    return {**keys, "models": result.models, "counts": counts}
