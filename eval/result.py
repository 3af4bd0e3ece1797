"""The result of an evaluation: numbers, what they were measured with, and which results are comparable."""

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from d2g.core.config import differing, digest
from d2g.core.errors import UserError
from d2g.core.json_files import check_type, parse_json
from d2g.core.machine_errors import raise_machine_error
from d2g.core.regular_files import open_regular
from eval.protocols.metric import number_labels


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """Numbers and what they were measured with. None: not measured. Precision and recall are at the first k.

    `settings` holds all settings of the protocol, `protocol_sha256` their digest. `against`: the other side
    of metrics that compare images pair by pair, as `source` is the one side. `extra`: every further number by
    its key. `floor`: numbers of real pictures by key (`eval.floor`). `ci`: 95 % intervals.
    `latency`: as returned by `eval.measure.latency.measure_latency`.
    """

    protocol: str
    protocol_sha256: str
    settings: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    against: dict[str, Any] = field(default_factory=dict)
    fid: float | None = None
    kid: float | None = None
    clip_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    neighbours: dict[str, dict[str, float]] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    ci: dict[str, list[float]] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON."""
        result: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return result

    @classmethod
    def load(cls, file: str | Path) -> "EvalResult":
        """Read a result from its JSON file or the folder of `d2g eval run --out`. Raises UserError."""
        path = Path(file) / "result.json" if Path(file).is_dir() else Path(file)
        try:
            with open_regular(path) as stream:
                values = parse_json(stream.read())
            check_type(values, cls)
            return cls(**values)
        except (OSError, ValueError, TypeError) as error:
            raise_machine_error(error)
            raise UserError(
                f"{path} is no evaluation result ({error}); make one with `d2g eval run --out`"
            ) from error

    def numbers(self) -> dict[str, float]:
        """Every number that was measured, by its key."""
        headlines = {key: getattr(self, key) for key in HEADLINES}
        return {key: value for key, value in (headlines | self.extra).items() if value is not None}

    def comparable_facts(self) -> dict[str, Any]:
        """What results must have in common to compare, in short; {} for the empty result of another rank."""
        if not self.counts:
            return {}
        facts = _comparison_facts(self, self.models.keys())
        return {
            "protocol": f"{self.protocol} {self.protocol_sha256[:12]}",
            **facts["counts"],
            **{name: digest(model)[:12] for name, model in facts["models"].items() if name != "reference"},
            "reference_images": digest(self.models.get("reference"))[:12],
        }

    def rows(self) -> list[tuple[str, str]]:
        """(label, value) pairs to print."""
        labels = number_labels(self.models)
        return [
            (labels.get(key, key), value_with_interval(value, self.ci.get(key)) + self._floor_of(key))
            for key, value in self.numbers().items()
        ]

    def _floor_of(self, key: str) -> str:
        return f"; {FLOOR_NAME}: {self.floor[key]:.4g}" if key in self.floor else ""


HEADLINES = ("fid", "kid", "clip_score", "precision", "recall")
"""Keys of the numbers that have a field of their own; all others are in `extra`."""


FLOOR_NAME = "held-out real pictures"
"""The name of the floor beside the samplers."""


def value_with_interval(value: float, interval: Sequence[float] | None) -> str:
    """A number with its interval, as text."""
    return f"{value:.4g}" + (f"  (95 %: {interval[0]:.4g} to {interval[1]:.4g})" if interval else "")


def compare(results: Mapping[str, EvalResult]) -> list[dict[str, Any]]:
    """Rows {name, fid, clip_score, …, ci} of several results, sorted by name.

    Raises UserError unless all share protocol, networks, reference and counts, naming what differs.
    """
    if not results:
        raise UserError("no results to compare; give at least one")
    # Numbers compare only under one protocol with the same networks and counts. The first result may lack a
    # network that two others share, so every two are compared.
    names = sorted(results)
    for first, second in itertools.combinations(names, 2):
        if differ := _differing(results[first], results[second]):
            raise UserError(f"{first} and {second} do not compare: {'; '.join(differ)}; evaluate them alike")
    # Headline numbers come first; a result without a number has None there.
    return [
        {
            "name": name,
            **{key: getattr(results[name], key) for key in HEADLINES},
            **results[name].extra,
            "ci": results[name].ci,
        }
        for name in names
    ]


def _differing(a: EvalResult, b: EvalResult) -> list[str]:
    """List the facts in which two results must agree but do not. Only networks that both used count."""
    shared = a.models.keys() & b.models.keys()
    return differing(_comparison_facts(a, shared), _comparison_facts(b, shared))


def _comparison_facts(result: EvalResult, shared: Collection[str]) -> dict[str, Any]:
    """The facts that comparable results share. `shared`: networks that both results used."""
    counts = {
        key: result.counts.get(key) for key in ("images", "reference") if key in shared or key == "images"
    }
    return {
        "protocol": result.protocol,
        "protocol_sha256": result.protocol_sha256,
        "settings": result.settings,
        "models": {name: result.models[name] for name in shared},
        "counts": counts,
    }
