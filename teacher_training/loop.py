"""The training loop of the VAE and the denoiser: AdamW, cosine learning rate, EMA, exact resume."""

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from distill.models.ema import EMA, warmed_up_beta
from teacher_training.config import FitConfig

LossFn = Callable[[list[int], torch.Generator], tuple[Tensor, dict[str, Tensor]]]
"""`loss_of(rows, generator)` returns the loss of these rows and named values for the log."""


@dataclass(frozen=True, kw_only=True)
class Previews:
    """Previews during a training: `draw(modules, nimg)` receives copies that hold the averaged weights.

    It is called on rank 0, every `minutes` and after the last step, and must not draw global random numbers.
    """

    draw: Callable[[Mapping[str, nn.Module], int], None]
    minutes: float


class TrainedDiscriminator(ABC):
    """A network that learns against the trained modules, with an optimizer of its own: a discriminator.

    In each step the loop calls `begin`, the modules' `loss_of`, and `loss`, then updates both. The network is
    in the checkpoints, by its `name`, and has no average. AdamW's betas are those of VQGAN and LDM.
    """

    def __init__(self, name: str, module: nn.Module, lr: float) -> None:
        self.name, self.module, self.lr = name, module, lr
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.5, 0.9), weight_decay=0.0)

    @abstractmethod
    def begin(self, nimg: int) -> None:
        """Start the step after `nimg` images."""

    @abstractmethod
    def loss(self) -> Tensor | None:
        """The network's loss on what the modules have just made; None while it does not learn."""


def cosine_learning_rate(nimg: int, config: FitConfig) -> float:
    """Return the learning rate after `nimg` images: linear warm-up times a cosine to zero.

    Both scale with the length: the warm-up takes at most a tenth of it.
    """
    warmup_images = max(1.0, min(config.warmup_images, config.images / 10))
    warmup = min(1.0, (nimg + config.batch_size) / warmup_images)
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
    previews: Previews | None = None,
    discriminator: TrainedDiscriminator | None = None,
) -> None:
    """Train `modules` on `loss_of`, and `discriminator` against them; leave EMA weights in the modules.

    `size` is the number of rows to train on. Data order and noise are functions of (seed, images so far), so
    a resumed training equals an unbroken one. Raises FloatingPointError at the first non-finite loss and
    Interrupted on Ctrl-C, both with a checkpoint on disk.
    """
    world, rank = process_group.world_size(), process_group.rank()
    if config.batch_size % world:
        raise SettingError(
            f"batch_size {config.batch_size} does not divide over {world} processes; expected a multiple of "
            f"{world}, or another number of processes (--gpus of `d2g launch`)"
        )
    state = _resume(log, modules, config, discriminator)
    local = config.batch_size // world
    started = saved = previewed = time.monotonic()
    reported = first = state.nimg
    with StopFlag() as stop:
        while state.nimg < config.images:
            # One step on this rank's rows of the batch.
            rows = permuted_batch(seed, size, state.nimg, config.batch_size)[rank * local :][:local]
            if discriminator is not None:
                discriminator.begin(state.nimg)
            loss, parts = loss_of(rows, seed_step(seed, rank, state.nimg))
            adversarial_loss = discriminator.loss() if discriminator is not None else None
            if discriminator is not None and adversarial_loss is not None:
                parts = {**parts, f"loss/{discriminator.name}": adversarial_loss}
            _update(label, state, loss, adversarial_loss, config)
            progress(label, min(state.nimg, config.images), config.images)
            # Report 200 times per training.
            if state.nimg - reported >= config.images // 200 or state.nimg >= config.images:
                reported = state.nimg
                values = process_group.mean({k: float(v.detach()) for k, v in parts.items()})
                rate = (state.nimg - first) / (time.monotonic() - started)
                log.write(state.nimg, {**values, "time/images_per_sec": rate})
            # Draw samples every few minutes and at the end.
            last = state.nimg >= config.images
            if previews is not None and (last or time.monotonic() - previewed > 60 * previews.minutes):
                if rank == 0:
                    previews.draw(state.averaged(), state.nimg)
                previewed = time.monotonic()
            # Save now and then, at the end, and on Ctrl-C.
            stopping = process_group.any_rank(bool(stop))
            due = process_group.any_rank(time.monotonic() - saved > 60 * config.checkpoint_minutes)
            if stopping or due or last:
                saved = time.monotonic()
                path = _save(label, state) if rank == 0 else state.folder
                process_group.barrier()
                if stopping:
                    raise Interrupted(
                        f"{label} stopped; safe on disk: {path}; run the same command again to go on"
                    )
    state.ema.copy_to(state.modules)
    state.modules.eval().requires_grad_(False)


