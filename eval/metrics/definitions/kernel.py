"""Kernel distances (maximum mean discrepancies): KID and CMMD."""

from typing import TYPE_CHECKING

from eval.protocols.metric import Estimate, Metric, MetricResult, Models

if TYPE_CHECKING:
    from eval.metrics.inputs import MetricInputs


def _kid(inputs: "MetricInputs") -> MetricResult:
    from d2g.core.seeds import EvalStream, generator
    from eval.metrics.kernel import kernel_distance

    real, generated = inputs.subsets
    protocol = inputs.protocol
    distance = kernel_distance(
        generated,
        real,
        generator(protocol.seed, EvalStream.KERNEL_SUBSETS),
        subsets=protocol.kid_subsets,
        size=protocol.kid_subset_size,
    )
    estimate = Estimate(value=distance.mean, standard_error=distance.standard_error)
    return MetricResult(estimates={"kid": estimate}, counts=inputs.subset_counts)


def _cmmd(inputs: "MetricInputs") -> MetricResult:
    from eval.metrics.kernel import cmmd

    distance = cmmd(inputs.generated["cmmd"].rows, inputs.real["cmmd"].rows)
    estimate = Estimate(value=distance.value, standard_error=distance.standard_error)
    return MetricResult(estimates={"cmmd": estimate})


def _kid_label(models: Models) -> str:
    """Only a kernel distance of Inception features is called KID."""
    network = models.get("features", {}).get("name", "")
    return "KID" if network.startswith("inception") else f"Kernel distance ({network} features)"


KID = Metric(
    name="kid",
    description="kernel distance of the protocol's features",
    label=_kid_label,
    better="lower",
    interval="normal",
    networks=("features",),
    needs_reference=True,
    compute=_kid,
)

CMMD = Metric(
    name="cmmd",
    description="maximum mean discrepancy of CLIP features",
    label="CMMD",
    better="lower",
    interval="normal",
    networks=("cmmd",),
    needs_reference=True,
    compute=_cmmd,
    all_reference_rows=True,
)
