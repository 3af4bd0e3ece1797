"""One step's random numbers and rows: the same whatever the number of processes and micro-batches.

All that is drawn for a step is drawn for the whole batch, from (seed, images seen), and each process takes
its rows of it. A process's own are only the row that a single-sample penalty falls on, the noise of the
approximated one, and dropout.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from core import dist
from core.seeds import generator
from core.text import Told
from distill.config import DistillConfig
from distill.joined import scales
from distill.noising import Levels
from distill.r1 import Shown
from distill.regression import Regression, Transforms
from distill.text_cache import TextCache
from latent_lpips.augment import take
from pairgen.store import PairBatch


@dataclass(frozen=True)
class Draws:
    """A step's draws for a batch of B rows over all processes."""

    transforms: Transforms  # of the regression's distance
    mix: Tensor  # [B] in (0, 1): which rows are mismatched, and how
    levels: Tensor | None  # [B] D's time inputs; None: its constant
    mine: torch.Generator  # of this process alone
    nimg: int  # the first row's number


@dataclass
class MicroBatch:
    """Rows that pass through the networks at once, and what becomes of them in a step."""

    prompts: list[str]
    noise: Tensor  # [b, C, h, w] fp32, as real
    real: Tensor
    text: Told
    guidance: tuple[Tensor, ...]  # (scales [b],) for a student that is told it
    transforms: Transforms
    mix: Tensor
    t: Tensor | None
    rows: range  # numbers of the rows since the run began
    fake: Tensor = field(init=False)  # the student's latents
    mode: Tensor = field(init=False)  # how each was mismatched, 0: not
    shown_real: Shown = field(init=False)  # what D sees
    shown_fake: Shown = field(init=False)


def draw_step(
    config: DistillConfig, regression: Regression, shape: tuple[int, int, int], nimg: int, levels: Levels
) -> Draws:
    """The draws of the step at `nimg` images. Each kind has a generator of its own: switching one of them
    off does not move the others."""
    size = config.train.batch_size
    gan = config.stage == "gan"
    return Draws(
        transforms=regression.draw(size, shape, generator(config.seed, nimg, 1)),
        mix=torch.rand(size, generator=generator(config.seed, nimg, 2)),
        levels=levels(size, generator(config.seed, nimg, 3)) if gan else None,
        mine=generator(config.seed, nimg, 4, dist.rank()),
        nimg=nimg,
    )


def split(
    batch: PairBatch, draws: Draws, encode: TextCache, parts: int, device: torch.device
) -> list[MicroBatch]:
    """This process's rows as `parts` micro-batches on the device."""
    local = len(batch.prompts)
    size, first = local // parts, dist.rank() * local
    noise, real = (x.to(device, torch.float32, non_blocking=True) for x in (batch.noise, batch.latent))
    text = encode(batch.prompts)
    found = []
    for start in range(0, local, size):
        here, there = slice(start, start + size), slice(first + start, first + start + size)
        found.append(
            MicroBatch(
                prompts=list(batch.prompts[here]),
                noise=noise[here],
                real=real[here],
                text=text[here],
                guidance=tuple(t[here].to(device) for t in scales(batch)),
                transforms=None if draws.transforms is None else [take(t, there) for t in draws.transforms],
                mix=draws.mix[there],
                t=None if draws.levels is None else draws.levels[there].to(device),
                rows=range(draws.nimg + there.start, draws.nimg + there.stop),
            )
        )
    return found