@dataclass(kw_only=True)
class _FitState:
    """The contents of a checkpoint, and the folder of checkpoints."""

    modules: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    ema: EMA
    folder: Path
    discriminator: TrainedDiscriminator | None
    nimg: int = 0

    def averaged(self) -> dict[str, nn.Module]:
        """Copies of the modules with the averaged weights, in eval mode."""
        copies = copy.deepcopy(self.modules).eval().requires_grad_(False)
        self.ema.copy_to(copies)
        return dict(copies.items())


def _resume(
    log: RunLog,
    modules: Mapping[str, nn.Module],
    config: FitConfig,
    discriminator: TrainedDiscriminator | None,
) -> _FitState:
    """Build the state of a training from the newest checkpoint of its run folder, if there is one."""
    # All ranks start with the weights of rank 0.
    trained = nn.ModuleDict(dict(modules)).train().requires_grad_(True)
    process_group.broadcast(trained.state_dict().values())
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    folder = log.folder / "checkpoints"
    ema = EMA(trained, config.ema_decay)
    state = _FitState(
        modules=trained, optimizer=optimizer, ema=ema, folder=folder, discriminator=discriminator
    )
    if discriminator is not None:
        process_group.broadcast(discriminator.module.state_dict().values())

    # Load the newest checkpoint if there is one, and drop lines of the log beyond its image.
    if (newest := checkpoint.latest(folder)) is not None:
        newest.load("model", trained)
        state.ema.load(newest.tensors("ema"))
        optimizer.load_state_dict(newest.state()["optimizer"])
        if discriminator is not None:
            newest.load(discriminator.name, discriminator.module)
            discriminator.optimizer.load_state_dict(newest.state()[discriminator.name])
        state.nimg = newest.nimg
        # A killed run may have left a checkpoint that it was about to delete.
        if process_group.rank() == 0:
            checkpoint.prune(folder)
    log.rewind(state.nimg)
    return state


def _update(
    label: str, state: _FitState, loss: Tensor, adversarial_loss: Tensor | None, config: FitConfig
) -> None:
    """One step of the modules, their EMA and the discriminator.

    Raises FloatingPointError if any rank's loss is not finite.
    """
    # Gradients; a loss that is not finite stops every rank.
    losses = [loss] if adversarial_loss is None else [loss, adversarial_loss]
    for term in losses:
        term.backward()
    if process_group.any_rank(not all(torch.isfinite(term) for term in losses)):
        newest = checkpoint.latest(state.folder)
        remedy = f"last good checkpoint: {newest.folder}" if newest else "no checkpoint was written before"
        values = " and ".join(str(term.item()) for term in losses)
        raise FloatingPointError(
            f"{label}: loss is {values} at image {state.nimg}; {remedy}; "
            "lower the learning rate in another --out"
        )
    # One update on the mean gradient of all ranks, of the modules and of their discriminator.
    lr = cosine_learning_rate(state.nimg, config)
    _step(state.modules, state.optimizer, lr, config)
    if state.discriminator is not None and adversarial_loss is not None:
        discriminator = state.discriminator
        _step(discriminator.module, discriminator.optimizer, discriminator.lr * lr / config.lr, config)
    updates = state.nimg // config.batch_size
    state.nimg += config.batch_size
    state.ema.update(state.modules, state.nimg, warmed_up_beta(config.ema_decay, updates))


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, lr: float, config: FitConfig) -> None:
    """One optimizer step on the mean of all ranks' gradients, which are removed."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    process_group.average_gradients(module.parameters())
    torch.nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _save(label: str, state: _FitState) -> Path:
    modules: dict[str, Mapping[str, Tensor]]
    modules = {"model": state.modules.state_dict(), "ema": state.ema.tensors}
    optimizers = {"optimizer": state.optimizer.state_dict()}
    if state.discriminator is not None:
        modules[state.discriminator.name] = state.discriminator.module.state_dict()
        optimizers[state.discriminator.name] = state.discriminator.optimizer.state_dict()
    return checkpoint.save(state.folder, state.nimg, modules, optimizers, {"label": label})
