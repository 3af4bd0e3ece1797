"""From rows to numbers: what an evaluation says of the images that were measured."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from d2g.core.config import digest
from d2g.core.errors import SettingError
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import EvalStream, generator
from eval.caveats import notes
from eval.measure.reference import Reference
from eval.measure.required_networks import DREAMSIM, Networks
from eval.measure.rows import Rows, stats_of
from eval.metrics.diversity import prompt_diversity
from eval.metrics.feature_stats import FeatureStats
from eval.metrics.frechet import frechet_distance, frechet_infinity
from eval.metrics.inception_score import inception_score
from eval.metrics.intervals import around, frechet_interval, mean_interval, wilson
from eval.metrics.kernel import cmmd, kernel_distance
from eval.metrics.precision_recall import precision_recalls
from eval.protocols.protocol import METRICS, PAIRED, Protocol
from eval.result import HEADLINES, EvalResult

FRECHET = {"fid": "features", "fd_dinov2": "dinov2", "fd_clip": "fd_clip"}
"""Frechet distances -> the rows they are of."""
REFERENCED = {
    **FRECHET,
    "fid_infinity": "features",
    "kid": "features",
    "pr": "features",
    "dc": "features",
} | {"cmmd": "cmmd"}
"""Metrics that compare with a reference -> the rows they are of."""
MEANS = ("clip_score", "pickscore", "caption_accuracy", "caption_exact", *PAIRED)
"""Rows whose mean is the number."""


def summarise(
    rows: Rows,
    protocol: Protocol,
    networks: Networks,
    metrics: tuple[str, ...],
    *,
    reference: Reference | None = None,
    more: Rows | None = None,
    source: Mapping[str, Any] | None = None,
    resamples: int = 200,
    progress: Progress = quiet,
) -> EvalResult:
    """All numbers of `metrics`. `more`: further images of the same prompts, for the diversity.

    `ci` holds 95 % intervals: bootstrap percentiles (`resamples`, 0: none) of means over images, closed forms
    or the bootstrap's deviation of distances (`eval.metrics.intervals`), Wilson's of shares. Raises SettingError for
    a metric without its reference, UserError for too few images.
    """
    check_reference(metrics, reference)
    seed, numbers, counts = protocol.seed, _Numbers(), {"images": len(rows)}
    fakes = {name: _stats(rows, networks, name, protocol) for name in networks.sets if name in rows.values}
    if reference is not None:
        counts["reference"] = reference.count
        for metric, name in FRECHET.items():
            if metric in metrics:
                real, fake = reference.stats[name], fakes[name]
                value = frechet_distance(fake.mean, fake.covariance, real.mean, real.covariance)
                interval = frechet_interval(value, fake, real, resamples, seed, progress)
                numbers.add(metric, value, interval.get("fid"))
        if "fid_infinity" in metrics:
            real = reference.stats["features"]
            limit = frechet_infinity(
                fakes["features"].rows,
                real.mean,
                real.covariance,
                generator(seed, EvalStream.FRECHET_SUBSETS),
            )
            numbers.add("fid_infinity", limit.value, around(limit.value, limit.standard_error))
        if "cmmd" in metrics:
            found = cmmd(fakes["cmmd"].rows, reference.stats["cmmd"].rows)
            numbers.add("cmmd", found.value, around(found.value, found.standard_error))
        if {"kid", "pr", "dc"} & set(metrics):
            counts |= _neighbourhood(
                reference.stats["features"], fakes["features"], protocol, metrics, numbers
            )
    if "is" in metrics:
        net = networks.sets["features"]
        assert net.classifier is not None, "load_networks checked it"
        score = inception_score(
            net.classifier(rows.values["features"]),
            generator(seed, EvalStream.INCEPTION_SPLITS),
            splits=protocol.is_splits,
        )
        numbers.add("is", score.mean, around(score.mean, score.standard_error) if score.splits > 1 else None)
        numbers.add("is_deviation", score.deviation)
    if "dreamsim_diversity" in metrics:
        embedded, prompts = _with_more(rows, more)
        diversity = prompt_diversity(embedded, prompts)
        counts |= {"diversity_prompts": diversity.prompts, "diversity_images": diversity.images}
        numbers.add("dreamsim_diversity", diversity.mean, around(diversity.mean, diversity.standard_error))
    for name in MEANS:
        if name in rows.values:
            values = rows.values[name].double()
            numbers.add(name, values.mean().item(), mean_interval(name, values, resamples, seed).get(name))
    return EvalResult(
        protocol=protocol.name,
        protocol_sha256=protocol.sha256(),
        settings=protocol.settings(),
        source=dict(source or {}),
        counts=counts,
        models=networks.models() | _reference_facts(reference),
        ci=numbers.intervals,
        notes=notes(rows, protocol, networks, counts, reference),
        neighbours=numbers.neighbours,
        **numbers.fields(),
    )


def check_reference(metrics: tuple[str, ...], reference: object | None) -> None:
    """Raise SettingError for a metric that needs a reference where there is none."""
    for metric in metrics:
        if metric in REFERENCED and reference is None:
            raise SettingError(f"metric {metric!r} ({METRICS[metric]}) needs a reference; give --reference")


class _Numbers:
    """Values and intervals by key, as they come."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.intervals: dict[str, list[float]] = {}
        self.neighbours: dict[str, dict[str, float]] = {}

    def add(self, key: str, value: float, interval: Any = None) -> None:
        self.values[key] = value
        if interval is not None:
            self.intervals[key] = [float(end) for end in interval]

    def fields(self) -> dict[str, Any]:
        """Arguments of EvalResult: headline numbers by name, the others in `extra`."""
        named = {key: value for key, value in self.values.items() if key in HEADLINES}
        return {**named, "extra": {key: value for key, value in self.values.items() if key not in HEADLINES}}


