"""Evaluate any source of images under a protocol."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.config import differing
from core.errors import SettingError, UserError
from core.progress import Progress, quiet
from core.seeds import generator
from eval.config import Protocol, check_metrics, protocol_sha256
from eval.features import INCEPTION_FILE, INCEPTION_SHA256_PREFIX, ClipNet, FeatureNet
from eval.frechet import frechet_distance, kernel_distance
from eval.images import Batch, read_images, resize_batch
from eval.intervals import frechet_interval, mean_interval
from eval.neighbours import precision_recall
from eval.prompt_score import clip_scores
from eval.result import EvalResult
from eval.stats import FeatureStats, Origin

Extra = Callable[[Tensor, list[str]], float]
"""(uint8 images of a batch, their prompts) -> the batch's mean of some measure of single images."""


def collect(
    batches: Iterable[Batch],
    features: FeatureNet,
    *,
    resize: str,
    source: str,
    progress: Progress = quiet,
    total: int = 0,
) -> FeatureStats:
    """Feature statistics of image batches (what `d2g eval stats` saves). UserError when there are none."""
    origin = Origin(features=features.name, features_sha256=features.sha256, resize=resize, source=source)
    stats = FeatureStats(features.dim, origin)
    for images, _ in batches:
        stats.update(features(resize_batch(images, resize)))
        progress(f"features of {source}", stats.count, total)
    if stats.count == 0:
        raise UserError(f"{source} gave no images; expected at least 2")
    return stats


def reference_stats(
    source: str | Path,
    protocol: Protocol,
    features: FeatureNet,
    *,
    progress: Progress = quiet,
    batch_size: int = 64,
) -> FeatureStats:
    """Statistics of a reference: a .safetensors file of `FeatureStats.save`, or images to be read now."""
    if Path(source).suffix == ".safetensors":
        return FeatureStats.load(source)
    limit = protocol.reference_images or None
    batches = read_images(source, limit=limit, resize=protocol.resize, batch_size=batch_size)
    name, total = Path(source).name, protocol.reference_images
    return collect(batches, features, resize=protocol.resize, source=name, progress=progress, total=total)


def evaluate(
    sampler: Iterable[Batch],
    reference: FeatureStats | str | Path | None,
    protocol: Protocol,
    *,
    features: FeatureNet | None,
    clip: ClipNet | None = None,
    metrics: tuple[str, ...] | None = None,
    extra: Mapping[str, Extra] | None = None,
    progress: Progress = quiet,
    seed: int = 0,
    resamples: int = 200,
) -> EvalResult:
    """Measure the images of `sampler` (uint8 [B, 3, H, W] with B prompts) under `protocol`.

    Images beyond the protocol's count are left alone; fewer are measured with a note. `metrics`: a selection
    of the protocol's. `extra` measures see images as sampled, before resizing, and are averaged. `ci` holds
    95 % intervals from `resamples` bootstrap resamples (0: none): percentiles for the CLIP score; for the
    Frechet distance the estimate +- 1.96 standard deviations over at most `resamples` (20 for more than 512
    features) resamples of the generated images with the reference fixed, because resampled Frechet distances
    are biased upwards and their percentiles would miss the estimate. Raises SettingError when a metric lacks
    its network or reference, UserError when networks or resizing disagree with the protocol or the reference.
    """
    metrics = protocol.metrics if metrics is None else metrics
    check_inputs(metrics, protocol, features, clip, reference)
    distances = bool({"fid", "kid", "pr"} & set(metrics))
    real: FeatureStats | None = None
    if distances and features is not None and reference is not None:
        if isinstance(reference, FeatureStats):
            real = reference
        else:
            real = reference_stats(reference, protocol, features, progress=progress)
        check_reference(real, protocol, features)

    # One pass over the generated images.
    net = features if distances else None
    fake = FeatureStats(net.dim, _origin(net, protocol)) if net else None
    scores: list[Tensor] = []
    sums = dict.fromkeys(extra or {}, 0.0)
    count = 0
    for given_images, given_prompts in sampler:
        left = protocol.images - count if protocol.images else len(given_images)
        images, prompts = given_images[:left], given_prompts[:left]
        for name, measure in (extra or {}).items():
            sums[name] += measure(images, prompts) * len(images)
        images = resize_batch(images, protocol.resize)
        if fake is not None and net is not None:
            fake.update(net(images))
        if "clip" in metrics and clip is not None:
            if not all(prompts):
                raise UserError(
                    "an image has no prompt, so it has no CLIP score; give captions or leave clip out"
                )
            scores.append(clip_scores(clip, images, prompts, prefix=protocol.clip_prefix).cpu())
        count += len(images)
        progress("evaluate", count, protocol.images)
        if count == protocol.images:
            break
    if count < 2:
        raise UserError(f"got {count} image(s) to evaluate; expected at least 2")

    # Numbers.
    values: dict[str, Any] = {}
    ci: dict[str, list[float]] = {}
    counts = {"images": count}
    if scores:
        values["clip_score"] = torch.cat(scores).mean().item()
        ci |= mean_interval("clip_score", torch.cat(scores), resamples, seed)
    if fake is not None and real is not None:
        counts["reference"] = real.count
        if "fid" in metrics:
            values["fid"] = frechet_distance(fake.mean, fake.covariance, real.mean, real.covariance)
            ci |= frechet_interval(values["fid"], fake, real, resamples, seed, progress)
        if {"kid", "pr"} & set(metrics):
            limit = protocol.pr_images
            a, b = real.sample(limit, seed), fake.sample(limit, seed)
            counts |= {"pr_images": len(b), "pr_reference": len(a)}
        if "kid" in metrics:
            values["kid"] = kernel_distance(b, a, generator(seed, 1)).mean
        if "pr" in metrics:
            by_k = {str(k): precision_recall(a, b, k=k) for k in protocol.neighbours}
            values["neighbours"] = {k: asdict(result) for k, result in by_k.items()}
            headline = by_k[str(protocol.neighbours[0])]
            values |= {"precision": headline.precision, "recall": headline.recall}
    return EvalResult(
        protocol=protocol.name,
        protocol_sha256=protocol_sha256(protocol),
        extra={name: total / count for name, total in sums.items()},
        counts=counts,
        models=_models(net, clip if scores else None, real),
        ci=ci,
        notes=_notes(protocol, counts, net),
        **values,
    )


