"""`d2g lpips calibrate`: heads for a trunk, from two-alternative judgements in BAPPS' layout."""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import dist, pretrained
from core.config import digest, to_json
from core.errors import UserError
from core.latents import encode
from core.progress import Progress, quiet
from core.runlog import RunLog
from latent_lpips import weights
from latent_lpips.bapps import Split, batches, find_splits, upsampled
from latent_lpips.cache import Rows, cached
from latent_lpips.metric import LatentLPIPS
from latent_lpips.recipes import HeadsConfig, PatchConfig, given
from latent_lpips.sources import check_size
from latent_lpips.train import agreement, fit_heads, rescale, split

UNRELATED = 256
"""Judgements whose references set the scale."""


@dataclass(frozen=True, kw_only=True)
class HeadsResult:
    """What `calibrate_folder` left. accuracy: 2AFC on judgements that were not trained on; `before`: with the
    heads that it began with, all equal; `by_split`: of each val/ folder; `zeros`: share of weights at 0."""

    out: str
    accuracy: float
    before: float
    by_split: dict[str, float]
    train: int
    held_out: int
    zeros: float
    seconds: float


def calibrate_folder(config: HeadsConfig, out: Path, progress: Progress = quiet) -> HeadsResult:
    """Fit the heads of `weights` anew and write OUT, a LatentLPIPS folder.

    The trunk is in eval mode throughout. Its features of the judgements, nearly all of the work, are kept in
    OUT/run: a killed run goes on there. Ranks of torchrun share them. Raises UserError for bad input.
    """
    device = dist.init()
    given(config, "data", "latents", "weights")
    started = time.monotonic()
    vae = pretrained.load_autoencoder(config.latents).to(device)
    metric = open_metric(config.weights, vae, device)
    with torch.no_grad():
        for head in metric.heads:
            head.fill_(1.0)
    sha256 = pretrained.autoencoder_sha256(config.latents)
    log_config = {**to_json(config), "autoencoder": sha256, "trunk": _digest(metric)}
    RunLog(out / "run", log_config)
    train, val = find_splits(config.data, "2afc", "train"), _validation(config.data)
    parts = train + val
    means = [_features(config, out, part, vae, metric, i, progress) for i, part in enumerate(parts)]
    means0, means1 = (torch.cat([pair[side] for pair in means]).to(device) for side in (0, 1))
    judge = torch.cat([part.answers for part in parts]).to(device)
    rows = torch.arange(len(judge))
    if val:
        learnt, held = rows[: sum(map(len, train))], rows[sum(map(len, train)) :]
    else:
        learnt, held = split(len(judge), config.heads.held_out, config.seed)

    def two_afc(rows: Tensor) -> float:
        flat = torch.cat(list(metric.heads))
        rows = rows.to(device)
        return agreement(means0[rows] @ flat, means1[rows] @ flat, judge[rows])

    before = two_afc(held)
    fit_heads(metric, means0, means1, judge, learnt, config.heads, config.seed, progress)
    ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
    ranges = [rows[end - len(part) : end] for part, end in zip(parts, ends, strict=True)]
    by_split = {part.name: two_afc(own) for part, own in zip(val, ranges[len(train) :], strict=True)}
    accuracy = two_afc(held)
    if config.unrelated is not None:
        rescale(metric, _references(config, parts[0], vae, device), config.unrelated, UNRELATED)
    flat = torch.cat(list(metric.heads))
    result = HeadsResult(
        out=str(out),
        accuracy=accuracy,
        before=before,
        by_split=by_split,
        train=len(learnt),
        held_out=len(held),
        zeros=(flat == 0).float().mean().item(),
        seconds=time.monotonic() - started,
    )
    if dist.rank() == 0:
        facts = {"autoencoder": config.latents, "autoencoder_sha256": sha256, "calibrated_on": config.data}
        scores = {"two_afc": accuracy, "two_afc_before": before, "two_afc_by_split": by_split}
        weights.save(
            metric, out, {**weights.read_meta(config.weights), **facts, **scores, "calibrated": True}
        )
    dist.barrier()
    return result


def open_metric(path: str, vae: Any, device: torch.device) -> LatentLPIPS:
    """The metric of `weights` for the latents of `vae`, folded. Raises UserError where they don't fit."""
    return weights.load_lpips(path, int(vae.config.latent_channels), device=device)


@torch.no_grad()
def to_latents(pixels: Tensor, patch: PatchConfig, vae: Any, device: torch.device) -> Tensor:
    """Patches [B, 3, H, W] in [-1, 1], of any size the autoencoder takes once enlarged -> scaled latents."""
    large = upsampled(pixels.to(device), patch.upsample)
    for side in large.shape[2:]:
        check_size(vae, int(side), "a patch (patch.load, patch.upsample)")
    return encode(vae, large)


def _validation(data: str) -> list[Split]:
    """The splits of val/; none where the data is in no parts, and splits are the same for both."""
    parted = [Path(data) / "val", Path(data) / "2afc" / "val"]
    return find_splits(data, "2afc", "val") if any(folder.is_dir() for folder in parted) else []


def _features(
    config: HeadsConfig,
    out: Path,
    part: Split,
    vae: Any,
    metric: LatentLPIPS,
    number: int,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """The channel averages [N, sum of channels] between ref and p0, and ref and p1."""
    device, batch = metric.heads[0].device, config.patch.batch

    @torch.no_grad()
    def make(rows: range) -> Tensor:
        made = []
        for done, pixels in enumerate(batches(part, config.patch.load, batch, rows)):
            ref, p0, p1 = (to_latents(x, config.patch, vae, device) for x in pixels)
            both = [torch.cat(metric.channel_means(p, ref), 1) for p in (p0, p1)]
            made.append(torch.stack(both, 1).cpu())
            progress(f"features of {part.name}", min(rows.start + (done + 1) * batch, len(part)), len(part))
        return torch.cat(made)

    names = [[path.name, path.stat().st_size] for paths in part.pictures for path in paths]
    facts = {"patch": to_json(config.patch), "pictures": digest(names), "trunk": _digest(metric)}
    rows: Rows = cached(
        out / "run" / "features", f"{number}-{part.name}", len(part), facts, make, dtype=torch.float32
    )
    both = rows[range(len(rows))]
    return both[:, 0], both[:, 1]


def _digest(metric: LatentLPIPS) -> str:
    """sha256 of the trunk's weights."""
    total = hashlib.sha256()
    for weight in metric.trunk.parameters():
        total.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _references(config: HeadsConfig, part: Split, vae: Any, device: torch.device) -> Tensor:
    """Latents of the first references, to be taken as unrelated."""
    if len(part) < 2:
        raise UserError(f"{part.name} holds one judgement; expected two or more to set the scale")
    rows = range(min(UNRELATED, len(part)))
    found = batches(part, config.patch.load, config.patch.batch, rows)
    return torch.cat([to_latents(pixels[0], config.patch, vae, device) for pixels in found])
