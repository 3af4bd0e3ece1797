"""The Inception score and its deviation over the splits."""

from typing import TYPE_CHECKING

from d2g.core.errors import UserError
from eval.protocols.metric import Estimate, Metric, MetricNumber, MetricResult
from eval.protocols.protocol import Protocol

if TYPE_CHECKING:
    from eval.metrics.inputs import MetricInputs


def _compute(inputs: "MetricInputs") -> MetricResult:
    from d2g.core.seeds import EvalStream, generator
    from eval.metrics.inception_score import inception_score

    assert inputs.classifier is not None, "networks are loaded with `needs_classes`"
    protocol = inputs.protocol
    score = inception_score(
        inputs.classifier(inputs.rows["features"]),
        generator(protocol.seed, EvalStream.INCEPTION_SPLITS),
        splits=protocol.is_splits,
    )
    error = score.standard_error if score.splits > 1 else None
    return MetricResult(
        estimates={
            "is": Estimate(value=score.mean, standard_error=error),
            "is_deviation": Estimate(value=score.deviation),
        }
    )


def _check_count(count: int, protocol: Protocol, dim: int) -> None:
    if count < protocol.is_splits:
        raise UserError(
            f"the Inception score of {protocol.is_splits} splits needs as many images, got {count}; make "
            "more, or leave is out"
        )


INCEPTION_SCORE = Metric(
    name="is",
    description="Inception score",
    label="Inception score",
    better="higher",
    interval="normal",
    more=(MetricNumber(key="is_deviation", label="is_deviation", better="", interval="none"),),
    networks=("features",),
    needs_reference=False,
    needs_classes=True,
    compute=_compute,
    check_count=_check_count,
)
