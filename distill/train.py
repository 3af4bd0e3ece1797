"""The training loop of both stages, and what it is set up with."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from core import checkpoint, dist, pretrained
from core.config import to_json
from core.errors import Interrupted, SettingError, UserError
from core.progress import Progress, quiet
from core.runlog import RunLog, peak_memory_gib
from core.seeds import generator, seed_step
from core.stop import StopFlag
from distill.config import DistillConfig, OptimConfig
from distill.data import open_pairs, pair_batches
from distill.discriminator import Discriminator, discriminator_from_teacher
from distill.ema import EMA
from distill.generator import Student, student_from_teacher
from distill.losses import discriminator_loss, generator_loss, mismatch, mix_and_match
from distill.r1 import r1_penalty
from distill.sample import load_student_weights
from latent_lpips.config import AugmentConfig, Precision
from latent_lpips.metric import ELatentLPIPS, LatentLPIPS
from latent_lpips.weights import load_lpips


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What `train` left in the run folder. `loss`: the last report's terms; `checkpoint`: the newest
    folder.
    """

    out: str
    images: int
    steps: int
    seconds: float
    images_per_sec: float
    loss: dict[str, float]
    checkpoint: str


class Regression(nn.Module):
    """The regression loss: E-LatentLPIPS, and as set beside it plain LatentLPIPS and L1, on scaled
    latents.
    """

    def __init__(self, config: DistillConfig, channels: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config.regression
        folder = config.lpips or str(pretrained.resolve(config.teacher) / "latent_lpips")
        precision: Precision = "auto" if config.train.precision == "bf16" else "fp32"
        self.plain: LatentLPIPS = load_lpips(folder, channels, precision=precision, device=device)
        augment = AugmentConfig(families=self.config.augment)
        self.augmented = ELatentLPIPS(self.plain, augment, draws=self.config.draws)

    def forward(self, pred: Tensor, target: Tensor, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """pred, target [B, C, h, w] -> (weighted sum, its unweighted parts), means over the batch."""
        parts = {"loss/e_latent_lpips": self.augmented(pred, target, generator=rng).mean()}
        total = self.config.weight * parts["loss/e_latent_lpips"]
        if self.config.latent_lpips:
            parts["loss/latent_lpips"] = self.plain(pred, target).mean()
            total = total + self.config.latent_lpips * parts["loss/latent_lpips"]
        if self.config.l1:
            parts["loss/l1"] = (pred - target).abs().mean()
            total = total + self.config.l1 * parts["loss/l1"]
        return total, parts


def optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with the attention weight-decay rule (method.md 5): 1e-5 inside attention modules, 1e-2
    elsewhere.
    """
    inside = pretrained.attention_parameters(module)
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if n in inside], "weight_decay": config.attention_weight_decay},
        {"params": [p for n, p in named if n not in inside], "weight_decay": config.weight_decay},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)


def learning_rate(nimg: int, config: OptimConfig, batch_size: int) -> float:
    """Linear warm-up, then constant or a cosine to zero, as functions of images."""
    warmup = min(1.0, (nimg + batch_size) / config.warmup_images) if config.warmup_images else 1.0
    if not config.decay_images:
        return config.lr * warmup
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, nimg / config.decay_images)))


def step(
    optim: torch.optim.Optimizer,
    module: nn.Module,
    config: OptimConfig,
    lr: float,
    check: Callable[[Tensor], None],
) -> float:
    """Average gradients over ranks, clip, update, clear. Returns the gradient norm before clipping.

    `check` sees that norm before the update, and may raise: a finite loss can have a gradient that is not.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    dist.average_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
    check(norm)
    for group in optim.param_groups:
        group["lr"] = lr
    optim.step()
    optim.zero_grad(set_to_none=True)
    return float(norm)


def check_finite(losses: Mapping[str, Tensor], nimg: int, folder: Path) -> None:
    """Raise FloatingPointError for a value that is not finite, on every rank, before the optimizer step."""
    bad = [name for name, value in losses.items() if not torch.isfinite(value)]
    if dist.any_rank(bool(bad)):
        last = checkpoint.latest(folder)
        where = f"last good checkpoint: {last.folder}" if last else "no checkpoint was written before"
        what = f"{bad[0]} is {losses[bad[0]].item()}" if bad else "a loss on another rank is not finite"
        raise FloatingPointError(
            f"{what} at image {nimg}; {where}; lower the learning rate in another --out"
            + (f", from there with --set init={folder.parent}" if last else "")
        )


def train(config: DistillConfig, out: Path, progress: Progress = quiet) -> TrainSummary:
    """Run one stage to its end, or on from the newest checkpoint in `out`. Runs on every rank of torchrun.

    Raises UserError for input that does not fit together, FloatingPointError at the first loss that is not
    finite, Interrupted on Ctrl-C; each leaves a whole checkpoint behind if there was one.
    """
    # Set up.
    device = dist.init()
    for name in ("pairs", "teacher", *(["init"] if config.stage == "gan" else [])):
        if not getattr(config, name):
            raise SettingError(f"{name} is not set; give --{name}")
    options, batch_size = config.train, config.train.batch_size
    if batch_size % dist.world_size():
        raise SettingError(
            f"train.batch_size {batch_size} does not divide over {dist.world_size()} processes"
        )
    reader = open_pairs(config.pairs, pretrained.weights_sha256(config.teacher), config.data)
    text_encoder = pretrained.load_text_encoder(config.teacher).to(device)
    student: Student = student_from_teacher(config.teacher, config.student_timestep).to(device)
    if config.init:
        load_student_weights(student, config.init)
    student.requires_grad_(True)
    regression = Regression(config, reader.spec.latent_shape[0], device)
    optim_g = optimizer(student, config.optim)
    ema = EMA(student, options.ema_beta, options.ema_start_images)
    discriminator: Discriminator | None = None
    if config.stage == "gan":
        rng = generator(config.seed, 0xD15C)
        discriminator = discriminator_from_teacher(config.teacher, config.gan, rng).to(device)
        optim_d = optimizer(discriminator, config.gan.optim)

    # Resume.
    whole = to_json(config)
    mutable = {
        "images",
        "minutes",
        "loader_workers",
        "report_images",
        "checkpoint_images",
        "keep_checkpoints",
    }
    whole["train"], whole["length"] = (
        {k: v for k, v in whole["train"].items() if k not in mutable},
        {k: v for k, v in whole["train"].items() if k in mutable},
    )
    # A run may go on past damage that it met, or with another cache; the order of its rows stays.
    whole["length"] |= {k: whole["data"].pop(k) for k in ("skip_bad", "cache", "cache_gib")}
    log = RunLog(out, whole, ignore=("length",))
    folder, nimg, steps = out / "checkpoints", 0, 0
    if (last := checkpoint.latest(folder)) is not None:
        last.load("student", student)
        ema.load(last.tensors("ema"))
        state = last.state()
        optim_g.load_state_dict(state["optim_g"])
        if discriminator is not None:
            last.load("discriminator", discriminator)
            optim_d.load_state_dict(state["optim_d"])
        nimg, steps = last.nimg, int(last.meta["steps"])
        log.rewind(nimg)

    def save() -> None:
        if dist.rank() == 0:
            modules: dict[str, Mapping[str, Tensor]] = {"student": student.state_dict(), "ema": ema.tensors}
            state = {"optim_g": optim_g.state_dict()}
            if discriminator is not None:
                modules["discriminator"] = discriminator.state_dict()
                state["optim_d"] = optim_d.state_dict()
            meta = {"steps": steps, "stage": config.stage}
            checkpoint.save(folder, nimg, modules, state, meta, options.keep_checkpoints)
        dist.barrier()

    def check(name: str) -> Callable[[Tensor], None]:
        return lambda value: check_finite({name: value}, nimg, folder)

    def autocast() -> AbstractContextManager[None]:
        return torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")

    # Train.
    pin = device.type == "cuda"
    batches = pair_batches(reader, batch_size, config.seed, nimg, options.loader_workers, config.data, pin)
    started, first, waited = time.monotonic(), nimg, 0.0
    reported, saved, finished = nimg, nimg, nimg >= options.images
    values: dict[str, float] = {}
    with StopFlag() as stop:
        while not finished:
            begun = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - begun
            rng = seed_step(config.seed, dist.rank(), nimg)
            noise = batch.noise.to(device, torch.float32, non_blocking=True)
            real = batch.latent.to(device, torch.float32, non_blocking=True)
            text = text_encoder.encode(batch.prompts)
            with autocast():
                fake = student(noise, text)
            norms: dict[str, float] = {}
            gan_parts: dict[str, Tensor] = {}

            # Discriminator: real rows, generated rows of which some are mismatched real ones, lazy R1.
            if discriminator is not None:
                discriminator.requires_grad_(True)
                mode, partner = mismatch(batch.prompts, config.gan.mix_fraction, rng)
                wrong = mix_and_match(fake.detach(), real, noise, text, mode, partner)
                with autocast():
                    logits_real = discriminator(real, noise, text)
                    logits_fake = discriminator(*wrong)
                loss_d = gan_parts["loss/d"] = discriminator_loss(logits_real, logits_fake)
                if config.gan.r1_gamma and steps % config.gan.r1_interval == 0:
                    row = int(torch.randint(len(noise), (), generator=rng))
                    one = slice(row, row + 1)
                    penalty = gan_parts["loss/r1"] = r1_penalty(
                        discriminator, real[one], noise[one], text[one]
                    )
                    loss_d = loss_d + 0.5 * config.gan.r1_gamma * config.gan.r1_interval * penalty
                check_finite(gan_parts, nimg, folder)
                loss_d.backward()
                lr = learning_rate(nimg, config.gan.optim, batch_size)
                norms["grad/d"] = step(optim_d, discriminator, config.gan.optim, lr, check("grad/d"))
                discriminator.requires_grad_(False)

            # Student: regression on the pair, and the discriminator's verdict on the same latents.
            loss_g, parts = regression(fake, real, rng)
            if discriminator is not None:
                with autocast():
                    verdict = discriminator(fake, noise, text)
                parts["loss/g_gan"] = generator_loss(verdict)
                loss_g = loss_g + config.gan.weight * parts["loss/g_gan"]
                parts |= gan_parts | _logit_means(logits_real, logits_fake, mode == 0, verdict)
            parts["loss/g"] = loss_g
            check_finite({k: v for k, v in parts.items() if k.startswith("loss/")}, nimg, folder)
            loss_g.backward()
            lr = learning_rate(nimg, config.optim, batch_size)
            norms["grad/g"] = step(optim_g, student, config.optim, lr, check("grad/g"))
            nimg, steps = nimg + batch_size, steps + 1
            ema.update(student, nimg)
            progress(config.stage, min(nimg, options.images), options.images)

            # Report and save.
            late = options.minutes is not None and time.monotonic() - started > 60 * options.minutes
            stopping = dist.any_rank(bool(stop))
            finished = nimg >= options.images or dist.any_rank(late)
            if nimg - reported >= options.report_images or finished:
                reported, seconds = nimg, time.monotonic() - started
                values = _average({**{k: float(v.detach()) for k, v in parts.items()}, **norms})
                rate = {"time/images_per_sec": (nimg - first) / seconds, "time/loader_wait": waited / seconds}
                log.write(nimg, {**values, **rate, "mem/peak_gib": peak_memory_gib()})
            if nimg - saved >= options.checkpoint_images or finished or stopping:
                saved = nimg
                save()
            if stopping and not finished:
                raise Interrupted(
                    f"stopped at image {nimg}; safe on disk: {folder / f'{nimg:09d}'}; "
                    "run the same command again to go on"
                )
    if not values and (lines := log.read()):
        values = {k: v for k, v in lines[-1].items() if "/" in k}
    seconds = time.monotonic() - started
    newest = checkpoint.latest(folder)
    if newest is None:
        raise UserError(f"{out}: nothing to train, train.images is {options.images}")
    return TrainSummary(
        out=str(out),
        images=nimg,
        steps=steps,
        seconds=seconds,
        images_per_sec=(nimg - first) / seconds if nimg > first else 0.0,
        loss={k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")},
        checkpoint=str(newest.folder),
    )


def _average(values: Mapping[str, float]) -> dict[str, float]:
    """Means over the ranks on which a value is a number; left out where it is NaN on every rank."""
    known = dist.mean({k: float(not math.isnan(v)) for k, v in values.items()})
    sums = dist.mean({k: 0.0 if math.isnan(v) else v for k, v in values.items()})
    return {k: sums[k] / known[k] for k in values if known[k] > 0}


def _logit_means(
    real: Mapping[str, Tensor], fake: Mapping[str, Tensor], plain: Tensor, verdict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mean logits of real, plain fake and mismatched rows, and of each head's verdict on the student."""
    each_fake = torch.stack([v.detach().float().mean((1, 2, 3)) for v in fake.values()]).mean(0)
    plain = plain.to(each_fake.device)
    means = {"logit/real": torch.stack([v.detach().float().mean() for v in real.values()]).mean()}
    for name, rows in (("logit/fake", plain), ("logit/mismatched", ~plain)):
        means[name] = each_fake[rows].mean()  # NaN without such rows
    return means | {f"logit/student/{head}": v.detach().float().mean() for head, v in verdict.items()}