def check_inputs(
    metrics: tuple[str, ...],
    protocol: Protocol,
    features: FeatureNet | None,
    clip: ClipNet | None,
    reference: object | None,
) -> None:
    """Whether the metrics can be measured with what is there; raises before the first image is made."""
    check_metrics(metrics)
    for name in metrics:
        if name not in protocol.metrics:
            raise SettingError(
                f"metric {name!r} is not in protocol {protocol.name!r}, which has {protocol.metrics}"
            )
        if name == "clip" and clip is None:
            raise SettingError("metric 'clip' needs a CLIP model; give one or leave clip out of the metrics")
        if name != "clip" and (features is None or reference is None):
            raise SettingError(
                f"metric {name!r} needs a feature network and a reference; give both or leave it out"
            )
    wanted = (("features", protocol.features, features), ("CLIP", protocol.clip, clip))
    for what, expected, got in wanted:
        if got is not None and expected not in ("any", got.name):
            raise UserError(
                f"protocol {protocol.name!r} measures with {what} {expected!r}, got {got.name!r}; "
                "use that network or protocol custom"
            )


def check_reference(real: FeatureStats, protocol: Protocol, features: FeatureNet) -> None:
    """Whether the reference's features come from the same network and resizing; UserError if not."""
    wanted = {"features": features.name, "features_sha256": features.sha256, "resize": protocol.resize}
    differ = differing({name: getattr(real.origin, name) for name in wanted}, wanted)
    if differ:
        raise UserError(
            f"reference {real.origin.source} was measured another way: {', '.join(differ)}; "
            "make its statistics again"
        )


def _origin(features: FeatureNet, protocol: Protocol) -> Origin:
    return Origin(
        features=features.name,
        features_sha256=features.sha256,
        resize=protocol.resize,
        source="the generated images",
    )


def _models(
    features: FeatureNet | None, clip: ClipNet | None, real: FeatureStats | None
) -> dict[str, dict[str, str]]:
    models: dict[str, dict[str, str]] = {}
    if features is not None:
        models["features"] = {"name": features.name, "dim": str(features.dim), "sha256": features.sha256}
    if clip is not None:
        models["clip"] = {"name": clip.name, "sha256": clip.sha256}
    if real is not None:
        models["reference"] = {"source": real.origin.source}
    return models


def _notes(protocol: Protocol, counts: Mapping[str, int], features: FeatureNet | None) -> list[str]:
    """What a reader must know before quoting the numbers."""
    notes = []
    expected = {"images": protocol.images, "reference": protocol.reference_images}
    for name, number in expected.items():
        if name in counts and number and counts[name] != number:
            notes.append(
                f"{counts[name]} {name}, the protocol has {number}: not comparable with published numbers"
            )
    if features is not None:
        few = [f"{counts[name]} {name}" for name in ("images", "reference") if counts[name] <= features.dim]
        if few:
            notes.append(f"{' and '.join(few)} for {features.dim} features: the distance is biased upwards")
        if features.name.startswith("inception"):
            if not features.sha256.startswith(INCEPTION_SHA256_PREFIX):
                notes.append(f"the Inception weights are not the published {INCEPTION_FILE}: this is no FID")
        else:
            notes.append(f"`fid` is a Frechet distance of {features.name} features, not an Inception FID")
    return notes
