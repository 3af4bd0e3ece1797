"""`d2g lpips score`: how well distances agree with human judgments on BAPPS' two tasks, 2AFC and JND."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.config import to_json
from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import Stream, generator
from d2g.diffusion import pretrained
from latent_lpips import weights
from latent_lpips.lpips import PixelLPIPS
from latent_lpips.training.bapps import JudgmentSplit, find_splits, image_batches, picture_numbers
from latent_lpips.training.baselines import pixel_squared_error, ssim_distance
from latent_lpips.training.calibrate import encode_patches, open_metric, patch_facts
from latent_lpips.training.config import ScoreConfig, require_set
from latent_lpips.training.small import two_afc_agreement

SCORED_METRIC = "latent_lpips"


@dataclass(frozen=True, slots=True)
class ScoredDistance:
    """A distance in two steps, so that a reference is prepared only once.

    `prepare` maps pixels to what `compare` takes; `compare` maps two of these to distances [B].
    """

    prepare: Callable[[Tensor], Tensor]
    compare: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """Scores per split, and their `mean` over splits.

    `two_afc` and `jnd` are LatentLPIPS' scores; `baselines` has those of the other distances by name. A split
    in which nobody judges two images as the same has no JND score. `ci` has 95 % percentile intervals from a
    bootstrap over images. `people` is how often two random people agree, the mean of p^2 + (1 - p)^2 over
    shares p (Zhang et al. 2018). It is not an upper bound: a distance that follows the majority scores the
    mean of max(p, 1 - p). `judgments` and `pictures` are counts.
    """

    two_afc: dict[str, float]
    jnd: dict[str, float]
    ci: dict[str, dict[str, list[float]]]
    baselines: dict[str, dict[str, Any]]
    people: dict[str, float]
    judgments: dict[str, dict[str, int]]
    pictures: dict[str, dict[str, int]]
    seconds: float


def score_folder(config: ScoreConfig, out: Path | None = None, progress: Progress = quiet) -> ScoreResult:
    """Score LatentLPIPS, and the distances in `baselines` and `lpips`, on the val/ splits of a BAPPS folder.

    A folder without parts is scored on all its splits. With `out`, the result is also written as JSON. Raises
    UserError for bad input.
    """
    require_set(config, "data", "latents", "weights")
    started = time.monotonic()
    check_patch_settings(config)
    # Check the input before networks are loaded.
    tasks = {
        "two_afc": find_splits(config.data, "2afc", "val"),
        "jnd": find_splits(config.data, "jnd", "val"),
    }
    if not any(tasks.values()):
        raise UserError(f"{config.data}: no judgments in val/, expected folders with ref/ p0/ p1/ judge/")
    # Score every distance on every split of both tasks.
    measures = open_scored_distances(config, process_group.init())
    scored: dict[str, dict[str, Any]] = {name: {"ci": {}} for name in measures}
    numbers = {task: picture_numbers(splits) for task, splits in tasks.items()}
    for task, splits in tasks.items():
        scorer = two_afc_score if task == "two_afc" else jnd_score
        distances: dict[str, dict[str, Tensor]] = {name: {} for name in measures}
        for split in splits:
            for name, values in split_distances(measures, split, config, progress).items():
                distances[name][split.name] = values
        answers = {split.name: split.answers for split in splits}
        # All distances are scored on the same resampled images.
        for name, by_split in distances.items():
            scored[name][task] = _with_mean({s: scorer(d, answers[s]) for s, d in by_split.items()})
            scored[name]["ci"][task] = bootstrap_intervals(
                by_split, answers, numbers[task], scorer, config.resamples, config.seed
            )
    # LatentLPIPS' scores come first; the others are its baselines.
    scores = scored.pop(SCORED_METRIC)
    people = {split.name: human_agreement(split.answers) for split in tasks["two_afc"]}
    result = ScoreResult(
        two_afc=scores["two_afc"],
        jnd=scores["jnd"],
        ci=scores["ci"],
        baselines=scored,
        people=_with_mean(people),
        judgments={task: {split.name: len(split) for split in splits} for task, splits in tasks.items()},
        pictures={
            task: {s: len(n.unique()) for s, n in by_split.items()} for task, by_split in numbers.items()
        },
        seconds=time.monotonic() - started,
    )
    if out is not None:
        write_atomically(out, json.dumps({"config": to_json(config), **asdict(result)}, indent=1))
    return result


def open_scored_distances(config: ScoreConfig, device: torch.device) -> dict[str, ScoredDistance]:
    """Load LatentLPIPS and the baselines by name; all take pixels [B, 3, H, W] in [-1, 1]."""
    vae = pretrained.load_autoencoder(config.latents).to(device)
    metric = open_metric(config.weights, config.latents, vae, device)
    measures = {SCORED_METRIC: ScoredDistance(lambda x: encode_patches(x, config.patch, vae, device), metric)}
    pixels: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": pixel_squared_error, "ssim": ssim_distance}
    # Baselines compare pixels.
    for name in config.baselines:
        measures[name] = ScoredDistance(lambda x: x.to(device), pixels[name])
    if config.lpips:
        lpips = PixelLPIPS(config.lpips, config.lpips_weights or None).to(device)
        measures[f"lpips_{config.lpips}"] = ScoredDistance(lambda x: x.to(device), lpips)
    return measures


@torch.no_grad()
def split_distances(
    measures: Mapping[str, ScoredDistance],
    split: JudgmentSplit,
    config: ScoreConfig,
    progress: Progress = quiet,
) -> dict[str, Tensor]:
    """Return distances per measure: [N, 2] from ref to p0 and to p1, or for JND [N, 1] from p0 to p1.

    Raises UserError for a distance that is not finite.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in measures}
    done = 0
    # The first image is the reference (for JND, one of the two).
    for first, *others in image_batches(split, config.patch.load, config.patch.batch):
        for name, measure in measures.items():
            anchor = measure.prepare(first)
            distances = [measure.compare(measure.prepare(x), anchor).double().cpu() for x in others]
            rows[name].append(torch.stack(distances, 1))
            # A NaN would count as a wrong judgment without an error.
            if not torch.isfinite(rows[name][-1]).all():
                raise UserError(
                    f"{name} gives distances that are not finite on {split.name}; check its weights"
                )
        done += len(first)
        progress(f"scoring {split.name}", done, len(split))
    return {name: torch.cat(chunks) for name, chunks in rows.items()}


