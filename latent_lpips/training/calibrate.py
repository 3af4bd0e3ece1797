"""`d2g lpips calibrate`: heads for a trunk, from two-alternative judgments in BAPPS' layout."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from d2g.core.config import digest, to_json
from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import Stream, generator
from d2g.core.tracking.run_directory import RunLog
from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode, latent_space
from latent_lpips import weights
from latent_lpips.distance import LatentLPIPS
from latent_lpips.training.bapps import JudgmentSplit, find_splits, image_batches, upsample_pixels
from latent_lpips.training.config import HeadsConfig, PatchConfig, require_given
from latent_lpips.training.labeled_images import file_fingerprints
from latent_lpips.training.latent_cache import CachedRows, cached_rows
from latent_lpips.training.latent_stream import check_image_size
from latent_lpips.training.small import fit_heads, rescale_heads, split_rows, two_afc_agreement

SCALE_IMAGES = 256
"""Judgments whose references set the scale."""


@dataclass(frozen=True, kw_only=True)
class HeadsResult:
    """What `calibrate_folder` left. accuracy: mean over splits of the 2AFC score on judgments that were not
    trained on, as `score` counts; `before`: with the heads that it began with, all equal; `by_split`: of each
    split that has such; `zeros`: share of weights at 0."""

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

    The trunk is in eval mode throughout. Its features of the judgments, nearly all of the work, are kept in
    OUT/run: a killed run goes on there, and other settings of the fit take them as they are. Ranks of
    torchrun share them. Raises UserError for bad input.
    """
    device = process_group.init()
    require_given(config, "data", "latents", "weights")
    started = time.monotonic()
    vae = pretrained.load_autoencoder(config.latents).to(device)
    metric = open_metric(config.weights, config.latents, vae, device)
    with torch.no_grad():
        for head in metric.heads:
            head.fill_(1.0)
    sha256 = pretrained.autoencoder_sha256(config.latents)
    decides = {
        **{name: getattr(config, name) for name in ("data", "latents", "weights")},
        "patch": patch_facts(config.patch),
        "autoencoder": sha256,
        "trunk": metric_sha256(metric, heads=False),
    }
    RunLog(out / "run", decides)
    train, val = find_splits(config.data, "2afc", "train"), _validation(config.data)
    parts = train + val
    means = [_features(config, decides, out, part, vae, metric, progress) for part in parts]
    means0, means1 = (torch.cat([pair[side] for pair in means]).to(device) for side in (0, 1))
    judge = torch.cat([part.answers for part in parts]).to(device)
    owner = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
    if val:
        learnt, held = (owner < len(train)).nonzero()[:, 0], (owner >= len(train)).nonzero()[:, 0]
    else:
        learnt, held = split_rows(len(judge), config.heads.held_out, config.seed)

    def two_afc() -> dict[str, float]:
        flat = torch.cat(list(metric.heads))
        own = [(part.name, held[owner[held] == i].to(device)) for i, part in enumerate(parts)]
        return {
            name: two_afc_agreement(means0[rows] @ flat, means1[rows] @ flat, judge[rows])
            for name, rows in own
            if len(rows)
        }

    before = fmean(two_afc().values())
    fit_heads(metric, means0, means1, judge, learnt, config.heads, config.seed, progress)
    by_split = two_afc()
    accuracy = fmean(by_split.values())
    if config.unrelated is not None:
        rescale_heads(metric, _references(config, parts[0], vae, device), config.unrelated, SCALE_IMAGES)
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
    if process_group.rank() == 0:
        facts: dict[str, Any] = {
            "autoencoder": config.latents,
            "autoencoder_sha256": sha256,
            "calibrated_on": config.data,
        }
        facts |= {"patch": patch_facts(config.patch), "heads": to_json(config.heads), "seed": config.seed}
        scores = {"two_afc": accuracy, "two_afc_before": before, "two_afc_by_split": by_split}
        weights.save_lpips(
            metric, out, {**weights.read_lpips_meta(config.weights), **facts, **scores, "calibrated": True}
        )
    process_group.barrier()
    return result


