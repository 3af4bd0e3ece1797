"""Trains a teacher on images with captions or classes: autoencoder, network, LatentLPIPS, CLIP."""

import json
import pickle
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.config import pick, to_json
from d2g.core.distributed import checkpoint, process_group
from d2g.core.errors import UserError, first_line
from d2g.core.json_files import read_json_object
from d2g.core.machine_errors import raise_machine_error
from d2g.core.precision import set_training_arithmetic
from d2g.core.progress import Progress, quiet
from d2g.core.shuffle import permuted_batch
from d2g.core.torch_files import load_tensors
from d2g.core.tracking.run_directory import RunLog, same_places, sole_owner
from d2g.diffusion.latents import PixelSpace, encode, from_uint8
from d2g.diffusion.pipelines import TRAINING
from d2g.diffusion.pretrained import load_on_meta, load_vae, save_component
from d2g.diffusion.teacher import load_teacher
from latent_lpips import weights as lpips_weights
from latent_lpips.training.small import train_latent_lpips
from latent_lpips.training.synthetic_triplets import caption_targets
from teacher_training.autoencoder import train_autoencoder
from teacher_training.autoencoder_losses import mean_feature_distance, open_perceptual
from teacher_training.clip import train_clip
from teacher_training.config import TeacherConfig
from teacher_training.data import (
    TrainingPictures,
    cached_pictures,
    is_registered,
    load_pictures,
    warn_of_changed_pictures,
)
from teacher_training.loop import fit_modules
from teacher_training.networks.kind import NetworkKind
from teacher_training.networks.precision import loss_in_precision, trains_in_bf16
from teacher_training.networks.registry import network_of
from teacher_training.previews import (
    as_latents,
    autoencoder_previews,
    network_previews,
    reconstructions,
)
from teacher_training.report import write_teacher_report
from teacher_training.start import check_start, starting_autoencoder
from teacher_training.times import PartTimes
from teacher_training.verdict import denoising_loss, judge_teacher, reconstruction_psnr, spread_rows


