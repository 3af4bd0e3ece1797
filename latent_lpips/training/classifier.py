"""`d2g lpips train`: the trunk of a LatentLPIPS, as a classifier of the latents of labeled pictures."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

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
from d2g.core.tracking.run_directory import RunLog, peak_memory_gib
from d2g.diffusion import pretrained
from d2g.diffusion.latents import latent_space
from latent_lpips import augment, weights
from latent_lpips.config import AugmentConfig, LPIPSConfig
from latent_lpips.distance import LatentLPIPS
from latent_lpips.training.config import ClassifyConfig, require_given
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
"""Settings that may change between resumes: they decide no weight."""


@dataclass(frozen=True, kw_only=True)
class ClassifyResult:
    """What `train_classifier` left. `out` loads as a LatentLPIPS with heads of 1; `top1`, `top5`: shares."""

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


def train_classifier(config: ClassifyConfig, out: Path, progress: Progress = quiet) -> ClassifyResult:
    """Train to the end, or on from the newest checkpoint in OUT/run, and write OUT as a LatentLPIPS folder.

    Runs on every rank of torchrun, and gives to rounding the same there. Raises UserError for input that
    does not fit together, FloatingPointError at the first loss that is not finite, Interrupted on Ctrl-C and
    where `minutes` are over before all latents are on disk.
    """
    # Set up.
    begun = time.monotonic()

    def late() -> bool:
        return config.minutes is not None and time.monotonic() - begun > 60 * config.minutes

    device = process_group.init()
    require_given(config, "data", "latents")
    world, rank = process_group.world_size(), process_group.rank()
    if config.batch % world:
        raise SettingError(f"batch {config.batch} does not divide over {world} processes")
    vae, sha256 = pretrained.load_autoencoder(config.latents), pretrained.autoencoder_sha256(config.latents)
    check_image_size(vae, config.size)
    train, val = open_image_sets(config)
    whole = to_json(config)
    length = {name: whole.pop(name) for name in RESUMABLE_SETTINGS}
    facts = {
        "autoencoder": sha256,
        "classes": {"number": len(train.classes), "names": digest(list(train.classes))},
        "pictures": {"train": train.digest(), "val": val.digest()},
    }
    log = RunLog(out / "run", {**whole, **facts, "length": length}, ignore=("length",))
    cache = Path(config.cache) if config.cache else out / "run" / "latents"
    encoders = [CropEncoder(config, vae.to(device), pictures, device) for pictures in (train, val)]
    stream = open_latent_stream(encoders[0], cache, "train", sha256, progress, late)
    scored = open_latent_stream(encoders[1], cache, "val", sha256, progress, late)
    network = LPIPSConfig(channels=latent_space(vae).channels, width=config.width, norm=config.norm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = VGG16(network, len(train.classes), config.dropout, config.grid)
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = build_optimizer(model, config)
    total = -(-config.epochs * len(train) // config.batch) * config.batch

    # Resume.
    folder, nimg = out / "run" / "checkpoints", 0
    values: dict[str, float] = {}
    loss_sum, steps = 0.0, 0  # since the last report
    if (last := checkpoint.latest(folder)) is not None:
        last.load("classifier", model)
        optimizer.load_state_dict(last.state()["optimizer"])
        nimg, loss_sum, steps = last.nimg, last.meta["loss_sum"], last.meta["steps"]
        values = next((line for line in log.read() if line["nimg"] == nimg), {})
        process_group.barrier()  # all have read before lines go
    reporting = nimg > 0 and reports_at(config, len(train), nimg, total)
    log.rewind(nimg if reporting else nimg - 1)  # the line of a run that `minutes` ended is no report
    if reporting and values:
        reporting, loss_sum, steps = False, 0.0, 0

    # Train.
    part = slice(rank * config.batch // world, (rank + 1) * config.batch // world)
    batches = stream(plan_batches(config, len(train), nimg, part))
    started, first, finished = time.monotonic(), nimg, nimg >= total
    with StopFlag() as stop:
        while True:
            if reporting:
                values = process_group.mean({"loss": loss_sum / steps})
                values |= score_classifier(model, scored, val, config.batch, device)
                loss_sum, steps = 0.0, 0
                rate = (nimg - first) / (time.monotonic() - started)
                log.write(nimg, {**values, "time/images_per_sec": rate, "mem/peak_gib": peak_memory_gib()})
            if finished:
                break
            rows = permuted_batch(config.seed, len(train), nimg, config.batch)[part]
            x = shift_latents(next(batches), config, nimg, part)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * learning_rate_factor(config.schedule, nimg / total)
            rng = generator(config.seed, Stream.CLASSIFIER_DROPOUT, nimg)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                logits = classify_in_training(model, x, rng, config.batch, part)
            loss = F.cross_entropy(logits.float(), train.labels[rows].to(device))
            check_classifier_loss(loss, nimg, folder, config.lr)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            process_group.average_gradients(model.parameters())
            optimizer.step()
            loss_sum, steps = loss_sum + loss.item(), steps + 1
            nimg += config.batch
            progress("classifier", min(nimg, total), total)

            flags = process_group.any_of({"stopping": bool(stop), "late": late()})
            finished = nimg >= total or flags["late"]
            reporting = finished or reports_at(config, len(train), nimg, total)
            if reporting or flags["stopping"]:  # before the scoring, which may take longer than a kill waits
                loss_sum = process_group.mean({"loss": loss_sum})["loss"]
                if rank == 0:
                    state = {"optimizer": optimizer.state_dict()}
                    meta = {"loss_sum": loss_sum, "steps": steps, "classes": list(train.classes)}
                    checkpoint.save(folder, nimg, {"classifier": model.state_dict()}, state, meta)
                process_group.barrier()
            if flags["stopping"]:
                raise Interrupted(
                    f"stopped at image {nimg}; safe on disk: {folder / f'{nimg:09d}'}; "
                    "run the same command again to go on"
                )
    seconds = time.monotonic() - started
    counts = {"classes": len(train.classes), "train": len(train), "val": len(val)}
    values = {name: values[name] for name in ("loss", "top1", "top5")}
    if rank == 0:
        meta = {"trained_on": train.name, "autoencoder": config.latents, "autoencoder_sha256": sha256}
        metric = LatentLPIPS(network, model.eval().cpu().to(memory_format=torch.contiguous_format))
        weights.save_lpips(metric, out, {**meta, **counts, **values, "images": nimg, "calibrated": False})
    process_group.barrier()
    return ClassifyResult(
        out=str(out),
        top1=values["top1"],
        top5=values["top5"],
        loss=values["loss"],
        **counts,
        images=nimg,
        seconds=seconds,
        images_per_sec=(nimg - first) / seconds if nimg > first else 0.0,
    )


def reports_at(config: ClassifyConfig, pictures: int, nimg: int, total: int) -> bool:
    """Whether a run is scored after image `nimg`: at its end, and once in `score_epochs`, whatever the points
    where it was broken off."""
    interval = config.score_epochs * pictures
    return nimg >= total or nimg // interval > (nimg - config.batch) // interval


def open_image_sets(config: ClassifyConfig) -> tuple[LabeledImages, LabeledImages]:
    """Pictures to train and to score on. Raises UserError as `open_labeled`, and for too few pictures."""
    train, val = open_labeled(config.data, config.val)
    if val is None:
        kept, held = split_rows(len(train), config.held_out, config.seed)
        train, val = train.rows(sorted(kept.tolist())), train.rows(sorted(held.tolist()))
    if len(train) < config.batch:
        raise UserError(
            f"{config.data}: {len(train)} training pictures, fewer than a batch of {config.batch}; "
            "set batch lower or give more pictures"
        )
    return train, val


def plan_batches(config: ClassifyConfig, pictures: int, nimg: int, part: slice) -> Iterator[list[CropItem]]:
    """This process's items of each batch from image `nimg` on, without end."""
    for start in count(nimg, config.batch):
        rows = permuted_batch(config.seed, pictures, start, config.batch)
        yield [CropItem(row, (start + i) // pictures) for i, row in enumerate(rows)][part]


def shift_latents(x: Tensor, config: ClassifyConfig, nimg: int, part: slice) -> Tensor:
    """Latents moved by whole positions, drawn for the whole batch, whatever this process has of it."""
    if not config.shift:
        return x
    moves = AugmentConfig(families="b", flip=False, quarter_turns=False, integer_shift=config.shift)
    drawn = augment.sample_transforms(
        moves, config.batch, x.shape[2:], generator(config.seed, Stream.LATENT_SHIFT, nimg), x.device
    )
    return augment.apply_transforms(x, augment.select_transforms(drawn, part))


def classify_in_training(model: VGG16, x: Tensor, rng: torch.Generator, batch: int, part: slice) -> Tensor:
    """Class logits in training. Batch statistics and dropout are those of the whole batch of `batch` latents,
    of which x [b, C, h, w] are the rows `part`: one process or eight, the step is the same."""
    assert model.classifier is not None
    model.check(x)
    for module in model.features:
        x = synchronized_batch_norm(module, x) if isinstance(module, nn.BatchNorm2d) else module(x)
    x = model.avgpool(x).flatten(1)
    for module in model.classifier:
        if isinstance(module, nn.Dropout):
            kept = torch.rand(batch, x.shape[1], generator=rng)[part].to(x.device) >= module.p
            x = x * kept / (1 - module.p)
        else:
            x = module(x)
    return x


def synchronized_batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """`norm(x)` in training, with mean and variance over all processes' rows (as many in each)."""
    if process_group.world_size() == 1:
        normed: Tensor = norm(x)
        return normed
    wide = x.float()
    count = len(x) * x.shape[2] * x.shape[3] * process_group.world_size()
    mean = process_group.all_mean(wide.mean((0, 2, 3)))
    centered = wide - mean[:, None, None]
    variance = process_group.all_mean(centered.square().mean((0, 2, 3)))
    with torch.no_grad():
        assert norm.momentum is not None and norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
    gain = norm.weight * (variance + norm.eps).rsqrt()
    return (centered * gain[:, None, None] + norm.bias[:, None, None]).to(x.dtype)


def check_classifier_loss(loss: Tensor, nimg: int, folder: Path, lr: float) -> None:
    """Raise FloatingPointError on every rank, before the step, where any rank's loss is not finite."""
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
    """Shares of `val` whose class is the likeliest, and among the five likeliest. Ranks share the work."""
    rows = list(range(len(val)))[process_group.rank() :: process_group.world_size()]
    plan = [
        [CropItem(row, -1) for row in rows[start : start + batch]] for start in range(0, len(rows), batch)
    ]
    model.eval()
    right = torch.zeros(2, device=device)
    for items, x in zip(plan, stream(plan), strict=True):
        labels = val.labels[[item.row for item in items]].to(device)
        best = model(x).topk(min(5, len(val.classes)), dim=1).indices == labels[:, None]
        right += torch.stack([best[:, 0].sum(), best.sum()])
    model.train()
    sums = process_group.mean({"top1": right[0].item(), "top5": right[1].item(), "rows": float(len(rows))})
    return {name: sums[name] / sums["rows"] for name in ("top1", "top5")}
