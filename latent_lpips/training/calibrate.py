"""`d2g lpips calibrate`: fit the heads of a trunk to two-alternative judgments in BAPPS' layout."""

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
from d2g.core.tracking.run_directory import RunLog, sole_owner
from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode
from latent_lpips import weights
from latent_lpips.distance import LatentLPIPS
from latent_lpips.training.bapps import (
    JudgmentSplit,
    find_splits,
    image_batches,
    picture_numbers,
    upsample_pixels,
)
from latent_lpips.training.config import HeadsConfig, PatchConfig, require_set
from latent_lpips.training.labeled_images import file_fingerprints
from latent_lpips.training.latent_cache import CachedRows, cached_rows
from latent_lpips.training.latent_stream import check_image_size
from latent_lpips.training.small import fit_heads, rescale_heads, split_rows, two_afc_agreement

SCALE_IMAGES = 256
"""Number of reference images that set the scale of the distance."""


@dataclass(frozen=True, kw_only=True)
class HeadsResult:
    """Result of `calibrate_folder`.

    `accuracy` is the 2AFC score on held-out judgments, as `d2g lpips score` computes it, averaged over the
    splits in `by_split`; `before` is the same with the initial heads, all of weight 1. `train` and `held_out`
    count judgments. `zeros` is the share of head weights at 0.
    """

    out: str
    accuracy: float
    before: float
    by_split: dict[str, float]
    train: int
    held_out: int
    zeros: float
    seconds: float


def calibrate_folder(config: HeadsConfig, out: Path, progress: Progress = quiet) -> HeadsResult:
    """Fit the heads of `config.weights` to judgments and write OUT, a LatentLPIPS folder.

    The trunk stays in eval mode. Its features of the judgments, nearly all of the work, are cached in
    OUT/run: an interrupted run resumes there, and runs with other settings of the fit reuse them. Ranks of
    torchrun share the work. Raises UserError for bad input and while another run works in OUT.
    """
    device = process_group.init()
    require_set(config, "data", "latents", "weights")
    with sole_owner(out, "trains in"):
        return _calibrate(config, out, device, progress)


def _calibrate(config: HeadsConfig, out: Path, device: torch.device, progress: Progress) -> HeadsResult:
    started = time.monotonic()
    # Load the trunk, and start all heads from weight 1.
    vae = pretrained.load_autoencoder(config.latents).to(device)
    metric = open_metric(config.weights, config.latents, vae, device)
    for head in metric.heads:
        head.fill_(1.0)
    # Channel averages of all judgments: everything that the fit needs.
    inputs = _feature_inputs(config, metric)
    RunLog(out / "run", inputs, notes=("latents", "weights"))  # which their digests identify
    train, val = find_splits(config.data, "2afc", "train"), _validation_splits(config.data)
    splits = train + val
    features = [_split_features(config, inputs, out, split, vae, metric, progress) for split in splits]
    means0, means1 = (torch.cat([pair[side] for pair in features]).to(device) for side in (0, 1))
    judge = torch.cat([split.answers for split in splits]).to(device)
    # Hold out the validation splits, or where the data has none, all judgments of some pictures.
    split_ids = torch.repeat_interleave(torch.tensor([len(split) for split in splits]))
    if val:
        train_rows = (split_ids < len(train)).nonzero()[:, 0]
        held_out = (split_ids >= len(train)).nonzero()[:, 0]
    else:
        pictures = torch.cat(list(picture_numbers(splits).values()))
        num_pictures = int(pictures.max()) + 1
        train_rows, held_out = (
            torch.isin(pictures, part).nonzero()[:, 0]
            for part in split_rows(num_pictures, config.heads.held_out, config.seed, "distinct pictures")
        )

    def two_afc() -> dict[str, float]:
        """2AFC score of the present heads on each split that has held-out judgments."""
        flat = torch.cat(list(metric.heads))
        scores = {}
        for number, split in enumerate(splits):
            rows = held_out[split_ids[held_out] == number].to(device)
            if len(rows):
                scores[split.name] = two_afc_agreement(means0[rows] @ flat, means1[rows] @ flat, judge[rows])
        return scores

    # Score, fit and score again; then fix the scale of the distance.
    before = fmean(two_afc().values())
    fit_heads(metric, means0, means1, judge, train_rows, config.heads, config.seed, progress)
    by_split = two_afc()
    if config.unrelated is not None:
        rescale_heads(
            metric, _reference_latents(config, splits[0], vae, device), config.unrelated, SCALE_IMAGES
        )
    result = HeadsResult(
        out=str(out),
        accuracy=fmean(by_split.values()),
        before=before,
        by_split=by_split,
        train=len(train_rows),
        held_out=len(held_out),
        zeros=(torch.cat(list(metric.heads)) == 0).float().mean().item(),
        seconds=time.monotonic() - started,
    )
    if process_group.rank() == 0:
        _save_metric(config, metric, inputs["autoencoder"], result)
    process_group.barrier()
    return result


def _feature_inputs(config: HeadsConfig, metric: LatentLPIPS) -> dict[str, Any]:
    """Everything that decides the cached features."""
    return {
        **{name: getattr(config, name) for name in ("data", "latents", "weights")},
        "patch": patch_facts(config.patch),
        "autoencoder": pretrained.autoencoder_sha256(config.latents),
        "trunk": metric_sha256(metric, heads=False),
    }