def open_metric(path: str, latents: str, vae: Any, device: torch.device) -> LatentLPIPS:
    """The metric of `weights` for the latents of `vae`, which is `latents`, folded. Raises UserError where
    channels, the autoencoder that the weights name, or the scale that they say are others."""
    metric = weights.load_lpips(path, int(vae.config.latent_channels), device=device)
    meta = weights.read_lpips_meta(path)
    made = meta.get("autoencoder_sha256")
    if made is not None and made != (sha256 := pretrained.autoencoder_sha256(latents)):
        raise UserError(
            f"{path}: these weights belong to the latents of {meta.get('autoencoder')} (sha256 {made[:12]}), "
            f"got {latents} ({sha256[:12]}); give that autoencoder, or weights of this one"
        )
    if "scaling_factor" in meta and "Tiny" not in type(vae).__name__:  # whose latents are born scaled
        space = latent_space(vae)
        said, got = (meta["scaling_factor"], meta["shift_factor"]), (space.scale, space.shift)
        if any(abs(a - b) > 1e-6 for a, b in zip(said, got, strict=True)):
            raise UserError(
                f"{path}: these weights take latents of scale {said[0]:g} and shift {said[1]:g}, "
                f"{latents} has {got[0]:g} and {got[1]:g}; give that latent space's autoencoder"
            )
    return metric


def patch_facts(patch: PatchConfig) -> dict[str, int]:
    """What decides a patch's latents."""
    return {"load": patch.load, "upsample": patch.upsample}


@torch.no_grad()
def encode_patches(pixels: Tensor, patch: PatchConfig, vae: Any, device: torch.device) -> Tensor:
    """Patches [B, 3, H, W] in [-1, 1], of any size the autoencoder takes once enlarged -> scaled latents."""
    large = upsample_pixels(pixels.to(device), patch.upsample)
    for side in large.shape[2:]:
        check_image_size(vae, int(side), "a patch (patch.load, patch.upsample)")
    return encode(vae, large)


def _validation(data: str) -> list[JudgmentSplit]:
    """The splits of val/; none where the data is in no parts, and splits are the same for both."""
    parted = [folder for folder in (Path(data) / "2afc" / "val", Path(data) / "val") if folder.is_dir()]
    found = find_splits(data, "2afc", "val") if parted else []
    if parted and not found:
        raise UserError(f"{parted[0]} holds no 2AFC judgments; fill it, or remove it to hold out a part")
    return found


def _features(
    config: HeadsConfig,
    decides: Mapping[str, Any],
    out: Path,
    part: JudgmentSplit,
    vae: Any,
    metric: LatentLPIPS,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """The channel averages [N, sum of channels] between ref and p0, and ref and p1."""
    device, batch = metric.heads[0].device, config.patch.batch

    @torch.no_grad()
    def make(rows: range) -> Tensor:
        made = []
        for done, pixels in enumerate(image_batches(part, config.patch.load, batch, rows)):
            ref, p0, p1 = (encode_patches(x, config.patch, vae, device) for x in pixels)
            both = [torch.cat(metric.channel_means(p, ref), 1) for p in (p0, p1)]
            made.append(torch.stack(both, 1).cpu())
            if not torch.isfinite(made[-1]).all():
                raise UserError(
                    f"LatentLPIPS features of split {part.name} are not finite; look at the weights of "
                    f"{config.weights} and the latents of {config.latents}"
                )
            progress(f"features of {part.name}", min(rows.start + (done + 1) * batch, len(part)), len(part))
        return torch.cat(made)

    marks = file_fingerprints(config.data, (path for paths in part.pictures for path in paths))
    facts = {**{name: decides[name] for name in ("patch", "autoencoder", "trunk")}, "pictures": digest(marks)}
    name = f"{part.name}-{digest(facts)[:12]}"
    rows: CachedRows = cached_rows(
        out / "run" / "features", name, len(part), facts, make, dtype=torch.float32
    )
    both = rows[range(len(rows))]
    return both[:, 0], both[:, 1]


def metric_sha256(metric: LatentLPIPS, heads: bool = True) -> str:
    """Of the trunk's weights, and the heads'."""
    total = hashlib.sha256()
    for weight in [*metric.trunk.state_dict().values(), *(metric.heads if heads else ())]:
        total.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _references(config: HeadsConfig, part: JudgmentSplit, vae: Any, device: torch.device) -> Tensor:
    """Latents of references in an order of their own: neighbors in a split may show one picture."""
    if len(part) < 2:
        raise UserError(f"{part.name} holds one judgment; expected two or more to set the scale")
    order = torch.randperm(len(part), generator=generator(0, Stream.SCALE_REFERENCES))
    rows = order[:SCALE_IMAGES].tolist()
    found = image_batches(part, config.patch.load, config.patch.batch, rows)
    return torch.cat([encode_patches(pixels[0], config.patch, vae, device) for pixels in found])
