"""Train a LatentLPIPS in memory: the trunk by classification, the heads by two-alternative judgments."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2g.core.distributed.loop_checkpoints import LoopCheckpoints
from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import Stream, fork_rng, generator
from d2g.core.shuffle import permuted_batch
from latent_lpips import augment
from latent_lpips.config import (
    AugmentConfig,
    CalibrateConfig,
    LPIPSConfig,
    LPIPSTrainConfig,
    TrunkTrainConfig,
)
from latent_lpips.distance import LatentLPIPS
from latent_lpips.training.config import ClassifyConfig
from latent_lpips.training.synthetic_triplets import Triplets, caption_targets, synthetic_triplets
from latent_lpips.vgg import VGG16

EVAL_BATCH = 250
"""Rows per forward pass outside training."""


def train_latent_lpips(
    config: LPIPSTrainConfig,
    latents: Tensor,
    captions: Sequence[str],
    images: Tensor,
    encode: Callable[[Tensor], Tensor],
    progress: Progress = quiet,
    device: torch.device | str = "cpu",
    checkpoints: Path | None = None,
) -> tuple[LatentLPIPS, dict[str, float]]:
    """Train the trunk to predict the captions' words, then fit the heads to synthetic judgments.

    `latents` are scaled [N, C, h, w] with N `captions`. `images` are uint8 [M, 3, H, W] of the same kind;
    `encode` maps pixels in [-1, 1] to scaled latents. checkpoints: folder from which the trunk's training
    goes on after Ctrl-C. Returns the metric on `device` and its scores on held-out data. Raises UserError for
    unequal numbers of captions and latents.
    """
    if len(captions) != len(latents):
        raise UserError(f"got {len(captions)} captions for {len(latents)} latents, expected one for each")
    # The trunk.
    targets, _ = caption_targets(captions)
    trunk, scores = train_trunk(
        config.network,
        latents,
        targets,
        config.trunk,
        seed=config.seed,
        progress=progress,
        device=device,
        checkpoints=checkpoints,
    )
    metric = LatentLPIPS(config.network, trunk).to(device).fold()
    # The heads.
    triplets = synthetic_triplets(images[: config.triplets], encode, config.seed, progress)
    _, held_out = split_rows(len(triplets.judge), config.calibrate.held_out, config.seed)
    scores["two_afc_before"] = two_afc_of_metric(metric, *_triplet_rows(triplets, held_out))
    scores["two_afc"] = calibrate_heads(
        metric, triplets, config.calibrate, seed=config.seed, progress=progress
    )
    if config.unrelated is not None:
        rescale_heads(metric, latents, config.unrelated)
    return metric, scores


def split_rows(count: int, held_out: float, seed: int, what: str = "samples") -> tuple[Tensor, Tensor]:
    """Split `count` rows, which are `what`, into disjoint row numbers (train, held out). Raises UserError for
    fewer than 2 rows.
    """
    if count < 2:
        raise UserError(
            f"the number of {what} is {count}; expected at least 2, because some are held out for scoring: "
            "give more data"
        )
    order = torch.randperm(count, generator=generator(seed, Stream.HELD_OUT_SPLIT))
    num_held_out = min(max(1, round(count * held_out)), count - 1)
    return order[num_held_out:], order[:num_held_out]


def train_trunk(
    network: LPIPSConfig,
    latents: Tensor,
    targets: Tensor,
    config: TrunkTrainConfig,
    seed: int = 0,
    progress: Progress = quiet,
    device: torch.device | str = "cpu",
    checkpoints: Path | None = None,
) -> tuple[VGG16, dict[str, float]]:
    """Train a VGG16 to classify latents [N, C, h, w]; returns it with its scores on held-out rows.

    `targets` are classes, int [N] (cross-entropy; score `top1`), or multi-hot attributes, float [N, K]
    (binary cross-entropy; score `accuracy`, balanced and averaged over attributes). checkpoints: folder of
    the training's checkpoints, from which it goes on exactly; None keeps none. Raises UserError for a
    non-finite loss, Interrupted on Ctrl-C where there are checkpoints.
    """
    # Hold out rows for the score; shifts are the only augmentation.
    classes = int(targets.max()) + 1 if targets.dim() == 1 else targets.shape[1]
    train, held_out = split_rows(len(latents), config.held_out, seed)
    shift = AugmentConfig(families="b", flip=config.flip, quarter_turns=False, integer_shift=config.shift)
    with ExitStack() as stack:
        stack.enter_context(_temporary_seed(seed, device))
        model = VGG16(network, classes, config.dropout, config.grid).to(device).train()
        optimizer = build_optimizer(model, config)
        state = stack.enter_context(LoopCheckpoints(checkpoints, "LatentLPIPS trunk", model, optimizer))
        while (fraction := _fraction_done(config, state.nimg, state.seconds)) < 1:
            # Learning rate and a batch.
            for group in optimizer.param_groups:
                group["lr"] = config.lr * learning_rate_factor(config.schedule, fraction)
            rows = train[permuted_batch(seed, len(train), state.nimg, config.batch)]
            x, y = latents[rows].to(device).float(), targets[rows].to(device)
            # Shift the latents at random, and classify them.
            params = augment.sample_transforms(
                shift, len(x), x.shape[2:], generator(seed, Stream.LATENT_SHIFT, state.nimg), device
            )
            loss = _classification_loss(model(augment.apply_transforms(x, params)), y)
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"LatentLPIPS trunk: loss is {loss.item()} after {state.nimg} latents, expected a finite "
                    f"one; lower the learning rate ({config.lr:g}) or look for non-finite latents"
                )
            # Update, and save now and then.
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            state.nimg += config.batch
            progress("LatentLPIPS trunk", min(state.nimg, config.images), config.images)
            state.step_done()
    return model.eval(), _trunk_scores(model, latents[held_out], targets[held_out], device)


def learning_rate_factor(schedule: str, fraction: float) -> float:
    """Return the learning rate divided by its maximum, at `fraction` in [0, 1) of the training."""
    if schedule == "step":
        return float(0.1 ** math.floor(3 * fraction))
    if fraction < 0.1:
        return (fraction + 0.01) / 0.11
    return 0.5 * (1 + math.cos(math.pi * (fraction - 0.1) / 0.9))


def _fraction_done(config: TrunkTrainConfig, nimg: int, seconds: float) -> float:
    by_time = seconds / (60 * config.minutes) if config.minutes is not None else 0.0
    return max(nimg / config.images, by_time)


@contextmanager
def _temporary_seed(seed: int, device: torch.device | str) -> Iterator[None]:
    """Seed initial weights and dropout with `seed`; restore the caller's random state afterwards."""
    with fork_rng(device):
        torch.manual_seed(seed)
        yield