def _save_metric(config: HeadsConfig, metric: LatentLPIPS, vae_sha256: str, result: HeadsResult) -> None:
    meta = {
        **weights.read_lpips_meta(config.weights),
        "autoencoder": config.latents,
        "autoencoder_sha256": vae_sha256,
        "calibrated_on": config.data,
        "patch": patch_facts(config.patch),
        "heads": to_json(config.heads),
        "seed": config.seed,
        "two_afc": result.accuracy,
        "two_afc_before": result.before,
        "two_afc_by_split": result.by_split,
        "calibrated": True,
    }
    weights.save_lpips(metric, result.out, meta)


def open_metric(path: str, latents: str, vae: Any, device: torch.device) -> LatentLPIPS:
    """Load the folded metric of folder `path` for the latents of `vae`, which was loaded from `latents`.

    Raises UserError if the weights belong to another number of channels, another autoencoder or another
    latent scale.
    """
    # The weights must belong to this autoencoder, if they name one.
    metric = weights.load_lpips(path, int(vae.config.latent_channels), device=device)
    meta = weights.read_lpips_meta(path)
    expected = meta.get("autoencoder_sha256")
    if expected is not None and expected != (sha256 := pretrained.autoencoder_sha256(latents)):
        raise UserError(
            f"{path}: these weights belong to the latents of {meta.get('autoencoder')} "
            f"(sha256 {expected[:12]}), "
            f"got {latents} ({sha256[:12]}); give that autoencoder, or weights of this one"
        )
    weights.require_latent_scale(path, meta, vae, latents)
    return metric


def patch_facts(patch: PatchConfig) -> dict[str, int]:
    """Return the settings that decide a patch's latents."""
    return {"load": patch.load, "upsample": patch.upsample}


@torch.no_grad()
def encode_patches(pixels: Tensor, patch: PatchConfig, vae: Any, device: torch.device) -> Tensor:
    """Encode patches [B, 3, H, W] in [-1, 1] to scaled latents, after upsampling them as `patch` says."""
    large = upsample_pixels(pixels.to(device), patch.upsample)
    for side in large.shape[2:]:
        check_image_size(vae, int(side), "a patch (patch.load, patch.upsample)")
    return encode(vae, large)


def _validation_splits(data: str) -> list[JudgmentSplit]:
    """Return the splits in val/, or none if the data has no train/ and val/ parts."""
    # An empty val/ is an error: otherwise a random part would be held out silently.
    folders = [folder for folder in (Path(data) / "2afc" / "val", Path(data) / "val") if folder.is_dir()]
    splits = find_splits(data, "2afc", "val") if folders else []
    if folders and not splits:
        raise UserError(f"{folders[0]} holds no 2AFC judgments; fill it, or remove it to hold out a part")
    return splits


def _split_features(
    config: HeadsConfig,
    inputs: Mapping[str, Any],
    out: Path,
    split: JudgmentSplit,
    vae: Any,
    metric: LatentLPIPS,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Return channel averages [N, sum of channels] between ref and p0, and between ref and p1, cached."""
    # What the cache calls for the rows that it lacks.
    device, batch = metric.heads[0].device, config.patch.batch

    @torch.no_grad()
    def compute(rows: range) -> Tensor:
        chunks = []
        for done, pixels in enumerate(image_batches(split, config.patch.load, batch, rows)):
            ref, p0, p1 = (encode_patches(x, config.patch, vae, device) for x in pixels)
            channel_means = [torch.cat(metric.channel_means(p, ref), 1) for p in (p0, p1)]
            chunks.append(torch.stack(channel_means, 1).cpu())
            if not torch.isfinite(chunks[-1]).all():
                raise UserError(
                    f"LatentLPIPS features of split {split.name} are not finite; look at the weights of "
                    f"{config.weights} and the latents of {config.latents}"
                )
            progress(
                f"features of {split.name}", min(rows.start + (done + 1) * batch, len(split)), len(split)
            )
        return torch.cat(chunks)

    # Cached under a name that changes with the images and everything that decides the features.
    marks = file_fingerprints(config.data, (path for paths in split.pictures for path in paths))
    facts = {**{name: inputs[name] for name in ("patch", "autoencoder", "trunk")}, "pictures": digest(marks)}
    name = f"{split.name}-{digest(facts)[:12]}"
    rows: CachedRows = cached_rows(
        out / "run" / "features", name, len(split), facts, compute, dtype=torch.float32
    )
    both = rows[range(len(rows))]
    return both[:, 0], both[:, 1]


def metric_sha256(metric: LatentLPIPS, heads: bool = True) -> str:
    """Return the sha256 of the trunk's weights and, with `heads`, of the head weights."""
    total = hashlib.sha256()
    for weight in [*metric.trunk.state_dict().values(), *(metric.heads if heads else ())]:
        total.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _reference_latents(config: HeadsConfig, split: JudgmentSplit, vae: Any, device: torch.device) -> Tensor:
    """Return latents of reference images in random order, because neighbors may show the same image."""
    if len(split) < 2:
        raise UserError(f"{split.name} holds one judgment; expected two or more to set the scale")
    order = torch.randperm(len(split), generator=generator(0, Stream.SCALE_REFERENCES))
    rows = order[:SCALE_IMAGES].tolist()
    batches = image_batches(split, config.patch.load, config.patch.batch, rows)
    return torch.cat([encode_patches(pixels[0], config.patch, vae, device) for pixels in batches])
