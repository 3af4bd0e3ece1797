"""Turn measured rows into the numbers of an evaluation."""

from collections.abc import Mapping
from typing import Any

from d2g.core.config import digest
from d2g.core.errors import SettingError
from d2g.core.progress import Progress, quiet
from eval.caveats import result_notes
from eval.measure.reference import Reference
from eval.measure.required_networks import Networks
from eval.measure.rows import MeasuredRows, feature_stats
from eval.metrics.inputs import MetricInputs
from eval.metrics.intervals import interval_of
from eval.protocols.metric import Metric, all_metrics
from eval.protocols.protocol import Protocol
from eval.result import HEADLINES, EvalResult


def summarize(
    rows: MeasuredRows,
    protocol: Protocol,
    networks: Networks,
    metrics: tuple[str, ...],
    *,
    reference: Reference | None = None,
    more: MeasuredRows | None = None,
    source: Mapping[str, Any] | None = None,
    against: Mapping[str, Any] | None = None,
    resamples: int = 200,
    progress: Progress = quiet,
) -> EvalResult:
    """Compute the numbers of `metrics` and their 95 % intervals.

    `more`: further images of the same prompts, for metrics with `repeats_prompts`. `resamples`: bootstrap
    resamples, 0 for no intervals that need them. Each number of a metric says in `MetricNumber.interval` how
    its interval is computed. Raises SettingError for a metric without its reference, UserError for too few
    images.
    """
    check_reference(metrics, reference)
    inputs = _metric_inputs(rows, protocol, networks, reference, more, resamples, progress)
    values: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    counts = {"images": len(rows)} | ({"reference": reference.count} if reference is not None else {})
    neighbors: dict[str, dict[str, float]] = {}
    # Metrics whose rows were measured anyway are reported too.
    for metric in all_metrics().values():
        if metric.name not in metrics and not _has_rows(metric, rows):
            continue
        result = metric.compute(inputs)
        for number in metric.numbers:
            # The value, and its interval by the rule of the metric.
            estimate = result.estimates[number.key]
            values[number.key] = estimate.value
            interval = interval_of(number.interval, estimate, resamples, protocol.seed)
            if interval is not None:
                intervals[number.key] = [float(end) for end in interval]
        counts |= result.counts
        neighbors |= {k: dict(of_k) for k, of_k in result.neighbors.items()}
    return EvalResult(
        protocol=protocol.name,
        protocol_sha256=protocol.sha256(),
        settings=protocol.settings(),
        source=dict(source or {}),
        against=dict(against or {}),
        counts=counts,
        models=networks.models() | _reference_facts(reference),
        ci=intervals,
        notes=result_notes(rows, protocol, networks, counts, reference),
        neighbours=neighbors,
        **{key: value for key, value in values.items() if key in HEADLINES},  # type: ignore[arg-type]
        extra={key: value for key, value in values.items() if key not in HEADLINES},
    )


def _metric_inputs(
    rows: MeasuredRows,
    protocol: Protocol,
    networks: Networks,
    reference: Reference | None,
    more: MeasuredRows | None,
    resamples: int,
    progress: Progress,
) -> MetricInputs:
    # Only networks that have measured these rows.
    measured = {name: net for name, net in networks.sets.items() if name in rows.values}
    # The Inception score needs the classifier of the feature network.
    features = networks.sets.get("features")
    return MetricInputs(
        protocol=protocol,
        rows=rows.values,
        prompts=rows.prompts,
        generated=feature_stats(rows, measured, protocol.preprocessing, "the measured images"),
        real={} if reference is None else reference.stats,
        classifier=None if features is None else features.classifier,
        more_rows={} if more is None else more.values,
        more_prompts=() if more is None else more.prompts,
        resamples=resamples,
        progress=progress,
    )


def _has_rows(metric: Metric, rows: MeasuredRows) -> bool:
    """Whether a mean over images was measured anyway, by a network that the caller handed in."""
    return all(number.interval == "bootstrap" and number.key in rows.values for number in metric.numbers)


def check_reference(metrics: tuple[str, ...], reference: object | None) -> None:
    """Raise SettingError for a metric that needs a reference where there is none."""
    for name in metrics:
        metric = all_metrics()[name]
        if metric.needs_reference and reference is None:
            raise SettingError(f"metric {name!r} ({metric.description}) needs a reference; give --reference")


def _reference_facts(reference: Reference | None) -> dict[str, dict[str, str]]:
    if reference is None:
        return {}
    # Only facts that identify the reference's images; they must agree between compared results.
    names = ("source", "images", "files_sha256")
    return {"reference": {name: str(reference.facts.get(name, "")) for name in names}}


def digest_of_prompts(rows: MeasuredRows) -> str:
    """The digest of the prompts of the measured images; "" where no image has a prompt."""
    return digest(rows.prompts) if any(rows.prompts) else ""
