"""Frechet distances: FID, its extrapolation, and the same of DINOv2 and CLIP features."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from eval.protocols.metric import Estimate, Metric, MetricResult, Models

if TYPE_CHECKING:
    from eval.metrics.inputs import MetricInputs


def _frechet(key: str, network: str) -> Callable[["MetricInputs"], MetricResult]:
    """The Frechet distance of the rows of `network`, reported under `key`."""

    def compute(inputs: "MetricInputs") -> MetricResult:
        value, error = inputs.frechet(network)
        return MetricResult(estimates={key: Estimate(value=value, standard_error=error)})

    return compute


def _relative(inputs: "MetricInputs") -> MetricResult:
    """The Frechet distance over the total variance of the real features, which is free of their scale.

    1 is the distance of a sampler whose every image has the mean features of the real ones.
    """
    from d2g.core.errors import UserError

    value, error = inputs.frechet("features")
    variance = float(inputs.real["features"].covariance.trace())
    if not variance > 0:
        raise UserError("all reference images have the same features; leave fd_relative out")
    scaled = None if error is None else error / variance
    return MetricResult(estimates={"fd_relative": Estimate(value=value / variance, standard_error=scaled)})


def _infinity(inputs: "MetricInputs") -> MetricResult:
    from d2g.core.seeds import EvalStream, generator
    from eval.metrics.frechet import frechet_infinity

    real, stream = inputs.real["features"], generator(inputs.protocol.seed, EvalStream.FRECHET_SUBSETS)
    limit = frechet_infinity(inputs.generated["features"].rows, real.mean, real.covariance, stream)
    estimate = Estimate(value=limit.value, standard_error=limit.standard_error)
    return MetricResult(estimates={"fid_infinity": estimate})


def _check_count(count: int, protocol: object, dim: int) -> None:
    from eval.metrics.frechet import subset_sizes

    subset_sizes(count, dim)


def _label(models: Models) -> str:
    """Only a Frechet distance of Inception features is called FID."""
    network = models.get("features", {}).get("name", "")
    return "FID" if network.startswith("inception") else f"Frechet distance ({network} features)"


FID = Metric(
    name="fid",
    description="Frechet distance of the protocol's features",
    label=_label,
    better="lower",
    interval="normal",
    networks=("features",),
    needs_reference=True,
    compute=_frechet("fid", "features"),
)

FD_RELATIVE = Metric(
    name="fd_relative",
    description="the same over the variance of the real features: comparable between networks",
    label=lambda models: f"{_label(models)}, relative to the variance of real features",
    better="lower",
    interval="normal",
    networks=("features",),
    needs_reference=True,
    compute=_relative,
)

FID_INFINITY = Metric(
    name="fid_infinity",
    description="the same, extrapolated to endless images",
    label=lambda models: f"{_label(models)}, endless images",
    better="lower",
    interval="normal",
    networks=("features",),
    needs_reference=True,
    compute=_infinity,
    check_count=_check_count,
)

FD_DINOV2 = Metric(
    name="fd_dinov2",
    description="Frechet distance of DINOv2 features",
    label="FD of DINOv2 features",
    better="lower",
    interval="normal",
    networks=("dinov2",),
    needs_reference=True,
    compute=_frechet("fd_dinov2", "dinov2"),
)

FD_CLIP = Metric(
    name="fd_clip",
    description="Frechet distance of CLIP features",
    label="FD of CLIP features",
    better="lower",
    interval="normal",
    networks=("fd_clip",),
    needs_reference=True,
    compute=_frechet("fd_clip", "fd_clip"),
)
