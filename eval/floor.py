"""The floor of an evaluation: real pictures against other real pictures, measured as the samples are."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from d2g.core.errors import UserError
from d2g.core.seeds import EvalStream, generator
from eval.measure.reference import Reference
from eval.metrics.feature_stats import FeatureStats
from eval.metrics.inputs import MetricInputs
from eval.protocols.metric import Metric, all_metrics
from eval.protocols.protocol import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """Metrics of real pictures against other real pictures, by key. `note`: what was compared."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def real_floor(
    reference: Reference | None,
    training: Reference | None,
    protocol: Protocol,
    metrics: tuple[str, ...],
    images: int,
) -> Floor:
    """Compute those of `metrics` that compare with a reference between two sets of real pictures.

    With `training` (statistics of the training pictures), the sets are the reference and the training
    pictures. Otherwise, and if both are the same files, the reference is split at random: as many pictures as
    were measured (`images`), at most half, and the others. There is no floor for protocols that make their
    own reference, nor for a reference that is too small to split.
    """
    # The metrics whose features the reference has.
    reference_metrics = [
        metric
        for metric in all_metrics().values()
        if metric.name in metrics
        and metric.needs_reference
        and not metric.data_source
        and reference is not None
        and set(metric.networks) <= reference.stats.keys()
    ]
    if reference is None or not reference_metrics or protocol.reference != "given":
        return Floor()
    # The two sets: the reference and the training pictures, or two parts of the reference.
    same_files = training is not None and _same_files(reference, training)
    if training is not None and not same_files:
        held_out, compared = dict(reference.stats), dict(training.stats)
        compared_with = "training pictures"
    else:
        # A file keeps all rows of some networks, and a random subset of those of others.
        rows = min(len(stats.rows) for stats in reference.stats.values())
        count = min(images, rows // 2)
        if count <= max(protocol.neighbours):
            return Floor(note=f"no floor: {rows} reference images are too few to split them")
        order = torch.randperm(rows, generator=generator(protocol.seed, EvalStream.FLOOR))
        held_out = {name: _part(stats, order[:count]) for name, stats in reference.stats.items()}
        compared = {name: _part(stats, order[count:]) for name, stats in reference.stats.items()}
        compared_with = "others of the reference"
    # Compute the metrics as for samples, with one set in place of the generated images.
    inputs = MetricInputs(protocol=protocol, rows={}, prompts=(), generated=held_out, real=compared)
    too_few = [
        metric.name
        for metric in reference_metrics
        if any(_too_few(metric, stats, protocol) for stats in (held_out, compared))
    ]
    numbers = {
        key: estimate.value
        for metric in reference_metrics
        if metric.name not in too_few
        for key, estimate in metric.compute(inputs).estimates.items()
    }
    counts = [next(iter(stats.values())).count for stats in (held_out, compared)]
    note = f"floor: {counts[0]:,} held-out real pictures against {counts[1]:,} {compared_with}"
    if too_few:
        note += f" (too few for {', '.join(too_few)})"
    if same_files:
        note += " (--train has the same pictures)"
    return Floor(numbers=numbers, note=note)


def _same_files(first: Reference, second: Reference) -> bool:
    """Whether both are statistics of the same files: such pictures are not held out."""
    sha256 = first.facts.get("files_sha256")
    return bool(sha256) and sha256 == second.facts.get("files_sha256")


def _too_few(metric: Metric, stats: Mapping[str, FeatureStats], protocol: Protocol) -> bool:
    """Whether the metric needs more pictures than these."""
    if metric.check_count is None:
        return False
    features = stats[metric.networks[0]]
    try:
        metric.check_count(len(features.rows), protocol, features.dim)
    except UserError:
        return True
    return False


def _part(stats: FeatureStats, rows: torch.Tensor) -> FeatureStats:
    """The statistics of some rows."""
    part = FeatureStats(stats.dim, stats.origin)
    part.update(stats.rows[rows.sort().values])
    return part
