"""Evaluate any source of images under a protocol: measure each image once, then sum up."""

from collections.abc import Callable
from dataclasses import dataclass

from d2g.core.distributed import process_group
from d2g.core.errors import SettingError, UserError
from d2g.core.progress import Progress, quiet
from eval.measure.measure import measure_source
from eval.measure.reference import Reference
from eval.measure.required_networks import DREAMSIM_ROWS, Networks, measures_of
from eval.measure.rows import Rows, Work
from eval.measure.source import Source
from eval.protocols.metric import all_metrics, check_metrics, paired_metrics
from eval.protocols.protocol import ANY, Protocol
from eval.result import EvalResult
from eval.summary import check_reference, prompts_sha256, summarize

GetReference = Callable[[], Reference | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The numbers, the rows they come from (one per image), and the statistics they were compared with.

    In a group of processes the numbers are rank 0's alone; the others' `result` holds none.
    """

    result: EvalResult
    rows: Rows
    reference: Reference | None = None


def evaluate(
    source: Source,
    protocol: Protocol,
    networks: Networks,
    *,
    metrics: tuple[str, ...] = (),
    reference: Reference | GetReference | None = None,
    other: Source | None = None,
    count: int = 0,
    allow_fewer: bool = False,
    work: Work | None = None,
    resamples: int = 200,
    progress: Progress = quiet,
) -> Evaluation:
    """Measure the images of `source` under `protocol`. `metrics`: a selection (none: the protocol's).

    `reference` may be a call that builds it, made once all else is checked. `other`: a second source on the
    same noise, for metrics of pairs. `count`: images, where the protocol leaves it open. Images beyond the
    count are left alone; fewer are refused unless `allow_fewer`, and then the result says so. Processes of a
    group each take their share. Raises SettingError when a metric lacks what it needs, UserError when
    networks, reference or counts are not the protocol's.
    """
    metrics = metrics or protocol.metrics
    check_metrics(metrics)
    check_reference(metrics, reference)
    paired = paired_metrics(metrics)
    if paired and other is None:
        raise SettingError(f"metric {paired[0]!r} needs images to compare with; give --against")
    check_networks(protocol, networks)
    number = images_of(source, protocol, count, allow_fewer)
    check_number(number, metrics, protocol, networks)
    real = reference() if callable(reference) else reference
    if real is not None:
        real.check(protocol, networks.compared)

    measures, pairs = measures_of(networks, protocol, metrics)
    rows = measure_source(
        source, range(number), measures, pairs=pairs, other=other, work=work, progress=progress
    )
    more = None
    if source.count is None and any(all_metrics()[name].repeats_prompts for name in metrics):
        extra = range(number, number * protocol.diversity_images)
        more = measure_source(
            source, extra, {DREAMSIM_ROWS: measures[DREAMSIM_ROWS]}, work=work, progress=progress
        )

    resolved = protocol.resolved(
        features=networks.sets["features"].name if "features" in networks.sets else ANY,
        clip=networks.clip.name if networks.clip else ANY,
        prompts_sha256=prompts_sha256(rows),
    )
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
        resamples=resamples,
        progress=progress,
    )
    return Evaluation(result=result, rows=rows, reference=real)


def check_networks(protocol: Protocol, networks: Networks) -> None:
    """Raise UserError for networks that are not the protocol's."""
    wanted = (
        ("features", protocol.features, networks.sets.get("features")),
        ("CLIP", protocol.clip, networks.clip),
    )
    for what, expected, got in wanted:
        if got is not None and expected not in (ANY, got.name):
            raise UserError(
                f"protocol {protocol.name!r} measures with {what} {expected!r}, got {got.name!r}; use that "
                "network, or protocol folder"
            )


def images_of(source: Source, protocol: Protocol, count: int, allow_fewer: bool) -> int:
    """How many images to measure. Raises UserError for fewer than the protocol has, or than two."""
    target = protocol.images or count or source.count or 0
    number = min(target, count or target, target if source.count is None else source.count)
    if number < target and not allow_fewer:
        raise UserError(
            f"{source.name} gives {number} images, protocol {protocol.name} measures {target}; make the rest "
            "or give --allow-fewer, and the result says so"
        )
    if number < 2:
        raise UserError(f"{source.name}: got {number} image(s) to evaluate; expected at least 2")
    return number


def check_number(number: int, metrics: tuple[str, ...], protocol: Protocol, networks: Networks) -> None:
    """Raise UserError for too few images for a metric, before any is drawn."""
    features = networks.sets.get("features")
    for name in metrics:
        check = all_metrics()[name].check_count
        if check is not None:
            check(number, protocol, features.dim if features is not None else 0)
