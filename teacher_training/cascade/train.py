"""Trains a small Wuerstchen in the paper's order: VQGAN, then stage B with the compressor, then stage C."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d2g.core.atomic_files import write_atomically
from d2g.core.config import pick, to_json
from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.json_files import read_json_object
from d2g.core.precision import set_training_arithmetic
from d2g.core.progress import Progress, quiet
from d2g.core.tracking.run_directory import RunLog, same_places, sole_owner
from d2g.diffusion import cascade_files, pretrained
from d2g.diffusion.families.wuerstchen import WuerstchenConditioner
from d2g.diffusion.latents import encode, from_uint8
from d2g.diffusion.pipelines import TRAINING
from teacher_training.cascade.compressor import SemanticCompressor
from teacher_training.cascade.config import CASCADE_PARTS, CascadeConfig
from teacher_training.cascade.stages import CaptionTable, stage_b_loss, stage_c_loss, vqgan_loss
from teacher_training.config import FitConfig
from teacher_training.data import TrainingPictures, cached_pictures, captioned_images, random_rows
from teacher_training.loop import fit_modules
from teacher_training.verdict import reconstruction_psnr, spread_rows

_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class CascadeSummary:
    """Result of `train_cascade`: the two teachers, and per part its parameters, images, seconds, scores."""

    stage_b: str
    stage_c: str
    images: int
    seconds: float
    parts: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Objects that the parts share. images: uint8 [N, 3, S, S], with N captions. device: where networks are
    trained; between the parts all are on the CPU."""

    config: CascadeConfig
    out: Path
    images: Tensor
    captions: list[str]
    conditioner: WuerstchenConditioner
    device: torch.device
    progress: Progress

    @property
    def work(self) -> Path:
        """Caches, checkpoints, curves and scores."""
        return self.out / TRAINING

    @property
    def compressor_file(self) -> Path:
        """The weights of the finished compressor."""
        return self.out / "compressor" / "model.safetensors"


def train_cascade(
    config: CascadeConfig,
    out: Path,
    parts: tuple[str, ...] = CASCADE_PARTS,
    progress: Progress = quiet,
) -> CascadeSummary:
    """Train the parts that are not done yet, one after the other, in one process, on its GPU or on the CPU.

    OUT/stage_b becomes a WuerstchenDecoderPipeline, which holds the VQGAN too, OUT/stage_c a
    WuerstchenPriorPipeline, both in diffusers layout; OUT/compressor holds the compressor, which sampling
    does not need, and OUT/training caches, checkpoints and curves. A longer training of stage C goes on from
    its end. Raises SettingError for an unknown part, UserError for a part whose predecessor is missing, and
    for a finished part with other settings.
    """
    started = time.monotonic()
    for part in parts:
        pick(dict.fromkeys(CASCADE_PARTS), part, "part")
    device = process_group.own_device()
    set_training_arithmetic(device, bf16=False)
    with sole_owner(out, "trains in"):
        job = _open_job(config, out, device, progress)
        scores = {part: _run_part(part, job) for part in CASCADE_PARTS if part in parts}
    return CascadeSummary(
        stage_b=str(out / "stage_b"),
        stage_c=str(out / "stage_c"),
        images=len(job.images),
        seconds=time.monotonic() - started,
        parts=scores,
    )


def _open_job(config: CascadeConfig, out: Path, device: torch.device, progress: Progress) -> _Job:
    """Open OUT, which belongs to one data set, load its images, and the text encoder."""
    names = ("data", "column", "size", "images", "seed", "caption_template", "text")
    facts = {key: to_json(config)[key] for key in names}
    RunLog(out / TRAINING, facts, notes=same_places(out / TRAINING, facts, ("data", "text")))
    source = (config.data, config.size, config.images, config.seed)

    def load() -> TrainingPictures:
        images, captions = captioned_images(*source, config.caption_template, progress, config.column)
        return TrainingPictures(images=images, prompts=captions)

    pictures = cached_pictures(out / TRAINING, load)
    return _Job(
        config=config,
        out=out,
        images=pictures.images,
        captions=pictures.prompts,
        conditioner=cascade_files.frozen_text(config.text),
        device=device,
        progress=progress,
    )


