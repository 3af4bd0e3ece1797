"""Trains a Stable-Diffusion-like teacher on captioned images: VAE, text encoder, UNet, LatentLPIPS, CLIP."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.config import pick, to_json
from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.json_files import read_json_object
from d2g.core.progress import Progress, quiet
from d2g.core.torch_files import load_tensors
from d2g.core.tracking.run_directory import RunLog, sole_owner
from d2g.diffusion.latents import encode, from_uint8
from d2g.diffusion.pipelines import TRAINING
from d2g.diffusion.pretrained import (
    load_conditioner,
    load_schedule,
    load_tokenizer,
    load_unet,
    load_vae,
    save_component,
    save_pipeline,
)
from latent_lpips import weights as lpips_weights
from latent_lpips.training.small import train_latent_lpips
from latent_lpips.training.synthetic_triplets import caption_targets
from teacher_training.autoencoder import train_autoencoder
from teacher_training.clip import train_clip
from teacher_training.config import TeacherConfig
from teacher_training.data import cached_images
from teacher_training.previews import autoencoder_previews, denoiser_previews
from teacher_training.report import write_teacher_report
from teacher_training.start import check_init, starting_autoencoder, starting_denoiser, starting_tokenizer
from teacher_training.unet import train_denoiser
from teacher_training.verdict import denoising_loss, judge_teacher, reconstruction_psnr, spread_rows

TEACHER_STAGES = ("data", "vae", "unet", "lpips", "clip")


@dataclass(frozen=True, kw_only=True)
class TeacherSummary:
    """Result of `train_teacher`: parameters of the UNet, number of training images, and scores per stage.

    `trained` and `verdict` are None until the UNet is finished; `report` is its page.
    """

    out: str
    params: int
    images: int
    seconds: float
    scores: dict[str, Any]
    trained: bool | None
    verdict: str | None
    report: str | None


@dataclass(frozen=True, kw_only=True)
class TeacherJob:
    """What the stages of one training share. images: uint8 [N, 3, S, S], with N captions."""

    config: TeacherConfig
    out: Path
    images: Tensor
    captions: list[str]
    progress: Progress

    @property
    def work(self) -> Path:
        """Caches, checkpoints, curves and scores."""
        return self.out / TRAINING

    @property
    def pipeline(self) -> str:
        """The components so far as a pipeline; OUT itself becomes one when the UNet is finished."""
        return str(self.work / "pipeline")


def train_teacher(
    config: TeacherConfig,
    out: Path,
    stages: tuple[str, ...] = TEACHER_STAGES,
    progress: Progress = quiet,
    command: str = "",
) -> TeacherSummary:
    """Train the stages that are not done yet, one after the other.

    OUT becomes a StableDiffusionPipeline in diffusers layout with latent_lpips/ and clip/ beside its
    components, previews/, report.html, and training/ with caches, configs, curves and checkpoints. A stage is
    complete on disk before the next one starts. `command`: what to run again to finish it. Runs on every rank
    of torchrun. Raises SettingError for an unknown stage, UserError for a finished stage that is given other
    settings, and while another process trains in OUT.
    """
    started = time.monotonic()
    process_group.init()
    for stage in stages:
        pick(dict.fromkeys(TEACHER_STAGES), stage, "stage")
    if config.init:
        check_init(config.init)
    with sole_owner(out, "trains in"):
        return _train_stages(_open_job(config, out, progress, command), stages, started)


def _train_stages(job: TeacherJob, stages: tuple[str, ...], started: float) -> TeacherSummary:
    """`train_teacher`, once OUT belongs to this run."""
    config, out = job.config, job.out
    _check_captions(job, stages)
    # Train what has no scores yet.
    scores: dict[str, Any] = {}
    trained_any = False
    for stage in [s for s in TEACHER_STAGES[1:] if s in stages]:
        scores_file = job.work / stage / "scores.json"
        finished = is_finished(scores_file, stage, config)
        log = RunLog(job.work / stage, _stage_settings(config, stage), notes=("images",))
        if not finished:
            trained_any = True
            _run_stage(stage, job, log, scores_file)
        scores[stage] = read_scores(scores_file)
    verdict = _judge(job, scores, trained_any)
    params = sum(p.numel() for p in load_unet(str(out)).parameters()) if (out / "unet").is_dir() else 0
    return TeacherSummary(
        out=str(out),
        params=params,
        images=len(job.images),
        seconds=time.monotonic() - started,
        scores=scores,
        trained=verdict.get("trained"),
        verdict=verdict.get("verdict"),
        report=verdict.get("report"),
    )


def _open_job(config: TeacherConfig, out: Path, progress: Progress, command: str) -> TeacherJob:
    """Open OUT, which belongs to one data set, and load its images."""
    names = ("data", "column", "size", "images", "seed", "caption_template", "pretrained_vae", "init")
    RunLog(out / TRAINING, {key: to_json(config)[key] for key in names})
    if command and process_group.rank() == 0:
        write_atomically(out / TRAINING / "command.txt", command + "\n")
    images, captions = cached_images(
        out / TRAINING,
        config.data,
        config.size,
        config.images,
        config.seed,
        config.caption_template,
        progress,
        config.column,
    )
    return TeacherJob(config=config, out=out, images=images, captions=captions, progress=progress)


def _check_captions(job: TeacherJob, stages: tuple[str, ...]) -> None:
    """Raise UserError for pictures that LatentLPIPS or CLIP cannot learn from, before the first stage."""
    if not {"lpips", "clip"} & set(stages):
        return
    reason = ""
    if len(job.images) < FEWEST_PICTURES:
        reason = f"it holds {len(job.images)} picture(s), expected {FEWEST_PICTURES} or more"
    elif "lpips" in stages:
        try:
            caption_targets(job.captions)
        except UserError as error:
            reason = str(error)
    if reason:
        raise UserError(
            f"{job.config.data}: LatentLPIPS and CLIP learn from pictures and their captions: {reason}; or "
            "train with --stages data,vae,unet, and distill with --set regression.losses=pseudo_huber"
        )


FEWEST_PICTURES = 3
"""Pictures that CLIP needs: two to compare, and one held out."""


def stage_length(config: TeacherConfig, stage: str) -> int:
    """Training images of a stage, repeats included."""
    lengths = {
        "vae": config.vae.fit.images,
        "unet": config.unet.fit.images,
        "lpips": config.lpips.trunk.images,
        "clip": config.clip.images,
    }
    return lengths[stage]


def _stage_settings(config: TeacherConfig, stage: str) -> dict[str, Any]:
    """The settings of a stage, with the length apart: a resumed training may have another one."""
    settings = to_json(getattr(config, stage))
    group = {"vae": "fit", "unet": "fit", "lpips": "trunk"}.get(stage)
    del (settings[group] if group else settings)["images"]
    return {**settings, "images": stage_length(config, stage)}


def read_scores(file: Path) -> dict[str, Any]:
    """The scores of a finished stage."""
    return read_json_object(file, f"delete {file.parent} and run again")


def is_finished(scores_file: Path, stage: str, config: TeacherConfig) -> bool:
    """Whether a stage is trained to the length of the config. A longer UNet training goes on from its end.

    Raises UserError for another length of any other stage, on whose results later stages depend.
    """
    if not scores_file.is_file():
        return False
    done, length = int(read_scores(scores_file).get("length", 0)), stage_length(config, stage)
    if done == length or (stage == "vae" and (config.pretrained_vae or config.init)):
        return True
    if stage == "unet" and length > done:
        return False
    raise UserError(
        f"stage {stage} in {scores_file.parent} is finished with {done:,} images, the settings ask for "
        f"{length:,}; give {done:,}, or another --out"
    )


def _run_stage(stage: str, job: TeacherJob, log: RunLog, scores_file: Path) -> None:
    """Train one stage on all ranks, and write its scores, which mark it as finished."""
    started = time.monotonic()
    result = _TRAIN_STAGE[stage](job, log)
    if process_group.rank() == 0:
        facts = {"length": stage_length(job.config, stage), "seconds": time.monotonic() - started}
        write_atomically(scores_file, json.dumps({**result, **facts}))
    process_group.barrier()


def _judge(job: TeacherJob, scores: Mapping[str, Any], trained_any: bool) -> dict[str, Any]:
    """The verdict on a finished teacher, with its report; empty while it is not finished."""
    verdict: dict[str, Any] = {}
    report, file = job.out / "report.html", job.work / "verdict.json"
    if process_group.rank() == 0 and (job.work / "unet" / "scores.json").is_file():
        if trained_any or not (file.is_file() and report.is_file()):
            verdict = judge_teacher(job.out, job.images, job.captions)
            write_teacher_report(job.out, verdict, job.images, job.captions, scores)
        verdict = read_json_object(file, f"delete {file}") | {"report": str(report)}
    process_group.barrier()
    return verdict


def _train_vae(job: TeacherJob, log: RunLog) -> dict[str, Any]:
    config, vae = job.config, starting_autoencoder(job.config)
    previews = autoencoder_previews(job.out / "previews", job.images, log, config.preview_minutes)
    if vae is None:
        vae = train_autoencoder(job.images, config.vae, log, config.seed, job.progress, previews)
    elif process_group.rank() == 0:
        previews.draw({"vae": vae}, 0)
    # The autoencoder on its own, and as the first component of the pipeline.
    if process_group.rank() == 0:
        for folder in (job.out, Path(job.pipeline)):
            save_component(vae, folder / "vae")
        kind = type(vae).__name__
        index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", kind]}
        write_atomically(Path(job.pipeline) / "model_index.json", json.dumps(index))
    process_group.barrier()
    # Score what is saved.
    saved = load_vae(job.pipeline)
    quality, quality_of_mean = reconstruction_psnr(saved, job.images[spread_rows(len(job.images))])
    params = sum(p.numel() for p in saved.parameters())
    return {"params": params, "psnr": quality, "psnr_mean_picture": quality_of_mean}


def _latents(job: TeacherJob) -> Tensor:
    """Return scaled latents [N, C, h, w] of all images: posterior means, which rank 0 computes and caches."""
    path = job.work / "latents.pt"
    if not path.is_file() and process_group.rank() == 0:
        vae, rows = load_vae(job.pipeline), []
        # The file gets its name when it is complete.
        with torch.no_grad():
            for part in job.images.split(128):
                rows.append(encode(vae, from_uint8(part)))
                job.progress("encode", sum(map(len, rows)), len(job.images))
        torch.save(torch.cat(rows), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    process_group.barrier()
    latents: Tensor = load_tensors(path)
    return latents


def _train_unet(job: TeacherJob, log: RunLog) -> dict[str, Any]:
    config, pipeline = job.config, Path(job.pipeline)
    latents, vae = _latents(job), load_vae(job.pipeline)
    shape = (latents.shape[1], latents.shape[-1])
    # The tokenizer and the schedule must be on disk before training: they are loaded like any teacher's.
    if process_group.rank() == 0:
        tokenizer = starting_tokenizer(config, job.captions, pipeline / "tokenizer")
        text, unet = starting_denoiser(config, tokenizer, *shape)
        save_pipeline(pipeline, unet=unet, vae=vae, conditioner=text, set_alpha_to_one=True)
    process_group.barrier()
    text, unet = starting_denoiser(config, load_tokenizer(job.pipeline), *shape)
    schedule = load_schedule(job.pipeline)
    previews = denoiser_previews(
        job.out / "previews", job.pipeline, job.images, latents, job.captions, log, config.preview_minutes
    )
    train_denoiser(
        text, unet, latents, job.captions, schedule, config.unet, log, config.seed, job.progress, previews
    )
    if process_group.rank() != 0:
        return {}
    # OUT becomes a pipeline now that its weights are trained. Score what is saved.
    for folder in (pipeline, job.out):
        save_pipeline(folder, unet=unet, vae=vae, conditioner=text, set_alpha_to_one=True)
    rows = spread_rows(len(latents))
    with torch.no_grad():
        saved_text = load_conditioner(job.pipeline)
        hidden = saved_text.encode([job.captions[row] for row in rows.tolist()]).tensors["hidden"]
    loss = denoising_loss(load_unet(job.pipeline), hidden, latents[rows], schedule)
    return {"params": sum(p.numel() for p in unet.parameters()), "loss": loss}


def _train_lpips(job: TeacherJob, log: RunLog) -> dict[str, Any]:
    latents = _latents(job)  # on all ranks, which wait for each other
    if process_group.rank() != 0:
        return {}
    vae = load_vae(job.pipeline)

    def encode_uint8(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return encode(vae, from_uint8(rows))

    network = replace(job.config.lpips.network, channels=latents.shape[1])
    settings = replace(job.config.lpips, network=network)
    metric, scores = train_latent_lpips(
        settings, latents, job.captions, job.images, encode_uint8, job.progress
    )
    lpips_weights.save_lpips(metric, job.out / "latent_lpips", {"trained_on": job.config.data, **scores})
    return scores


def _train_clip(job: TeacherJob, log: RunLog) -> dict[str, Any]:
    if process_group.rank() != 0:
        return {}
    settings = replace(job.config.clip, image_size=job.config.size)
    tokenizer = Path(job.pipeline) / "tokenizer"
    return train_clip(job.images, job.captions, tokenizer, job.out / "clip", settings, progress=job.progress)


_TRAIN_STAGE: dict[str, Callable[[TeacherJob, RunLog], dict[str, Any]]] = {
    "vae": _train_vae,
    "unet": _train_unet,
    "lpips": _train_lpips,
    "clip": _train_clip,
}
