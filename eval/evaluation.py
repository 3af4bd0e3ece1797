"""Evaluate any source of images under a protocol: measure each image once, then compute the numbers."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from d2g.core.distributed import process_group
from d2g.core.errors import SettingError, UserError
from d2g.core.progress import Progress, quiet
from eval.measure.measure import measure_source
from eval.measure.reference import Reference
from eval.measure.required_networks import DREAMSIM_ROWS, Networks, complete_networks, measures_of
from eval.measure.rows import MeasuredRows, MeasureOptions
from eval.measure.source import ImageSource
from eval.protocols.metric import all_metrics, check_metrics, paired_metrics
from eval.protocols.protocol import ANY, Protocol
from eval.result import EvalResult
from eval.summary import check_reference, digest_of_prompts, summarize

GetReference = Callable[[], Reference | None]
"""Builds the reference statistics when they are needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Result of `evaluate`: the numbers, the measured rows (one per image), and the reference statistics.

    With several processes, only rank 0 computes the numbers; the `result` of other ranks is empty.
    """

    result: EvalResult
    rows: MeasuredRows
    reference: Reference | None = None


def evaluate(
    source: ImageSource,
    protocol: Protocol,
    networks: Networks,
    *,
    metrics: tuple[str, ...] = (),
    reference: Reference | GetReference | None = None,
    other: ImageSource | None = None,
    count: int = 0,
    allow_fewer: bool = False,
    work: MeasureOptions | None = None,
    resamples: int = 200,
    progress: Progress = quiet,
) -> Evaluation:
    """Measure the images of `source` under `protocol` and compute metrics. Call it on every rank.

    - metrics: names of metrics; () for those of the protocol.
    - reference: statistics of real images, or a function that builds them after everything else is checked.
    - other: a second source of images from the same noise, for paired metrics.
    - count: number of images, where the protocol leaves it open; further images are ignored.
    - allow_fewer: accept fewer images than the protocol's, which the result then states.
    - work: batch size, and the folder for finished parts.
    - resamples: bootstrap resamples; 0 for no bootstrap intervals.

    Raises SettingError if a metric lacks an input, UserError if networks, reference or counts are not the
    protocol's, and Interrupted on Ctrl-C.

    >>> import torch
    >>> from eval import FeatureNet, Networks, Protocol, batch_source, build_reference
    >>> images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    >>> color = FeatureNet(name="color", dim=3, sha256="", function=lambda x: x.float().mean((2, 3)))
    >>> networks, protocol = Networks(sets={"features": color}), Protocol(name="example")
    >>> real = batch_source("real", [(images[:20], [""] * 20)])
    >>> fake = batch_source("fake", [(images[20:], [""] * 20)])
    >>> reference = build_reference(real, protocol, networks.sets)
    >>> result = evaluate(fake, protocol, networks, metrics=("fid",), reference=reference).result
    >>> result.ci["fid"][0] < result.fid < result.ci["fid"][1]
    True
    """
    # Check everything before the first image is drawn.
    metrics = metrics or protocol.metrics
    number = _check_request(source, protocol, networks, metrics, reference, other, count, allow_fewer)
    networks = complete_networks(metrics, networks)
    real = reference() if callable(reference) else reference
    if real is not None:
        real.check(protocol, networks.compared)

    # Sample and measure the images, shared by all processes. Rank 0 computes the metrics.
    rows, more = _measure(source, range(number), protocol, networks, metrics, other, work, progress)
    resolved = _resolve(protocol, networks, rows)
    if process_group.rank() != 0:
        empty = EvalResult(protocol=resolved.name, protocol_sha256=resolved.sha256())
        return Evaluation(result=empty, rows=rows)
    result = summarize(
        rows,
        resolved,
        networks,
        metrics,
        reference=real,
        more=more,
        source={"name": source.name, **source.facts},
        against={"name": other.name, **other.facts} if other is not None and paired_metrics(metrics) else {},
        resamples=resamples,
        progress=progress,
    )
    return Evaluation(result=result, rows=rows, reference=real)


def _measure(
    source: ImageSource,
    numbers: range,
    protocol: Protocol,
    networks: Networks,
    metrics: tuple[str, ...],
    other: ImageSource | None,
    work: MeasureOptions | None,
    progress: Progress,
) -> tuple[MeasuredRows, MeasuredRows | None]:
    """Measure every image: (rows of all images, rows of more images per prompt if a metric needs them)."""
    measures, pairs = measures_of(networks, protocol, metrics)
    rows = measure_source(source, numbers, measures, pairs=pairs, other=other, work=work, progress=progress)
    if source.count is not None or not any(all_metrics()[name].repeats_prompts for name in metrics):
        return rows, None
    extra = range(numbers.stop, numbers.stop * protocol.diversity_images)
    embedding = {DREAMSIM_ROWS: measures[DREAMSIM_ROWS]}
    # --keep saves the images of `numbers` alone.
    unsaved = None if work is None else replace(work, keep=None)
    return rows, measure_source(source, extra, embedding, work=unsaved, progress=progress)


def _resolve(protocol: Protocol, networks: Networks, rows: MeasuredRows) -> Protocol:
    """The protocol with the names of the networks and the digest of the prompts that were used."""
    features = networks.sets.get("features")
    return protocol.resolved(
        features=features.name if features else ANY,
        clip=networks.clip.name if networks.clip else ANY,
        prompts_sha256=digest_of_prompts(rows),
    )


def _check_request(
    source: ImageSource,
    protocol: Protocol,
    networks: Networks,
    metrics: tuple[str, ...],
    reference: Reference | GetReference | None,
    other: ImageSource | None,
    count: int,
    allow_fewer: bool,
) -> int:
    """Check everything that can be checked before an image is drawn; return the number of images."""
    check_metrics(metrics)
    check_reference(metrics, reference)
    paired = paired_metrics(metrics)
    if paired and other is None:
        raise SettingError(f"metric {paired[0]!r} needs images to compare with; give --against")
    check_networks(protocol, networks)
    # Every image needs its partner, and some metrics have a minimum number of images.
    number = image_count(source, protocol, count, allow_fewer)
    if paired and other is not None and other.count is not None and other.count < number:
        raise UserError(
            f"{source.name} gives {number} images, but {other.name} holds {other.count} to compare with; "
            "give as many, or a smaller --num"
        )
    features = networks.sets.get("features")
    for name in metrics:
        check_count = all_metrics()[name].check_count
        if check_count is not None:
            check_count(number, protocol, features.dim if features is not None else 0)
    return number


def check_networks(protocol: Protocol, networks: Networks) -> None:
    """Raise UserError for networks that are not the protocol's."""
    expected_networks = (
        ("features", protocol.features, networks.sets.get("features")),
        ("CLIP", protocol.clip, networks.clip),
    )
    for kind, expected, net in expected_networks:
        if net is not None and expected not in (ANY, net.name):
            raise UserError(
                f"protocol {protocol.name!r} measures with {kind} {expected!r}, got {net.name!r}; use that "
                "network, or protocol folder"
            )


def image_count(source: ImageSource, protocol: Protocol, count: int, allow_fewer: bool) -> int:
    """Number of images to measure. Raises UserError for fewer than the protocol's number, or than two."""
    target = protocol.images or count or source.count or 0
    number = min(target, count or target, target if source.count is None else source.count)
    if number < target and not allow_fewer:
        raise UserError(
            f"{source.name} gives {number} images, protocol {protocol.name} measures {target}; make the rest "
            "or give --allow-fewer, and the result says so"
        )
    if number < 2:
        remedy = ", --num" if source.count is None else ""
        images = "1 image" if number == 1 else f"{number} images"
        raise UserError(f"{source.name}: got {images} to evaluate; expected at least 2{remedy}")
    return number
