"""Metrics by nearest neighbors: precision and recall, density and coverage."""

from typing import TYPE_CHECKING

from d2g.core.errors import UserError
from eval.protocols.metric import Estimate, Metric, MetricNumber, MetricResult
from eval.protocols.protocol import Protocol

if TYPE_CHECKING:
    from eval.metrics.inputs import MetricInputs


def _precision_recall(inputs: "MetricInputs") -> MetricResult:
    real, generated = inputs.subsets
    values = inputs.neighborhoods[str(inputs.protocol.neighbours[0])]
    return MetricResult(
        estimates={
            "precision": Estimate(value=values["precision"], count=len(generated)),
            "recall": Estimate(value=values["recall"], count=len(real)),
        },
        counts=inputs.subset_counts,
        neighbors=inputs.neighborhoods,
    )


def _density_coverage(inputs: "MetricInputs") -> MetricResult:
    real, _ = inputs.subsets
    values = inputs.neighborhoods[str(inputs.protocol.neighbours[0])]
    return MetricResult(
        estimates={
            "density": Estimate(value=values["density"], standard_error=values["density_error"]),
            "coverage": Estimate(value=values["coverage"], count=len(real)),
        },
        counts=inputs.subset_counts,
        neighbors=inputs.neighborhoods,
    )


def _check_count(count: int, protocol: Protocol, dim: int) -> None:
    if count <= max(protocol.neighbours):
        raise UserError(
            f"precision and recall with k = {max(protocol.neighbours)} need more images than that, got "
            f"{count}; make more, or leave pr and dc out"
        )


PRECISION_RECALL = Metric(
    name="pr",
    description="precision and recall",
    key="precision",
    label="Precision",
    better="higher",
    interval="wilson",
    more=(MetricNumber(key="recall", label="Recall", better="higher", interval="wilson"),),
    networks=("features",),
    needs_reference=True,
    compute=_precision_recall,
    check_count=_check_count,
)

DENSITY_COVERAGE = Metric(
    name="dc",
    description="density and coverage",
    key="density",
    label="Density",
    better="higher",
    interval="normal",
    more=(MetricNumber(key="coverage", label="Coverage", better="higher", interval="wilson"),),
    networks=("features",),
    needs_reference=True,
    compute=_density_coverage,
    check_count=_check_count,
)
