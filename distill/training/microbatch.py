"""One step's random numbers and rows: the same whatever the number of processes and micro-batches.

All that is drawn for a step is drawn for the whole batch, from (seed, images seen), and each process takes
its rows of it; or for each row, from (seed, the row's number).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from d2g.core.distributed import process_group
from d2g.core.seeds import StepStream, Stream, generator, noise
from d2g.diffusion.conditioning import Conditioning
from distill.config.components import Penalty
from distill.config.run import DistillConfig
from distill.losses.adversarial import mismatch
from distill.losses.gradient_penalty import DiscriminatorInput, drawn_rows
from distill.losses.noise_augmentation import Levels, Noiser
from distill.losses.regression.base import Transforms
from distill.losses.regression.regression import Regression
from distill.models.row_dropout import row_keys
from distill.training.text_cache import TextCache
from latent_lpips.augment import select_transforms
from pairgen.store.concat import scales
from pairgen.store.hdf5 import PairBatch

X = TypeVar("X", Tensor, Tensor | None)


@dataclass(frozen=True)
class StepRandomness:
    """A step's draws for a batch of B rows over all processes."""

    transforms: Transforms  # of the regression's distance
    mix: Tensor  # [B] in (0, 1): which rows are mismatched, and how
    levels: Tensor | None  # [B] D's time inputs; None: its constant
    penalised: list[int]  # rows of the batch for single-sample R1, in every step, due or not; none without it
    nimg: int  # the first row's number


@dataclass
class MicroBatch:
    """Rows that pass through the networks at once, and what becomes of them in a step."""

    prompts: list[str]
    noise: Tensor  # [b, C, h, w] fp32, as real
    real: Tensor
    text: Conditioning
    guidance: tuple[Tensor, ...]  # (scales [b],) for a student that is told it
    transforms: Transforms
    rows: range  # numbers of the rows since the run began
    keys: Tensor | None  # [b] of the student's dropout
    # Of the second stage:
    mode: Tensor  # [b] how each fake row is mismatched, 0: not
    partner: Tensor  # [b] and with which
    t: Tensor | None  # D's time inputs
    eps: tuple[Tensor | None, Tensor | None]  # noise of the real and of the fake rows before D
    moved: Tensor | None  # noise of the approximated R1
    fake: Tensor = field(init=False)  # the student's latents
    d_real: DiscriminatorInput = field(init=False)  # what D sees
    d_fake: DiscriminatorInput = field(init=False)


def sample_step_randomness(
    config: DistillConfig, regression: Regression, shape: tuple[int, int, int], nimg: int, levels: Levels
) -> StepRandomness:
    """The draws of the step at `nimg` images. Each kind has a generator of its own: switching one of them
    off does not move the others."""
    size = config.train.batch_size
    gan = config.stage == "gan"
    single = gan and config.gan.active_penalty == "single"
    return StepRandomness(
        transforms=regression.draw(size, shape, generator(config.seed, nimg, StepStream.TRANSFORMS)),
        mix=torch.rand(size, generator=generator(config.seed, nimg, StepStream.MIX)),
        levels=levels(size, generator(config.seed, nimg, StepStream.NOISE_LEVELS)) if gan else None,
        penalised=drawn_rows(size, config.gan.r1_rows, generator(config.seed, nimg, StepStream.PENALTY_ROWS))
        if single
        else [],
        nimg=nimg,
    )


def split(
    batch: PairBatch,
    draws: StepRandomness,
    encode: TextCache,
    config: DistillConfig,
    noised: Noiser,
    device: torch.device,
) -> list[MicroBatch]:
    """This process's rows as micro-batches on the device.

    All that a step needs from the CPU goes over here, before its first forward pass: a copy in the midst of
    it would wait for the GPU to have done what it was given.
    """
    gan, parts, local = config.gan, config.engine.gradient_accumulation, len(batch.prompts)
    size, first = local // parts, process_group.rank() * local
    z, real = (x.to(device, torch.float32, non_blocking=True) for x in (batch.noise, batch.latents))
    text = encode(batch.prompts)
    approx = config.stage == "gan" and gan.active_penalty == "approx"
    fraction = gan.mix_fraction if config.stage == "gan" else 0.0
    moves = generator(config.seed, Stream.R1_NOISE).initial_seed()
    found = []
    for start in range(0, local, size):
        here, there = slice(start, start + size), slice(first + start, first + start + size)
        prompts, rows = list(batch.prompts[here]), range(draws.nimg + there.start, draws.nimg + there.stop)
        shares = (gan.mix_x, gan.mix_c, gan.mix_z)
        mode, partner = mismatch(prompts, fraction, draws.mix[there], shares)
        shape = (z.shape[1], z.shape[2], z.shape[3])
        found.append(
            MicroBatch(
                prompts=prompts,
                noise=z[here],
                real=real[here],
                text=text[here],
                guidance=tuple(sent(t[here], device) for t in scales(batch)),
                transforms=None
                if draws.transforms is None
                else [select_transforms(t, there) for t in draws.transforms],
                rows=rows,
                keys=sent(row_keys(config.seed, rows) if config.student.dropout else None, device),
                mode=sent(mode, device),
                partner=sent(partner, device),
                t=sent(None if draws.levels is None else draws.levels[there], device),
                eps=(sent(noised.eps(rows, shape, 0), device), sent(noised.eps(rows, shape, 1), device)),
                moved=sent(noise(moves, rows, shape) if approx else None, device),
            )
        )
    return found


def penalised(
    micros: Sequence[MicroBatch], draws: StepRandomness, penalty: Penalty
) -> list[tuple[DiscriminatorInput, DiscriminatorInput, float]]:
    """What this process's passes of a penalty are on: real and fake, and the pass's weight in the mean over
    processes. All processes have as many passes: sharded networks are gathered by all together.

    Of the single-sample form a pass is one row. A process with fewer of the drawn rows than another repeats
    its first row at weight 0.
    """
    if penalty != "single":
        return [(m.d_real, m.d_fake, 1 / len(micros)) for m in micros]
    size = len(micros[0].prompts)
    local, world = size * len(micros), process_group.world_size()
    here = [
        row - process_group.rank() * local for row in draws.penalised if row // local == process_group.rank()
    ]
    passes = max(sum(row // local == rank for row in draws.penalised) for rank in range(world))
    weight = world / len(draws.penalised)
    rows = [(row, weight) for row in here] + [(0, 0.0)] * (passes - len(here))
    found = []
    for row, weight in rows:
        micro, one = micros[row // size], row % size
        found.append((micro.d_real.row(one), micro.d_fake.row(one), weight))
    return found


def sent(x: X, device: torch.device) -> X:
    """`x` of the CPU on the device, without waiting for it: from pageable memory it would."""
    if x is None:
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
