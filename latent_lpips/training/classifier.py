"""`d2g lpips train`: train the trunk of a LatentLPIPS to classify the latents of labeled images."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2g.core.config import digest, to_json
from d2g.core.distributed import checkpoint, process_group
from d2g.core.errors import Interrupted, SettingError, UserError
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import Stream, generator
from d2g.core.shuffle import permuted_batch
from d2g.core.signals import StopFlag
from d2g.core.tracking.run_directory import RunLog, peak_memory_gib, sole_owner
from d2g.diffusion import pretrained
from d2g.diffusion.latents import latent_space
from latent_lpips import augment, weights
from latent_lpips.config import AugmentConfig, LPIPSConfig
from latent_lpips.distance import LatentLPIPS
from latent_lpips.training.config import ClassifyConfig, require_set
from latent_lpips.training.labeled_images import LabeledImages, open_labeled
from latent_lpips.training.latent_stream import (
    CropEncoder,
    CropItem,
    LatentStream,
    check_image_size,
    open_latent_stream,
)
from latent_lpips.training.small import build_optimizer, learning_rate_factor, split_rows
from latent_lpips.vgg import VGG16

RESUMABLE_SETTINGS = ("minutes", "workers", "cache", "score_epochs")
"""Settings that may change when a run is resumed, because they do not affect the weights."""


@dataclass(frozen=True, kw_only=True)
class ClassifyResult:
    """Result of `train_classifier`. `out` loads as a LatentLPIPS with heads of weight 1. `top1` and `top5`
    are accuracies on the validation images, in [0, 1].
    """

    out: str
    top1: float
    top5: float
    loss: float
    images: int
    classes: int
    train: int
    val: int
    seconds: float
    images_per_sec: float


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The fixed parts of a run: data, networks and log."""

    config: ClassifyConfig
    device: torch.device
    train: LabeledImages
    val: LabeledImages
    train_latents: LatentStream
    val_latents: LatentStream
    vae_sha256: str
    latent_scale: dict[str, float]
    network: LPIPSConfig
    model: VGG16
    optimizer: torch.optim.Optimizer
    log: RunLog
    checkpoints: Path
    total: int
    """Training images of the whole run, repeats included; a multiple of the batch size."""

    @property
    def rank_rows(self) -> slice:
        """The rows of each batch that this rank computes."""
        world, rank = process_group.world_size(), process_group.rank()
        return slice(rank * self.config.batch // world, (rank + 1) * self.config.batch // world)


@dataclass(kw_only=True)
class _State:
    """What changes during a run."""

    nimg: int = 0
    loss_sum: float = 0.0
    """Sum of the losses since the last report, over `steps` steps."""
    steps: int = 0
    report_due: bool = False
    values: dict[str, float] = field(default_factory=dict)
    """The last report."""


def train_classifier(config: ClassifyConfig, out: Path, progress: Progress = quiet) -> ClassifyResult:
    """Train until the end, resuming from the newest checkpoint in OUT/run, and write OUT as a LatentLPIPS
    folder.

    Runs on every rank of torchrun; the number of ranks changes the result by rounding only. Raises UserError
    for inconsistent input and while another run trains in OUT, FloatingPointError at the first non-finite
    loss, and Interrupted on Ctrl-C or when `minutes` have passed before all latents are cached.
    """
    device = process_group.init()
    with sole_owner(out, "trains in"):
        return _train(config, out, device, progress)


def _train(config: ClassifyConfig, out: Path, device: torch.device, progress: Progress) -> ClassifyResult:
    started = time.monotonic()

    def time_over() -> bool:
        return config.minutes is not None and time.monotonic() - started > 60 * config.minutes

    # Open data and networks, and resume from the newest checkpoint.
    job = _set_up(config, out, device, time_over, progress)
    state = _resume(job)
    batches = job.train_latents(plan_batches(config, len(job.train), state.nimg, job.rank_rows))
    loop_started, first, finished = time.monotonic(), state.nimg, state.nimg >= job.total
    with StopFlag() as stop:
        while True:
            if state.report_due:
                _report(job, state, first, loop_started)
            if finished:
                break
            _step(job, state, next(batches))
            progress("classifier", min(state.nimg, job.total), job.total)
            # Decide together with the other ranks whether to stop, to report and to save.
            flags = process_group.any_of({"stopping": bool(stop), "time_over": time_over()})
            finished = state.nimg >= job.total or flags["time_over"]
            state.report_due = finished or reports_at(config, len(job.train), state.nimg, job.total)
            # Save before scoring, which may take longer than the grace period of a kill.
            if state.report_due or flags["stopping"]:
                _save_checkpoint(job, state)
            if flags["stopping"]:
                raise Interrupted(
                    f"stopped at image {state.nimg}; safe on disk: {job.checkpoints / f'{state.nimg:09d}'}; "
                    "run the same command again to go on"
                )
    seconds = time.monotonic() - loop_started
    counts = {"classes": len(job.train.classes), "train": len(job.train), "val": len(job.val)}
    values = {name: state.values[name] for name in ("loss", "top1", "top5")}
    if process_group.rank() == 0:
        _save_metric(job, out, {**counts, **values, "images": state.nimg})
    process_group.barrier()
    return ClassifyResult(
        out=str(out),
        top1=values["top1"],
        top5=values["top5"],
        loss=values["loss"],
        **counts,
        images=state.nimg,
        seconds=seconds,
        images_per_sec=(state.nimg - first) / seconds if state.nimg > first else 0.0,
    )


def _set_up(
    config: ClassifyConfig,
    out: Path,
    device: torch.device,
    time_over: Callable[[], bool],
    progress: Progress,
) -> _Job:
    require_set(config, "data", "latents")
    if config.batch % process_group.world_size():
        raise SettingError(
            f"batch {config.batch} does not divide over {process_group.world_size()} processes"
        )
    # Open the autoencoder and the images.
    vae, sha256 = pretrained.load_autoencoder(config.latents), pretrained.autoencoder_sha256(config.latents)
    check_image_size(vae, config.size)
    train, val = open_image_sets(config)
    # A run folder belongs to one set of settings and data, apart from the resumable settings.
    settings = to_json(config)
    length = {name: settings.pop(name) for name in RESUMABLE_SETTINGS}
    inputs = {
        "autoencoder": sha256,
        "classes": {"number": len(train.classes), "names": digest(list(train.classes))},
        "pictures": {"train": train.digest(), "val": val.digest()},
    }
    log = RunLog(
        out / "run",
        {**settings, **inputs, "length": length},
        ignore=("length",),
        notes=("data", "val", "latents"),  # which their digests identify
    )
    # Latents are encoded on the fly, or once to a cache.
    cache = Path(config.cache) if config.cache else out / "run" / "latents"
    encoders = [CropEncoder(config, vae.to(device), images, device) for images in (train, val)]
    train_latents = open_latent_stream(encoders[0], cache, "train", sha256, progress, time_over)
    val_latents = open_latent_stream(encoders[1], cache, "val", sha256, progress, time_over)
    # The initial weights are a function of the seed alone.
    network = LPIPSConfig(channels=latent_space(vae).channels, width=config.width, norm=config.norm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = VGG16(network, len(train.classes), config.dropout, config.grid)
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    return _Job(
        config=config,
        device=device,
        train=train,
        val=val,
        train_latents=train_latents,
        val_latents=val_latents,
        vae_sha256=sha256,
        latent_scale=weights.latent_scale(vae),
        network=network,
        model=model,
        optimizer=build_optimizer(model, config),
        log=log,
        checkpoints=out / "run" / "checkpoints",
        total=-(-config.epochs * len(train) // config.batch) * config.batch,
    )


def _resume(job: _Job) -> _State:
    """Load the newest checkpoint, if there is one, and remove log lines that are newer than it."""
    state = _State()
    # Continue from the checkpoint, with the values that its report has logged.
    if (last := checkpoint.latest(job.checkpoints)) is not None:
        last.load("classifier", job.model)
        job.optimizer.load_state_dict(last.state()["optimizer"])
        state.nimg, state.loss_sum, state.steps = last.nimg, last.meta["loss_sum"], last.meta["steps"]
        state.values = next((line for line in job.log.read() if line["nimg"] == state.nimg), {})
        process_group.barrier()  # all ranks have read the log before lines are removed
        # A killed run may have left a checkpoint that it was about to delete.
        if process_group.rank() == 0:
            checkpoint.prune(job.checkpoints)
    # A report at this image is due unless it is in the log. A line that a run wrote because `minutes` were
    # over is removed: an unbroken run does not have it.
    state.report_due = state.nimg > 0 and reports_at(job.config, len(job.train), state.nimg, job.total)
    job.log.rewind(state.nimg if state.report_due else state.nimg - 1)
    if state.report_due and state.values:
        state.report_due, state.loss_sum, state.steps = False, 0.0, 0
    return state


def _step(job: _Job, state: _State, latents: Tensor) -> None:
    """One optimizer step on this rank's latents [b, C, h, w] of the next batch."""
    config, rows = job.config, job.rank_rows
    # Shift the latents and set the learning rate.
    images = permuted_batch(config.seed, len(job.train), state.nimg, config.batch)[rows]
    x = shift_latents(latents, config, state.nimg, rows)
    for group in job.optimizer.param_groups:
        group["lr"] = config.lr * learning_rate_factor(config.schedule, state.nimg / job.total)
    # Forward, with dropout that is a function of the image count.
    rng = generator(config.seed, Stream.CLASSIFIER_DROPOUT, state.nimg)
    with torch.autocast(job.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits = classify_in_training(job.model, x, rng, config.batch, rows)
    loss = F.cross_entropy(logits.float(), job.train.labels[images].to(job.device))
    check_classifier_loss(loss, state.nimg, job.checkpoints, config.lr)
    # Backward and update.
    job.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    process_group.average_gradients(job.model.parameters())
    job.optimizer.step()
    state.loss_sum, state.steps = state.loss_sum + loss.item(), state.steps + 1
    state.nimg += config.batch


def _report(job: _Job, state: _State, first: int, started: float) -> None:
    """Score the model and write a log line. The loop began at image `first` at time `started`."""
    state.values = process_group.mean({"loss": state.loss_sum / state.steps})
    state.values |= score_classifier(job.model, job.val_latents, job.val, job.config.batch, job.device)
    state.loss_sum, state.steps = 0.0, 0
    rate = (state.nimg - first) / (time.monotonic() - started)
    extra = {"time/images_per_sec": rate, "mem/peak_gib": peak_memory_gib()}
    job.log.write(state.nimg, {**state.values, **extra})


def _save_checkpoint(job: _Job, state: _State) -> None:
    state.loss_sum = process_group.mean({"loss": state.loss_sum})["loss"]
    if process_group.rank() == 0:
        meta = {"loss_sum": state.loss_sum, "steps": state.steps, "classes": list(job.train.classes)}
        modules = {"classifier": job.model.state_dict()}
        checkpoint.save(job.checkpoints, state.nimg, modules, {"optimizer": job.optimizer.state_dict()}, meta)
    process_group.barrier()


def _save_metric(job: _Job, out: Path, scores: dict[str, Any]) -> None:
    meta = {
        "trained_on": job.train.name,
        "autoencoder": job.config.latents,
        "autoencoder_sha256": job.vae_sha256,
        **job.latent_scale,
    }
    trunk = job.model.eval().cpu().to(memory_format=torch.contiguous_format)
    weights.save_lpips(LatentLPIPS(job.network, trunk), out, {**meta, **scores, "calibrated": False})


def reports_at(config: ClassifyConfig, num_images: int, nimg: int, total: int) -> bool:
    """Whether a run is scored after image `nimg`: at the end and once per `score_epochs`, wherever it
    resumed.
    """
    interval = config.score_epochs * num_images
    return nimg >= total or nimg // interval > (nimg - config.batch) // interval


def open_image_sets(config: ClassifyConfig) -> tuple[LabeledImages, LabeledImages]:
    """Open training and validation images. Raises UserError like `open_labeled`, and for too few images."""
    train, val = open_labeled(config.data, config.val)
    if val is None:
        train_rows, val_rows = split_rows(len(train), config.held_out, config.seed)
        train, val = train.rows(sorted(train_rows.tolist())), train.rows(sorted(val_rows.tolist()))
    if len(train) < config.batch:
        raise UserError(
            f"{config.data}: {len(train)} training pictures, fewer than a batch of {config.batch}; "
            "set batch lower or give more pictures"
        )
    return train, val


def plan_batches(config: ClassifyConfig, num_images: int, nimg: int, rows: slice) -> Iterator[list[CropItem]]:
    """Yield this rank's `rows` of each batch from image `nimg` on, endlessly. Epoch n uses crop n of an
    image.
    """
    for start in count(nimg, config.batch):
        batch = permuted_batch(config.seed, num_images, start, config.batch)
        yield [CropItem(row, (start + i) // num_images) for i, row in enumerate(batch)][rows]


def shift_latents(x: Tensor, config: ClassifyConfig, nimg: int, rows: slice) -> Tensor:
    """Shift latents, this rank's `rows` of a batch, by whole positions, sampled for the whole batch."""
    if not config.shift:
        return x
    moves = AugmentConfig(families="b", flip=False, quarter_turns=False, integer_shift=config.shift)
    transforms = augment.sample_transforms(
        moves, config.batch, x.shape[2:], generator(config.seed, Stream.LATENT_SHIFT, nimg), x.device
    )
    return augment.apply_transforms(x, augment.select_transforms(transforms, rows))


def classify_in_training(model: VGG16, x: Tensor, rng: torch.Generator, batch: int, rows: slice) -> Tensor:
    """Return class logits in training mode for x [b, C, h, w], this rank's `rows` of a batch of `batch`
    latents.

    Batch statistics and dropout are those of the whole batch, so the number of ranks does not change a step.
    """
    assert model.classifier is not None
    model.check(x)
    # Statistics over all ranks make a step independent of their number.
    for module in model.features:
        x = synchronized_batch_norm(module, x) if isinstance(module, nn.BatchNorm2d) else module(x)
    x = model.avgpool(x).flatten(1)
    for module in model.classifier:
        # Draw the mask for all ranks' rows, and apply this rank's part of it.
        if isinstance(module, nn.Dropout):
            keep = torch.rand(batch, x.shape[1], generator=rng)[rows].to(x.device) >= module.p
            x = x * keep / (1 - module.p)
        else:
            x = module(x)
    return x


def synchronized_batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """`norm(x)` in training mode, with mean and variance over all ranks, which have equally many rows."""
    if process_group.world_size() == 1:
        result: Tensor = norm(x)
        return result
    # Mean and variance over all ranks; gradients flow through both.
    x_fp32 = x.float()
    count = len(x) * x.shape[2] * x.shape[3] * process_group.world_size()
    mean = process_group.all_mean(x_fp32.mean((0, 2, 3)))
    centered = x_fp32 - mean[:, None, None]
    variance = process_group.all_mean(centered.square().mean((0, 2, 3)))
    # Update the running statistics as torch does, with the unbiased variance.
    with torch.no_grad():
        assert norm.momentum is not None and norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
    gain = norm.weight * (variance + norm.eps).rsqrt()
    return (centered * gain[:, None, None] + norm.bias[:, None, None]).to(x.dtype)


def check_classifier_loss(loss: Tensor, nimg: int, folder: Path, lr: float) -> None:
    """Raise FloatingPointError on every rank if any rank's loss is not finite. Call it before the step."""
    if process_group.any_rank(not math.isfinite(loss.item())):
        last = checkpoint.latest(folder)
        raise FloatingPointError(
            f"classifier: loss is {loss.item()} at image {nimg}; "
            + (f"last good checkpoint: {last.folder}; " if last else "no checkpoint was written before; ")
            + f"lower the learning rate ({lr:g}) in another --out"
        )


@torch.no_grad()
def score_classifier(
    model: VGG16, stream: LatentStream, val: LabeledImages, batch: int, device: torch.device
) -> dict[str, float]:
    """Return top-1 and top-5 accuracy on `val`, in [0, 1]. Ranks share the work."""
    # Center crops; each rank takes every n-th image.
    rows = list(range(len(val)))[process_group.rank() :: process_group.world_size()]
    plan = [
        [CropItem(row, -1) for row in rows[start : start + batch]] for start in range(0, len(rows), batch)
    ]
    # Count hits among the first and the first five classes.
    model.eval()
    correct = torch.zeros(2, device=device)
    for items, x in zip(plan, stream(plan), strict=True):
        labels = val.labels[[item.row for item in items]].to(device)
        hits = model(x).topk(min(5, len(val.classes)), dim=1).indices == labels[:, None]
        correct += torch.stack([hits[:, 0].sum(), hits.sum()])
    model.train()
    # Ratios of sums, because ranks may have different numbers of images.
    sums = process_group.mean(
        {"top1": correct[0].item(), "top5": correct[1].item(), "rows": float(len(rows))}
    )
    return {name: sums[name] / sums["rows"] for name in ("top1", "top5")}