def _neighbourhood(
    real: FeatureStats, fake: FeatureStats, protocol: Protocol, metrics: tuple[str, ...], numbers: _Numbers
) -> dict[str, int]:
    """KID, precision and recall, density and coverage, of the protocol's number of images on either side."""
    a, b = (stats.sample(protocol.pr_images, protocol.seed) for stats in (real, fake))
    if "kid" in metrics:
        subsets, size = protocol.kid_subsets, protocol.kid_subset_size
        found = kernel_distance(
            b, a, generator(protocol.seed, EvalStream.KERNEL_SUBSETS), subsets=subsets, size=size
        )
        numbers.add("kid", found.mean, around(found.mean, found.standard_error))
    if {"pr", "dc"} & set(metrics):
        by_k = {str(k): asdict(n) for k, n in precision_recalls(a, b, ks=protocol.neighbours).items()}
        numbers.neighbours = by_k
        first = by_k[str(protocol.neighbours[0])]
        if "pr" in metrics:
            numbers.add("precision", first["precision"], wilson(first["precision"], len(b)))
            numbers.add("recall", first["recall"], wilson(first["recall"], len(a)))
        if "dc" in metrics:
            numbers.add("density", first["density"], around(first["density"], first["density_error"]))
            numbers.add("coverage", first["coverage"], wilson(first["coverage"], len(a)))
    return {"pr_images": len(b), "pr_reference": len(a)}


def _stats(rows: Rows, networks: Networks, name: str, protocol: Protocol) -> FeatureStats:
    return stats_of(rows, {name: networks.sets[name]}, protocol.preprocessing, "the measured images")[name]


def _with_more(rows: Rows, more: Rows | None) -> tuple[Tensor, list[str]]:
    parts = [rows, *([more] if more is not None else [])]
    return torch.cat([part.values[DREAMSIM] for part in parts]), [p for part in parts for p in part.prompts]


def _reference_facts(reference: Reference | None) -> dict[str, dict[str, str]]:
    if reference is None:
        return {}
    names = ("source", "images", "files_sha256")
    return {"reference": {name: str(reference.facts.get(name, "")) for name in names}}


def prompts_sha256(rows: Rows) -> str:
    """The digest of the prompts measured; "" where no image has one."""
    return digest(rows.prompts) if any(rows.prompts) else ""