def _fit_config(config: CascadeConfig, part: str) -> FitConfig:
    fit: FitConfig = getattr(config, part).fit
    return fit


def _run_part(part: str, job: _Job) -> dict[str, Any]:
    """Train one part unless it is finished; its scores mark it as finished."""
    # The length stands apart from the settings that a resumed training must share.
    length = _fit_config(job.config, part).images
    settings = to_json(getattr(job.config, part))
    del settings["fit"]["images"]
    if part == "stage_b":
        settings["compressor"] = to_json(job.config.compressor)

    # A finished part returns its scores. Only stage C can be trained further.
    file = job.work / part / "scores.json"
    log = RunLog(job.work / part, {**settings, "images": length}, notes=("images",))
    if file.is_file():
        scores = read_json_object(file, f"delete {file.parent} and run again")
        if scores["length"] == length:
            return scores
        if part != "stage_c" or length < scores["length"]:
            raise UserError(
                f"{part} in {file.parent} is finished with {scores['length']:,} images, the settings ask for "
                f"{length:,}; give {scores['length']:,}, or another --out"
            )

    # Train it, and mark it as finished.
    started = time.monotonic()
    scores = _TRAIN_PART[part](job, log)
    scores |= {"length": length, "seconds": time.monotonic() - started}
    write_atomically(file, json.dumps(scores))
    return scores


def _train_vqgan(job: _Job, log: RunLog) -> dict[str, Any]:
    config = job.config.vqgan
    torch.manual_seed(job.config.seed)
    vqgan = cascade_files.new_vqgan(
        embed_dim=config.channels,
        bottleneck_blocks=config.bottleneck_blocks,
        latent_channels=config.latent_channels,
        num_vq_embeddings=config.codes,
    ).to(job.device)
    loss_of = vqgan_loss(vqgan, job.images, config)
    _fit("vqgan", job, log, {"vqgan": vqgan}, loss_of, config.fit)
    # Scaled latents get unit variance. The pictures may be sorted: take them from all.
    sample = job.images[random_rows(len(job.images), 1024)]
    with torch.no_grad():
        raw = torch.cat([vqgan.encode(pixels / 2 + 0.5).latents for pixels in _pixels(sample, job.device)])
    vqgan.register_to_config(scale_factor=round(raw.std().item(), 5))
    quality, of_mean = reconstruction_psnr(vqgan, job.images[spread_rows(len(job.images))])
    pretrained.save_component(vqgan.to("cpu"), job.out / "vqgan")
    return {"params": _params(vqgan), "psnr": quality, "psnr_mean_picture": of_mean}


