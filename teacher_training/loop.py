"""The small training loop behind the miniature's VAE and denoiser: AdamW, cosine rate, EMA, exact resume."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from d2g.core.distributed import checkpoint, process_group
from d2g.core.errors import Interrupted, SettingError
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import seed_step
from d2g.core.shuffle import permuted_batch
from d2g.core.signals import StopFlag
from d2g.core.tracking.run_directory import RunLog
from distill.models.ema import EMA
from teacher_training.config import FitConfig

LossFn = Callable[[list[int], torch.Generator], tuple[Tensor, dict[str, Tensor]]]


def cosine_learning_rate(nimg: int, config: FitConfig) -> float:
    """Linear warm-up, then a cosine to zero, both in images."""
    warmup = min(1.0, (nimg + config.batch_size) / max(1, config.warmup_images))
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, nimg / config.images)))


def fit_modules(
    label: str,
    log: RunLog,
    modules: Mapping[str, nn.Module],
    loss_of: LossFn,
    size: int,
    config: FitConfig,
    seed: int,
    progress: Progress = quiet,
) -> None:
    """Train `modules` together on `loss_of(rows, generator)` and leave their EMA weights in them.

    Data order and noise are functions of (seed, images so far), so a resumed training equals an unbroken one.
    Raises FloatingPointError at the first non-finite loss and Interrupted on Ctrl-C, both with a checkpoint
    safe.
    """
    if config.batch_size % process_group.world_size():
        raise SettingError(
            f"batch_size {config.batch_size} does not divide over {process_group.world_size()} processes"
        )
    together = nn.ModuleDict(dict(modules)).train().requires_grad_(True)
    process_group.broadcast(together.state_dict().values())
    optimizer = torch.optim.AdamW(
        together.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    ema = EMA(together, config.ema)
    folder, nimg = log.folder / "checkpoints", 0
    if (last := checkpoint.latest(folder)) is not None:
        last.load("model", together)
        ema.load(last.tensors("ema"))
        optimizer.load_state_dict(last.state()["optimizer"])
        nimg = last.nimg
        log.rewind(nimg)

    def save() -> Path:
        modules = {"model": together.state_dict(), "ema": ema.tensors}
        return checkpoint.save(folder, nimg, modules, {"optimizer": optimizer.state_dict()}, {"label": label})

    local = config.batch_size // process_group.world_size()
    started = saved = time.monotonic()
    reported = first = nimg
    with StopFlag() as stop:
        while nimg < config.images:
            rows = permuted_batch(seed, size, nimg, config.batch_size)[process_group.rank() * local :][:local]
            for group in optimizer.param_groups:
                group["lr"] = cosine_learning_rate(nimg, config)
            loss, parts = loss_of(rows, seed_step(seed, process_group.rank(), nimg))
            loss.backward()
            if process_group.any_rank(not torch.isfinite(loss)):
                last = checkpoint.latest(folder)
                where = f"last good checkpoint: {last.folder}" if last else "no checkpoint was written before"
                raise FloatingPointError(
                    f"{label}: loss is {loss.item()} at image {nimg}; {where}; "
                    "lower the learning rate in another --out"
                )
            process_group.average_gradients(together.parameters())
            torch.nn.utils.clip_grad_norm_(together.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            nimg += config.batch_size
            ema.update(together, nimg)
            progress(label, min(nimg, config.images), config.images)
            if nimg - reported >= config.images // 200 or nimg >= config.images:
                reported = nimg
                values = process_group.mean({k: float(v.detach()) for k, v in parts.items()})
                rate = (nimg - first) / (time.monotonic() - started)
                log.write(nimg, {**values, "time/images_per_sec": rate})
            stopping = process_group.any_rank(bool(stop))
            due = process_group.any_rank(time.monotonic() - saved > 60 * config.checkpoint_minutes)
            if stopping or due or nimg >= config.images:
                saved = time.monotonic()
                path = save() if process_group.rank() == 0 else folder
                process_group.barrier()
                if stopping:
                    raise Interrupted(
                        f"{label} stopped; safe on disk: {path}; run the same command again to go on"
                    )
    ema.copy_to(together)
    together.eval().requires_grad_(False)