@dataclass(frozen=True, kw_only=True)
class TeacherSummary:
    """Result of `train_teacher`: parameters of the network, number of training images, and scores per stage.

    `trained` and `verdict` are None until the network is finished; `report` is its page.
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
    """Objects that the stages of one training share. `device`: where this process trains."""

    config: TeacherConfig
    out: Path
    pictures: TrainingPictures
    device: torch.device
    progress: Progress

    @property
    def kind(self) -> NetworkKind:
        """The network that is trained."""
        return network_of(self.config)

    @property
    def images(self) -> Tensor:
        """uint8 images [N, 3, S, S]."""
        return self.pictures.images

    @property
    def captions(self) -> list[str]:
        """The N prompts: captions, class numbers, or empty texts."""
        return self.pictures.prompts

    @property
    def work(self) -> Path:
        """Caches, checkpoints, curves and scores."""
        return self.out / TRAINING

    @property
    def pipeline(self) -> str:
        """The components so far as a pipeline; OUT itself becomes one when the network is finished."""
        return str(self.work / "pipeline")


def train_teacher(
    config: TeacherConfig,
    out: Path,
    stages: tuple[str, ...] | None = None,
    progress: Progress = quiet,
    command: str = "",
) -> TeacherSummary:
    """Train the stages that are not done yet, one after the other, on this process's GPU or on the CPU; by
    default all of the network.

    OUT becomes a pipeline in diffusers layout, for some networks with latent_lpips/ and clip/ beside its
    components, with previews/, report.html, and training/ with caches, configs, curves and checkpoints. A
    stage is complete on disk before the next one starts. `command`: what to run again to finish it. Runs on
    every rank of torchrun. Raises SettingError for an unknown stage, UserError for a finished stage that is
    given other settings, and while another process trains in OUT.
    """
    started = time.monotonic()
    device = process_group.init(long_waits=True)  # for rank 0, which alone trains LatentLPIPS and CLIP
    set_training_arithmetic(device, trains_in_bf16(config, device))
    stages = check_stages(config, stages)
    check_start(config)
    with sole_owner(out, "trains in"):
        return _train_stages(_open_job(config, out, device, progress, command), stages, started)


def check_stages(config: TeacherConfig, stages: Sequence[str] | None) -> tuple[str, ...]:
    """These stages, or all of the network. Raises SettingError for one that the network does not have."""
    known = network_of(config).stages
    for stage in stages or ():
        pick(dict.fromkeys(known), stage, "stage")
    return tuple(stages) if stages is not None else known


def _train_stages(job: TeacherJob, stages: tuple[str, ...], started: float) -> TeacherSummary:
    """`train_teacher`, once OUT belongs to this run."""
    config, out = job.config, job.out
    check_captions(config, job.captions, stages)
    # Train what has no scores yet.
    scores: dict[str, Any] = {}
    trained_any = False
    for stage in [s for s in job.kind.stages[1:] if s in stages]:
        scores_file = job.work / stage / "scores.json"
        finished = is_finished(scores_file.parent, stage, config)
        settings = _stage_settings(config, stage)
        defaults = _OLDER_DEFAULTS.get("network" if stage == job.kind.stage else stage, {})
        log = RunLog(job.work / stage, settings, notes=("images",), defaults=defaults)
        if not finished:
            trained_any = True
            _run_stage(stage, job, log, scores_file)
        scores[stage] = read_scores(scores_file)

    # Judge the scores, and count the parameters of the saved network.
    verdict = _judge(job, scores, trained_any)
    component, params = job.kind.component, 0
    if (out / component).is_dir():
        params = sum(p.numel() for p in load_on_meta(str(out), component).parameters())
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


def _open_job(
    config: TeacherConfig, out: Path, device: torch.device, progress: Progress, command: str
) -> TeacherJob:
    """Open OUT, which belongs to one data set, and load its images."""
    names = (
        "data",
        "column",
        "size",
        "images",
        "seed",
        "caption_template",
        "pretrained_vae",
        "init",
        "network",
    )
    facts = {key: to_json(config)[key] for key in names}
    facts["classes"] = config.denoiser.classes  # the pictures are read with them or without
    notes = same_places(out / TRAINING, facts, ("data", "pretrained_vae", "init"))
    defaults = {"network": "unet_text", "classes": facts["classes"]}
    RunLog(out / TRAINING, facts, notes=notes, defaults=defaults)
    if command and process_group.rank() == 0:
        write_atomically(out / TRAINING / "command.txt", command + "\n")
    started_before = (out / TRAINING / "captions.json").is_file()
    pictures = cached_pictures(out / TRAINING, lambda: load_pictures(config, progress))
    if started_before:
        warn_of_changed_pictures(config, pictures.prompts, out / TRAINING)
    return TeacherJob(config=config, out=out, pictures=pictures, device=device, progress=progress)


def check_captions(config: TeacherConfig, captions: Sequence[str], stages: Sequence[str]) -> None:
    """Raise UserError for pictures with such captions if LatentLPIPS or CLIP, among the stages, cannot learn
    from them."""
    if not {"lpips", "clip"} & set(stages):
        return
    reason = ""
    if len(captions) < FEWEST_PICTURES:
        reason = f"it holds {len(captions)} picture(s), expected {FEWEST_PICTURES} or more"
    elif "lpips" in stages:
        try:
            caption_targets(captions)
        except UserError as error:
            reason = str(error)
    if reason:
        raise UserError(
            f"{config.data}: LatentLPIPS and CLIP learn from pictures and their captions: {reason}; or "
            f"train with --stages data,vae,{network_of(config).stage}, and distill with "
            "--set regression.losses=pseudo_huber"
        )


FEWEST_PICTURES = 3
"""Pictures that CLIP needs: two to compare, and one held out."""


def _stage_sizes(config: TeacherConfig, stage: str) -> tuple[int, int]:
    """Training images of a stage, repeats included, and how many of them are in a step."""
    trunk, denoiser = config.lpips.trunk, config.denoiser.fit
    return {
        "vae": (config.vae.fit.images, config.vae.fit.batch_size),
        network_of(config).stage: (denoiser.images, denoiser.batch_size),
        "lpips": (trunk.images, trunk.batch),
        "clip": (config.clip.images, config.clip.batch_size),
    }[stage]


def stage_length(config: TeacherConfig, stage: str) -> int:
    """Training images of a stage, repeats included."""
    return _stage_sizes(config, stage)[0]


def stage_batch(config: TeacherConfig, stage: str) -> int:
    """Training images per step of a stage."""
    return _stage_sizes(config, stage)[1]


def _stage_settings(config: TeacherConfig, stage: str) -> dict[str, Any]:
    """The settings of a stage, with the length apart: a resumed training may have another one."""
    settings = to_json(getattr(config, stage))
    group = {"lpips": "trunk", "clip": None}.get(stage, "fit")
    del (settings[group] if group else settings)["images"]
    if stage == network_of(config).stage:
        settings["precision"] = config.precision
    return {**settings, "images": stage_length(config, stage)}


def read_scores(file: Path) -> dict[str, Any]:
    """The scores of a finished stage."""
    return read_json_object(file, f"delete {file.parent} and run again")


def images_done(folder: Path) -> int:
    """Training images of a stage, OUT/training/STAGE, so far: at its end, or at its last checkpoint."""
    if (folder / "scores.json").is_file():
        return int(read_scores(folder / "scores.json").get("length", 0))
    points = checkpoint.complete_points(folder / "checkpoints")
    return points[-1] if points else 0


def is_finished(folder: Path, stage: str, config: TeacherConfig) -> bool:
    """Whether a stage, OUT/training/STAGE, is trained to the length of the config. A longer training of the
    network goes on from its end.

    Raises UserError for another length of any other stage, on whose results later stages depend, and for a
    checkpoint of more images than the config asks for.
    """
    done, length = images_done(folder), stage_length(config, stage)
    if not (folder / "scores.json").is_file():
        # The last step may go beyond the length.
        if done >= length + stage_batch(config, stage):
            raise UserError(
                f"stage {stage} in {folder} has trained on {done:,} images, the settings ask for {length:,}; "
                f"give {done:,} or more, or another --out"
            )
        return False
    if done == length or (stage == "vae" and (config.pretrained_vae or config.init)):
        return True
    if stage == network_of(config).stage and length > done:
        return False
    raise UserError(
        f"stage {stage} in {folder} is finished with {done:,} images, the settings ask for "
        f"{length:,}; give {done:,}, or another --out"
    )


def _run_stage(stage: str, job: TeacherJob, log: RunLog, scores_file: Path) -> None:
    """Train one stage on all ranks, and write its scores, which mark it as finished.

    Their `seconds` are those of all starts, also of interrupted ones.
    """
    times = PartTimes(job.work / "times.json")
    with times.measure(stage):
        result = _HELPERS.get(stage, _train_network)(job, log)
    if process_group.rank() == 0:
        facts = {"length": stage_length(job.config, stage), "seconds": times.seconds[stage]}
        write_atomically(scores_file, json.dumps({**result, **facts}))
        # These stages are never trained further.
        checkpoints = scores_file.parent / "checkpoints"
        if stage in ("lpips", "clip") and checkpoints.is_dir():
            shutil.rmtree(checkpoints)
    process_group.barrier()


def _judge(job: TeacherJob, scores: Mapping[str, Any], trained_any: bool) -> dict[str, Any]:
    """The verdict on a finished teacher, with its report; empty while it is not finished."""
    verdict: dict[str, Any] = {}
    report, file = job.out / "report.html", job.work / "verdict.json"
    if process_group.rank() == 0 and (job.work / job.kind.stage / "scores.json").is_file():
        if trained_any or not (file.is_file() and report.is_file()):
            verdict = judge_teacher(job.out, job.images, job.captions, job.device)
            write_teacher_report(job.out, verdict, job.images, job.captions, scores, job.device)
        verdict = read_json_object(file, f"delete {file}") | {"report": str(report)}
    process_group.barrier()
    return verdict


def _train_vae(job: TeacherJob, log: RunLog) -> dict[str, Any]:
    config, vae = job.config, starting_autoencoder(job.config)
    # The perceptual distance, if the autoencoder is trained with it.
    perceptual = open_perceptual(config.vae, job.device) if vae is None else None
    previews = autoencoder_previews(job.out / "previews", job.images, log, config.preview_minutes, perceptual)
    if vae is None:
        vae = train_autoencoder(
            job.images, config.vae, log, config.seed, job.progress, previews, perceptual, job.device
        )
    elif process_group.rank() == 0:
        previews.draw({"vae": vae}, 0)
    # The autoencoder on its own, and as the first component of the pipeline.
    if process_group.rank() == 0:
        for folder in (job.out, Path(job.pipeline)):
            save_component(vae, folder / "vae")
        kind = type(vae).__name__
        (job.work / "latents.pt").unlink(missing_ok=True)  # of an earlier autoencoder
        index = {"_class_name": job.kind.pipeline, "vae": ["diffusers", kind]}
        write_atomically(Path(job.pipeline) / "model_index.json", json.dumps(index))
    process_group.barrier()
    # Score what is saved.
    saved, measured = load_vae(job.pipeline).to(job.device), job.images[spread_rows(len(job.images))]
    quality, quality_of_mean = reconstruction_psnr(saved, measured)
    params = sum(p.numel() for p in saved.parameters())
    scores = {"params": params, "psnr": quality, "psnr_mean_picture": quality_of_mean}
    if perceptual is not None:
        scores["perceptual"] = mean_feature_distance(perceptual, measured, reconstructions(saved, measured))
    return scores


def _latents(job: TeacherJob) -> Tensor:
    """Return scaled latents [N, C, h, w] of all images: posterior means, which rank 0 computes and caches."""
    path = job.work / "latents.pt"
    if not path.is_file() and process_group.rank() == 0:
        vae, rows = load_vae(job.pipeline).to(job.device), []
        # The file gets its name when it is complete.
        with torch.no_grad():
            for part in job.images.split(128):
                rows.append(encode(vae, from_uint8(part)).cpu())
                job.progress("encode", sum(map(len, rows)), len(job.images))
        torch.save(torch.cat(rows), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    process_group.barrier()
    try:
        latents: Tensor = load_tensors(path)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise_machine_error(error)
        raise UserError(f"{path} is damaged ({first_line(error)}); delete it and run again") from error
    return latents


def _train_network(job: TeacherJob, log: RunLog) -> dict[str, Any]:
    config, kind, pipeline = job.config, job.kind, Path(job.pipeline)
    in_pixels = config.denoiser.in_pixels
    inputs = job.images if in_pixels else _latents(job)
    vae = PixelSpace(3) if in_pixels else load_vae(job.pipeline)
    shape = (inputs.shape[1], inputs.shape[-1])
    # Tokenizer and schedule must be on disk before training: they are loaded like any teacher's.
    if process_group.rank() == 0:
        kind.build(config, job.pictures, shape, pipeline, True).save(pipeline, vae)
    process_group.barrier()
    network = kind.build(config, job.pictures, shape, pipeline, False)
    network.to(job.device)
    previews = network_previews(
        job.out / "previews", job.pipeline, network, inputs, job.pictures, log, config.preview_minutes
    )
    loss_of, fit = loss_in_precision(network, inputs, job.captions, config), config.denoiser.fit
    fit_modules(
        kind.stage, log, network.modules, loss_of, len(inputs), fit, config.seed, job.progress, previews
    )
    if process_group.rank() != 0:
        return {}
    network.to("cpu")
    # OUT becomes a pipeline now that its weights are trained. Score what is saved.
    for folder in (pipeline, job.out):
        network.save(folder, vae)
    teacher, rows = load_teacher(job.pipeline, job.device), spread_rows(len(inputs))
    with torch.no_grad():
        cond = teacher.encode([job.captions[row] for row in rows.tolist()])
    loss = denoising_loss(teacher, cond, as_latents(inputs[rows]))
    return {"params": sum(p.numel() for p in teacher.network.parameters()), "loss": loss}


def _train_lpips(job: TeacherJob, log: RunLog) -> dict[str, Any]:
    latents = _latents(job)  # on all ranks, which wait for each other
    if process_group.rank() != 0:
        return {}
    # Folders lie sorted, often by class. LatentLPIPS is calibrated on the first pictures, and scaled until
    # neighbors are far apart, so it gets them in random order, in which a registered source has them already.
    settings, count = job.config.lpips, len(latents)
    if is_registered(job.config.data):
        order = list(range(count))
    else:
        order = permuted_batch(settings.seed, count, 0, count)
    vae = load_vae(job.pipeline).to(job.device)

    def encode_uint8(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return encode(vae, from_uint8(rows))

    metric, scores = train_latent_lpips(
        replace(settings, network=replace(settings.network, channels=latents.shape[1])),
        latents[order],
        [job.captions[row] for row in order],
        job.images[order[: settings.triplets]],
        encode_uint8,
        job.progress,
        job.device,
        log.folder / "checkpoints",
    )
    lpips_weights.save_lpips(metric, job.out / "latent_lpips", {"trained_on": job.config.data, **scores})
    return scores


def _train_clip(job: TeacherJob, log: RunLog) -> dict[str, Any]:
    if process_group.rank() != 0:
        return {}
    settings = replace(job.config.clip, image_size=job.config.size)
    tokenizer = Path(job.pipeline) / "tokenizer"
    return train_clip(
        job.images,
        job.captions,
        tokenizer,
        job.out / "clip",
        settings,
        progress=job.progress,
        device=job.device,
        checkpoints=log.folder / "checkpoints",
    )


_HELPERS: dict[str, Callable[[TeacherJob, RunLog], dict[str, Any]]] = {
    "vae": _train_vae,
    "lpips": _train_lpips,
    "clip": _train_clip,
}
"""What trains the stages other than that of the network."""

_OLDER_DEFAULTS: dict[str, dict[str, Any]] = {
    "network": {"precision": "fp32"},
    "vae": {
        "perceptual_weight": 0.0,
        "adversarial_weight": 0.0,
        "adversarial_start": 0.5,
        "adversarial_lr": 5e-4,
    },
}
"""Settings that the config.json of older versions lacks, by stage, and what they did."""