def two_afc_score(distances: Tensor, answers: Tensor) -> float:
    """Return the mean agreement of distances [N, 2] with shares [N] that prefer p1; a tie counts one half."""
    d0, d1 = distances.unbind(1)
    return two_afc_agreement(d0, d1, answers)


def human_agreement(answers: Tensor) -> float:
    """Return how often two random people agree on a judgment, from shares [N] that prefer p1."""
    p = answers.double()
    return (p**2 + (1 - p) ** 2).mean().item()


def jnd_score(distances: Tensor, answers: Tensor) -> float:
    """Return the average precision of distances [N, 1] against shares [N] that see no difference.

    This is the area under the precision-recall curve with monotone precision (Zhang et al. 2018; Everingham
    et al. 2010), nearest first. NaN if nobody judges two images as the same.
    """
    # Rank by distance: a good distance puts pairs that look the same first.
    order = distances[:, 0].argsort(stable=True)
    shares = answers.double()[order].numpy()
    if shares.sum() == 0:
        return float("nan")
    # Area under the curve, with precision made monotone from the right.
    precision = shares.cumsum() / np.arange(1, len(shares) + 1)
    recall = shares.cumsum() / shares.sum()
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * highest).sum())


def bootstrap_intervals(
    distances: Mapping[str, Tensor],
    answers: Mapping[str, Tensor],
    pictures: Mapping[str, Tensor],
    scorer: Callable[[Tensor, Tensor], float],
    resamples: int,
    seed: int,
) -> dict[str, list[float]]:
    """Return 95 % percentile intervals of each split's score and of their mean, from a bootstrap over images.

    Images are resampled, not judgments (Efron & Tibshirani 1993; Field & Welsh 2007 for clusters): all
    judgments of one image are drawn together, in all splits that show it. The resamples do not depend on the
    distances, so all measures are scored on the same ones. `pictures` has the image of each judgment, [N] per
    split, as `picture_numbers` returns them.
    """
    if not resamples or not distances:
        return {}
    # Resample the images of each group of splits that share images.
    scores: dict[str, list[float]] = {}
    for number, splits in enumerate(_groups_sharing_images(pictures)):
        rng = generator(seed, Stream.SCORE_BOOTSTRAP, number)
        images = torch.cat([pictures[split] for split in splits]).unique()
        clusters = {split: _Clusters(pictures[split], images) for split in splits}
        for _ in range(resamples):
            sample = torch.randint(len(images), (len(images),), generator=rng)
            for split in splits:
                rows = clusters[split].rows(sample)
                value = scorer(distances[split][rows], answers[split][rows]) if len(rows) else math.nan
                scores.setdefault(split, []).append(value)
    # Percentiles of each split and of the mean over splits, without undefined scores.
    defined = [values for values in scores.values() if not all(map(math.isnan, values))]
    scores["mean"] = np.mean(defined, axis=0).tolist() if defined else []
    finite = {split: [v for v in values if not math.isnan(v)] for split, values in scores.items()}
    return {split: [float(q) for q in np.percentile(v, [2.5, 97.5])] for split, v in finite.items() if v}


class _Clusters:
    """The rows of a split grouped by image, so that resampled images become rows without a loop."""

    def __init__(self, pictures: Tensor, images: Tensor) -> None:
        numbers = torch.searchsorted(images, pictures)
        self.order = numbers.argsort(stable=True)
        self.sizes = numbers.bincount(minlength=len(images))
        self.starts = self.sizes.cumsum(0) - self.sizes

    def rows(self, sample: Tensor) -> Tensor:
        sizes = self.sizes[sample]
        before = sizes.cumsum(0) - sizes
        offsets = torch.repeat_interleave(self.starts[sample] - before, sizes)
        return self.order[offsets + torch.arange(len(offsets))]


def _groups_sharing_images(pictures: Mapping[str, Tensor]) -> list[list[str]]:
    """Group the splits so that splits which show a common image are in the same group."""
    groups: list[tuple[list[str], set[int]]] = []
    for split, numbers in pictures.items():
        images = set(numbers.tolist())
        sharing = [group for group in groups if group[1] & images]
        names = [name for group in sharing for name in group[0]] + [split]
        groups = [group for group in groups if group not in sharing]
        groups.append((names, images.union(*(group[1] for group in sharing))))
    return [names for names, _ in groups]


def check_patch_settings(config: ScoreConfig) -> None:
    """Raise UserError if the weights were calibrated on patches with other settings."""
    expected, got = weights.read_lpips_meta(config.weights).get("patch"), patch_facts(config.patch)
    if expected is not None and expected != got:
        raise UserError(
            f"{config.weights} was calibrated with {_settings(expected)}, got {_settings(got)}; "
            f"set {_settings(expected)}, or calibrate again"
        )


def _settings(patch: Mapping[str, int]) -> str:
    return " ".join(f"patch.{name}={value}" for name, value in patch.items())


def _with_mean(scores: dict[str, float]) -> dict[str, float]:
    scores = {split: value for split, value in scores.items() if not math.isnan(value)}
    return {**scores, "mean": sum(scores.values()) / len(scores)} if scores else {}
