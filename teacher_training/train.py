"""Trains a Stable-Diffusion-like teacher on captioned images: VAE, text encoder, UNet, LatentLPIPS, CLIP."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.config import pick, to_json
from d2g.core.distributed import process_group
from d2g.core.json_files import read_json_object
from d2g.core.progress import Progress, quiet
from d2g.core.tracking.run_directory import RunLog
from d2g.diffusion.latents import encode, from_uint8
from d2g.diffusion.pretrained import (
    load_schedule,
    load_tokenizer,
    load_unet,
    load_vae,
    new_tokenizer,
    save_component,
    save_pipeline,
)
from latent_lpips import weights as lpips_weights
from latent_lpips.config import LPIPS_PRESETS as LPIPS_PRESETS
from latent_lpips.training.small import train_latent_lpips
from teacher_training.autoencoder import train_autoencoder
from teacher_training.clip import train_clip
from teacher_training.config import TeacherConfig
from teacher_training.data import cached_images
from teacher_training.unet import build_denoiser, train_denoiser

TEACHER_STAGES = ("data", "vae", "unet", "lpips", "clip")


@dataclass(frozen=True, kw_only=True)
class TeacherSummary:
    """Result of `train_teacher`: parameters of the UNet, number of training images, and scores per stage."""

    out: str
    params: int
    images: int
    seconds: float
    scores: dict[str, Any]


def train_teacher(
    config: TeacherConfig, out: Path, stages: tuple[str, ...] = TEACHER_STAGES, progress: Progress = quiet
) -> TeacherSummary:
    """Train the stages that are not done yet, one after the other.

    OUT becomes a StableDiffusionPipeline in diffusers layout with latent_lpips/ and clip/ beside its
    components, and training/ with caches, configs, curves and checkpoints. A stage is complete on disk before
    the next one starts. Runs on every rank of torchrun. Raises SettingError for an unknown stage.
    """
    started, work = time.monotonic(), out / "training"
    for stage in stages:
        pick(dict.fromkeys(TEACHER_STAGES), stage, "stage")
    # A folder belongs to one data set; each stage checks its own settings.
    names = ("data", "column", "size", "images", "seed", "caption_template")
    data = {key: to_json(config)[key] for key in names}
    RunLog(work, data)  # each stage checks its own settings against its own folder
    images, captions = cached_images(
        work,
        config.data,
        config.size,
        config.images,
        config.seed,
        config.caption_template,
        progress,
        config.column,
    )
    scores: dict[str, Any] = {}
    # Train what has no scores yet.
    for stage in [s for s in TEACHER_STAGES[1:] if s in stages]:
        scores_file = work / stage / "scores.json"
        if not scores_file.is_file():
            stage_started = time.monotonic()
            result = _TRAIN_STAGE[stage](config, out, images, captions, progress)
            if process_group.rank() == 0:
                write_atomically(
                    scores_file, json.dumps({**result, "seconds": time.monotonic() - stage_started})
                )
            process_group.barrier()
        scores[stage] = read_json_object(scores_file, f"delete {scores_file.parent} and run again")
    params = sum(p.numel() for p in load_unet(str(out)).parameters()) if (out / "unet").is_dir() else 0
    return TeacherSummary(
        out=str(out), params=params, images=len(images), seconds=time.monotonic() - started, scores=scores
    )


def _train_vae(
    config: TeacherConfig, out: Path, images: Tensor, captions: list[str], progress: Progress
) -> dict[str, Any]:
    log = RunLog(out / "training" / "vae", to_json(config.vae))
    vae = train_autoencoder(images, config.vae, log, config.seed, progress)
    if process_group.rank() == 0:
        save_component(vae, out / "vae")
        index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
        write_atomically(out / "model_index.json", json.dumps(index))
    return {"params": sum(p.numel() for p in vae.parameters()), **log.read()[-1]}


def _latents(out: Path, images: Tensor, progress: Progress) -> Tensor:
    """Return scaled latents [N, C, h, w] of all images: posterior means, which rank 0 computes and caches."""
    path = out / "training" / "latents.pt"
    if not path.is_file() and process_group.rank() == 0:
        vae, rows = load_vae(str(out)), []
        # The file gets its name when it is complete.
        with torch.no_grad():
            for part in images.split(128):
                rows.append(encode(vae, from_uint8(part)))
                progress("encode", sum(map(len, rows)), len(images))
        torch.save(torch.cat(rows), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    process_group.barrier()
    latents: Tensor = torch.load(path, weights_only=True)
    return latents


def _train_unet(
    config: TeacherConfig, out: Path, images: Tensor, captions: list[str], progress: Progress
) -> dict[str, Any]:
    latents, vae = _latents(out, images, progress), load_vae(str(out))
    if process_group.rank() == 0:
        tokenizer = new_tokenizer(captions, out / "tokenizer", config.unet.vocab_size, config.unet.max_length)
        # The schedule must be on disk before training, because it is loaded like any teacher's.
        text, unet = build_denoiser(config.unet, tokenizer, latents.shape[1], latents.shape[-1])
        save_pipeline(out, unet=unet, vae=vae, conditioner=text, set_alpha_to_one=True)
    process_group.barrier()
    # Train, and replace the untrained weights.
    log = RunLog(out / "training" / "unet", to_json(config.unet))
    text, unet = train_denoiser(
        latents,
        captions,
        load_tokenizer(str(out)),
        load_schedule(str(out)),
        config.unet,
        log,
        config.seed,
        progress,
    )
    if process_group.rank() == 0:
        save_pipeline(out, unet=unet, vae=vae, conditioner=text, set_alpha_to_one=True)
    return {"params": sum(p.numel() for p in unet.parameters()), **log.read()[-1]}


def _train_lpips(
    config: TeacherConfig, out: Path, images: Tensor, captions: list[str], progress: Progress
) -> dict[str, Any]:
    if process_group.rank() != 0:
        return {}
    latents, vae = _latents(out, images, progress), load_vae(str(out))

    def encode_uint8(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return encode(vae, from_uint8(rows))

    network = replace(config.lpips.network, channels=latents.shape[1])
    settings = replace(config.lpips, network=network)
    metric, scores = train_latent_lpips(settings, latents, captions, images, encode_uint8, progress)
    lpips_weights.save_lpips(metric, out / "latent_lpips", {"trained_on": config.data, **scores})
    return scores


def _train_clip(
    config: TeacherConfig, out: Path, images: Tensor, captions: list[str], progress: Progress
) -> dict[str, Any]:
    if process_group.rank() != 0:
        return {}
    settings = replace(config.clip, image_size=config.size)
    return train_clip(images, captions, out / "tokenizer", out / "clip", settings, progress=progress)


_TRAIN_STAGE = {"vae": _train_vae, "unet": _train_unet, "lpips": _train_lpips, "clip": _train_clip}