def build_optimizer(model: nn.Module, config: TrunkTrainConfig | ClassifyConfig) -> torch.optim.Optimizer:
    """Build SGD as in the ImageNet recipe, or AdamW."""
    if config.optimizer == "sgd":
        build: Any = partial(torch.optim.SGD, momentum=config.momentum)
    else:
        build = partial(torch.optim.AdamW, betas=(config.momentum, 0.999))
    optimizer: torch.optim.Optimizer = build(model.parameters(), config.lr, weight_decay=config.weight_decay)
    return optimizer


def _classification_loss(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.dim() == 1:
        return F.cross_entropy(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets)


@torch.no_grad()
def _trunk_scores(
    model: VGG16, latents: Tensor, targets: Tensor, device: torch.device | str
) -> dict[str, float]:
    logits = torch.cat([model(x.to(device).float()).cpu() for x in torch.split(latents, EVAL_BATCH)])
    if targets.dim() == 1:
        return {"top1": (logits.argmax(1) == targets).double().mean().item()}
    predicted, actual = logits > 0, targets > 0.5
    # Skip attributes that all or none of the held-out rows have: balanced accuracy is undefined for them.
    scored = actual.any(0) & (~actual).any(0)
    sensitivity = (predicted & actual).sum(0).double() / actual.sum(0).clamp(min=1)
    specificity = (~predicted & ~actual).sum(0).double() / (~actual).sum(0).clamp(min=1)
    return {"accuracy": ((sensitivity + specificity) / 2)[scored].mean().item() if scored.any() else math.nan}


class RankingNet(nn.Module):
    """LPIPS' network G (Zhang et al. 2018): logits [B] that p1 is closer, from distances d0 and d1 [B]."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, 1),
        )

    def forward(self, d0: Tensor, d1: Tensor) -> Tensor:
        features = torch.stack([d0, d1, d0 - d1, d0 / (d1 + 0.1), d1 / (d0 + 0.1)], dim=1)
        logits: Tensor = self.layers(features)[:, 0]
        return logits


def calibrate_heads(
    metric: LatentLPIPS,
    triplets: Triplets,
    config: CalibrateConfig,
    seed: int = 0,
    progress: Progress = quiet,
) -> float:
    """Fit the heads to judgments, in place (Zhang et al. 2018, `lin`). Returns 2AFC on held-out judgments.

    The trunk is frozen, so the channel averages are computed once and each step is a dot product. Dropout
    therefore drops whole channels, the same ones in both distances. Heads are clamped at 0 after each step.
    """
    # Features of all judgments, once.
    train, held_out = split_rows(len(triplets.judge), config.held_out, seed)
    means0 = _channel_means(metric, triplets.ref, triplets.p0, progress)
    means1 = _channel_means(metric, triplets.ref, triplets.p1, progress)
    judge = triplets.judge.to(means0.device).float()
    fit_heads(metric, means0, means1, judge, train, config, seed, progress)
    # Score on the judgments that were held out.
    held_out = held_out.to(means0.device)
    weights = torch.cat(list(metric.heads))
    return two_afc_agreement(means0[held_out] @ weights, means1[held_out] @ weights, judge[held_out])


def fit_heads(
    metric: LatentLPIPS,
    means0: Tensor,
    means1: Tensor,
    judge: Tensor,
    train: Tensor,
    config: CalibrateConfig,
    seed: int = 0,
    progress: Progress = quiet,
) -> None:
    """Fit the heads in place, starting from their present weights.

    `means0` and `means1` [N, sum of channels] are channel averages between ref and p0, ref and p1; `judge`
    [N] is the share that prefers p1; all are on one device. Only the rows `train` are used. Raises UserError
    for a non-finite loss or head.
    """
    device = means0.device
    with _temporary_seed(seed, device):
        weights = nn.Parameter(torch.cat([w.detach().clone() for w in metric.heads]))
        ranking = RankingNet().to(device)
        optimizer = torch.optim.Adam([weights, *ranking.parameters()], lr=config.lr, betas=(0.5, 0.999))
        steps = config.epochs * math.ceil(len(train) / config.batch)
        for step in range(steps):
            # LPIPS' schedule: constant, then linear to 0 in the second half.
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, 2 * (1 - step / steps))
            rows = train[permuted_batch(seed, len(train), step * config.batch, config.batch)].to(device)
            # Dropout on weights drops the same channels in both distances.
            dropped = F.dropout(torch.ones_like(weights), config.dropout) * weights
            logits = ranking(means0[rows] @ dropped, means1[rows] @ dropped)
            loss = F.binary_cross_entropy_with_logits(logits, judge[rows])
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"LatentLPIPS heads: loss is {loss.item()} at step {step}, expected a finite one; "
                    f"lower the learning rate ({config.lr:g})"
                )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            with torch.no_grad():
                weights.clamp_(min=0)
            progress("LatentLPIPS heads", step + 1, steps)
    if not torch.isfinite(weights).all():
        raise UserError(
            f"LatentLPIPS heads are not finite after the last step; lower the learning rate ({config.lr:g})"
        )
    # Copy the fitted weights into the heads.
    with torch.no_grad():
        for head, fitted in zip(metric.heads, torch.split(weights, list(metric.config.widths)), strict=True):
            head.copy_(fitted)


@torch.no_grad()
def _channel_means(metric: LatentLPIPS, a: Tensor, b: Tensor, progress: Progress) -> Tensor:
    """Return [N, sum of channels] on the metric's device."""
    device, rows = metric.heads[0].device, []
    for start in range(0, len(a), EVAL_BATCH):
        x, y = (t[start : start + EVAL_BATCH].to(device) for t in (a, b))
        rows.append(torch.cat(metric.channel_means(x, y), 1))
        progress("LatentLPIPS features", min(start + EVAL_BATCH, len(a)), len(a))
    return torch.cat(rows)


@torch.no_grad()
def two_afc_of_metric(metric: LatentLPIPS, ref: Tensor, p0: Tensor, p1: Tensor, judge: Tensor) -> float:
    """Return the metric's 2AFC score against `judge` [N], the share of people who prefer p1."""
    device = metric.heads[0].device
    d0, d1 = (
        torch.cat(
            [
                metric(x.to(device), r.to(device))
                for x, r in zip(torch.split(p, EVAL_BATCH), torch.split(ref, EVAL_BATCH), strict=True)
            ]
        )
        for p in (p0, p1)
    )
    return two_afc_agreement(d0, d1, judge.to(device))


def two_afc_agreement(d0: Tensor, d1: Tensor, judge: Tensor) -> float:
    """Return the 2AFC score of distances [N] (Zhang et al. 2018); a tie counts one half."""
    judge = judge.double()
    score = (d0 < d1) * (1 - judge) + (d1 < d0) * judge + (d0 == d1) * 0.5
    return score.mean().item()


@torch.no_grad()
def rescale_heads(metric: LatentLPIPS, latents: Tensor, distance: float, count: int = 512) -> None:
    """Scale the heads in place so that neighbors in `latents`, assumed unrelated, have mean distance
    `distance`.

    Uses the first `count` latents [N, C, h, w]. Raises UserError if their mean distance is 0.
    """
    device = metric.heads[0].device
    x = latents[:count].to(device)
    pairs = zip(torch.split(x, EVAL_BATCH), torch.split(x.roll(1, 0), EVAL_BATCH), strict=True)
    mean = torch.cat([metric(a, b) for a, b in pairs]).mean()
    if not mean > 0:
        raise UserError(
            f"the LatentLPIPS distance of unrelated latents is {mean.item():g}, expected more than 0; "
            "train the trunk for longer or give more varied latents"
        )
    for head in metric.heads:
        head.mul_(distance / mean)


def _triplet_rows(triplets: Triplets, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return triplets.ref[rows], triplets.p0[rows], triplets.p1[rows], triplets.judge[rows]
