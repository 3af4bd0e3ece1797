"""The floor of an evaluation: real pictures against other real pictures, measured as the samples are."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from d2g.core.seeds import EvalStream, generator
from eval.measure.reference import Reference
from eval.metrics.feature_stats import FeatureStats
from eval.metrics.inputs import MetricInputs
from eval.protocols.metric import all_metrics
from eval.protocols.protocol import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """Numbers of held-out real pictures against training pictures, by key. `note`: what was compared."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def real_floor(
    reference: Reference | None,
    training: Reference | None,
    protocol: Protocol,
    metrics: tuple[str, ...],
    images: int,
) -> Floor:
    """Compute the reference's metrics of `metrics` between two sets of real pictures.

    With `training`, statistics of the training pictures: the reference against them. Without, as many random
    pictures of the reference as were measured (`images`), at most half, against the others. Protocols with
    a reference of their own have no floor, nor has a reference that is too small to be split.
    """
    # Metrics of features that the reference has.
    chosen = [
        metric
        for metric in all_metrics().values()
        if metric.name in metrics
        and metric.needs_reference
        and not metric.data_source
        and reference is not None
        and set(metric.networks) <= reference.stats.keys()
    ]
    if reference is None or not chosen or protocol.reference != "given":
        return Floor()
    # The two sets: the reference and the training pictures, or two parts of the reference.
    if training is not None:
        held_out, others = dict(reference.stats), dict(training.stats)
        what = "training pictures"
    else:
        rows = len(next(iter(reference.stats.values())).rows)
        count = min(images, rows // 2)
        if count <= max(protocol.neighbours):
            return Floor(note=f"no floor: {rows} reference images are too few to split them")
        order = torch.randperm(rows, generator=generator(protocol.seed, EvalStream.FLOOR))
        held_out = {name: _part(stats, order[:count]) for name, stats in reference.stats.items()}
        others = {name: _part(stats, order[count:]) for name, stats in reference.stats.items()}
        what = "others of the reference"
    # Compute them as for samples, with one set in the place of the generated images.
    inputs = MetricInputs(protocol=protocol, rows={}, prompts=(), generated=held_out, real=others)
    numbers = {
        key: estimate.value for metric in chosen for key, estimate in metric.compute(inputs).estimates.items()
    }
    counts = [next(iter(stats.values())).count for stats in (held_out, others)]
    return Floor(
        numbers=numbers, note=f"floor: {counts[0]:,} held-out real pictures against {counts[1]:,} {what}"
    )


def _part(stats: FeatureStats, rows: torch.Tensor) -> FeatureStats:
    """The statistics of some rows."""
    part = FeatureStats(stats.dim, stats.origin)
    part.update(stats.rows[rows.sort().values])
    return part
