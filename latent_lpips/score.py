"""`d2g lpips score`: how far distances agree with people, in BAPPS' two tasks."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core import dist, pretrained
from core.checkpoint import write_atomically
from core.config import to_json
from core.errors import UserError
from core.progress import Progress, quiet
from core.seeds import generator
from latent_lpips.bapps import Split, batches, find_splits
from latent_lpips.baselines import squared_error, structural_distance
from latent_lpips.calibration import open_metric, to_latents
from latent_lpips.pixels import PixelLPIPS
from latent_lpips.recipes import ScoreConfig, given
from latent_lpips.sources import alone

OURS = "latent_lpips"


@dataclass(frozen=True, slots=True)
class Measure:
    """A distance in two steps, so that a reference is prepared once: pixels -> what `compare` takes, two of
    which -> [B]."""

    prepare: Callable[[Tensor], Tensor]
    compare: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """Per split, and as `mean` over splits. two_afc, jnd: LatentLPIPS; others by name in `baselines`.

    ci: 95 % percentile intervals over resampled judgements. people: the 2AFC score of one person's answer
    against all others' (Zhang et al. 2018), which bounds what a distance can reach. judgements: how many.
    """

    two_afc: dict[str, float]
    jnd: dict[str, float]
    ci: dict[str, dict[str, list[float]]]
    baselines: dict[str, dict[str, Any]]
    people: dict[str, float]
    judgements: dict[str, dict[str, int]]
    seconds: float


def score_folder(config: ScoreConfig, out: Path | None = None, progress: Progress = quiet) -> ScoreResult:
    """Score LatentLPIPS, and beside it what `baselines` and `lpips` name, on the val/ splits of a BAPPS
    folder (on all, where it has no parts), and into the JSON file `out`. Raises UserError for bad input."""
    alone("score")
    given(config, "data", "latents", "weights")
    started = time.monotonic()
    tasks = {
        "two_afc": find_splits(config.data, "2afc", "val"),
        "jnd": find_splits(config.data, "jnd", "val"),
    }
    if not any(tasks.values()):
        raise UserError(f"{config.data}: no judgements in val/, expected folders with ref/ p0/ p1/ judge/")
    measures = open_measures(config, dist.init())
    scored: dict[str, dict[str, Any]] = {name: {"ci": {}} for name in measures}
    for task, splits in tasks.items():
        scorer = two_afc_score if task == "two_afc" else jnd_score
        found: dict[str, dict[str, Tensor]] = {name: {} for name in measures}
        for split in splits:
            for name, d in split_distances(measures, split, config, progress).items():
                found[name][split.name] = d
        answers = {split.name: split.answers for split in splits}
        for name, by_split in found.items():
            scored[name][task] = _with_mean({s: scorer(d, answers[s]) for s, d in by_split.items()})
            scored[name]["ci"][task] = intervals(by_split, answers, scorer, config.resamples, config.seed)
    ours = scored.pop(OURS)
    people = {s.name: (s.answers**2 + (1 - s.answers) ** 2).mean().item() for s in tasks["two_afc"]}
    result = ScoreResult(
        two_afc=ours["two_afc"],
        jnd=ours["jnd"],
        ci=ours["ci"],
        baselines=scored,
        people=_with_mean(people),
        judgements={task: {split.name: len(split) for split in splits} for task, splits in tasks.items()},
        seconds=time.monotonic() - started,
    )
    if out is not None:
        write_atomically(out, json.dumps({"config": to_json(config), **asdict(result)}, indent=1))
    return result


def open_measures(config: ScoreConfig, device: torch.device) -> dict[str, Measure]:
    """LatentLPIPS and the baselines by name, all from pixels [B, 3, H, W] in [-1, 1]."""
    vae = pretrained.load_autoencoder(config.latents).to(device)
    metric = open_metric(config.weights, vae, device)
    measures = {OURS: Measure(lambda x: to_latents(x, config.patch, vae, device), metric)}
    pixels: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": squared_error, "ssim": structural_distance}
    for name in config.baselines:
        measures[name] = Measure(lambda x: x.to(device), pixels[name])
    if config.lpips:
        lpips = PixelLPIPS(config.lpips, config.lpips_weights or None).to(device)
        measures[f"lpips_{config.lpips}"] = Measure(lambda x: x.to(device), lpips)
    return measures


@torch.no_grad()
def split_distances(
    measures: Mapping[str, Measure], split: Split, config: ScoreConfig, progress: Progress = quiet
) -> dict[str, Tensor]:
    """Per measure [N, 2], from ref to p0 and to p1; for JND [N, 1], from p0 to p1."""
    found: dict[str, list[Tensor]] = {name: [] for name in measures}
    done = 0
    for first, *others in batches(split, config.patch.load, config.patch.batch):
        for name, measure in measures.items():
            anchor = measure.prepare(first)
            rows = [measure.compare(measure.prepare(other), anchor).double().cpu() for other in others]
            found[name].append(torch.stack(rows, 1))
        done += len(first)
        progress(f"scoring {split.name}", done, len(split))
    return {name: torch.cat(rows) for name, rows in found.items()}


def two_afc_score(distances: Tensor, answers: Tensor) -> float:
    """Mean agreement of distances [N, 2] with shares [N] that prefer p1; a tie counts a half."""
    return two_afc_rows(distances, answers).mean().item()


def two_afc_rows(distances: Tensor, answers: Tensor) -> Tensor:
    """Each judgement's agreement, [N]."""
    d0, d1 = distances.unbind(1)
    answers = answers.double()
    return (d0 < d1) * (1 - answers) + (d1 < d0) * answers + (d0 == d1) * 0.5


def jnd_score(distances: Tensor, answers: Tensor) -> float:
    """Average precision of distances [N, 1], nearest first, for shares [N] that see no difference: the area
    under the precision-recall curve, precision made monotone (Zhang et al. 2018; Everingham et al. 2010)."""
    order = distances[:, 0].argsort(stable=True)
    same = answers.double()[order].numpy()
    if same.sum() == 0:
        return float("nan")
    precision = same.cumsum() / np.arange(1, len(same) + 1)
    recall = same.cumsum() / same.sum()
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * highest).sum())


def intervals(
    distances: Mapping[str, Tensor],
    answers: Mapping[str, Tensor],
    scorer: Callable[[Tensor, Tensor], float],
    resamples: int,
    seed: int,
) -> dict[str, list[float]]:
    """95 % percentile intervals of each split's score and of their mean, over judgements drawn anew within
    each split (Efron & Tibshirani 1993). The draws don't depend on the distances: measures are comparable."""
    if not resamples or not distances:
        return {}
    draws: dict[str, list[float]] = {}
    for number, (split, d) in enumerate(distances.items()):
        rng = generator(seed, 0xB007, number)
        rows = (torch.randint(len(d), (len(d),), generator=rng) for _ in range(resamples))
        draws[split] = [scorer(d[r], answers[split][r]) for r in rows]
    draws["mean"] = np.mean(list(draws.values()), axis=0).tolist()
    return {split: [float(q) for q in np.nanpercentile(v, [2.5, 97.5])] for split, v in draws.items()}


def _with_mean(scores: dict[str, float]) -> dict[str, float]:
    return {**scores, "mean": sum(scores.values()) / len(scores)} if scores else {}