def _train_stage_b(job: _Job, log: RunLog) -> dict[str, Any]:
    config, vqgan = job.config.stage_b, cascade_files.load_vqgan(_needs(job.out / "vqgan", "vqgan"))
    vqgan.to(job.device)
    latents = _encoded(job, "vqgan latents", lambda pixels: encode(vqgan, pixels))
    torch.manual_seed(job.config.seed)
    levels = len(config.channels)
    network = cascade_files.new_decoder(
        c_in=latents.shape[1],
        c_out=latents.shape[1],
        c_hidden=list(config.channels),
        nhead=[-1, *(width // config.head_width for width in config.channels[1:])],
        blocks=list(config.blocks),
        level_config=["CT", *["CTA"] * (levels - 1)],
        inject_effnet=[True] * levels,
        c_cond=config.condition_width,
        effnet_embd=job.config.compressor.latent_channels,
        clip_embd=_text_width(job),
    ).to(job.device)
    compressor = SemanticCompressor(job.config.compressor).to(job.device)
    loss_of = stage_b_loss(network, compressor, job.images, latents, _caption_table(job), config)
    _fit("stage B", job, log, {"decoder": network, "compressor": compressor}, loss_of, config.fit)
    # The latents of stage C have unit variance under the averaged weights, too.
    sample = job.images[random_rows(len(job.images), 2048)]
    compressor.set_statistics(torch.cat(_pixels(sample, job.device)))
    for module in (network, compressor, vqgan):
        module.to("cpu")
    cascade_files.save_stage_b(
        job.out / "stage_b", network, vqgan, job.conditioner, latents.shape[-1], job.config.downscale / 4
    )
    job.compressor_file.parent.mkdir(parents=True, exist_ok=True)
    save_file(compressor.state_dict(), job.compressor_file)
    return {"params": _params(network), "compressor_params": _params(compressor)}


def _train_stage_c(job: _Job, log: RunLog) -> dict[str, Any]:
    config, compressor = job.config.stage_c, SemanticCompressor(job.config.compressor)
    compressor.load_state_dict(load_file(_needs(job.compressor_file, "stage_b")))
    compressor.eval().requires_grad_(False).to(job.device)
    latents = _encoded(job, "semantic latents", compressor)
    torch.manual_seed(job.config.seed)
    network = cascade_files.new_prior(
        c_in=latents.shape[1],
        c=config.width,
        c_cond=_text_width(job),
        depth=config.depth,
        nhead=config.heads,
    ).to(job.device)
    loss_of = stage_c_loss(network, latents, _caption_table(job), config.caption_dropout)
    _fit("stage C", job, log, {"prior": network}, loss_of, config.fit)
    cascade_files.save_stage_c(job.out / "stage_c", network.to("cpu"), job.conditioner, latents.shape[-1])
    return {"params": _params(network)}


_TRAIN_PART: dict[str, Callable[[_Job, RunLog], dict[str, Any]]] = {
    "vqgan": _train_vqgan,
    "stage_b": _train_stage_b,
    "stage_c": _train_stage_c,
}


def _fit(
    label: str, job: _Job, log: RunLog, modules: Mapping[str, nn.Module], loss_of: Any, fit: FitConfig
) -> None:
    fit_modules(label, log, modules, loss_of, len(job.images), fit, job.config.seed, job.progress)


def _needs(path: Path, part: str) -> Path:
    """A result of an earlier part. Raises UserError if it is missing."""
    if not path.exists():
        raise UserError(f"{path} is missing; train {part} first")
    return path


def _pixels(images: Tensor, device: torch.device) -> list[Tensor]:
    """uint8 images in batches of pixels in [-1, 1] on a device."""
    return [from_uint8(part.to(device)) for part in images.split(_BATCH)]


@torch.no_grad()
def _encoded(job: _Job, label: str, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of the pixels of all images, on the CPU."""
    parts: list[Tensor] = []
    for part in job.images.split(_BATCH):
        parts.append(function(from_uint8(part.to(job.device))).cpu())
        job.progress(f"encode {label}", sum(map(len, parts)), len(job.images))
    return torch.cat(parts)


@torch.no_grad()
def _caption_table(job: _Job) -> CaptionTable:
    """The text of all rows, in half precision."""
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(job.captions))}
    captions, hidden = list(numbers), list[Tensor]()
    job.conditioner.to(job.device)
    for start in range(0, len(captions), _BATCH):
        cond = job.conditioner.encode(captions[start : start + _BATCH])
        hidden.append(cond.tensors["hidden"].half().cpu())
        job.progress("encode captions", start + len(hidden[-1]), len(captions))
    empty = job.conditioner.encode([""]).tensors["hidden"].cpu()
    job.conditioner.to("cpu")
    rows = torch.tensor([numbers[caption] for caption in job.captions])
    return CaptionTable(torch.cat(hidden), rows, empty)


def _text_width(job: _Job) -> int:
    encoder: Any = job.conditioner.models["text_encoder"]
    return int(encoder.config.hidden_size)


def _params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
