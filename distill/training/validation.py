"""Validation during training: pairs kept out of it, drawn by the averaged student; which point was best."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.distributed import process_group
from d2g.core.distributed.engine import local_shard
from d2g.core.errors import SettingError
from d2g.core.seeds import Stream, generator, noise
from latent_lpips.augment import AugmentParams
from latent_lpips.distance import ELatentLPIPS
from pairgen.store.concat import scales
from pairgen.store.dataset import PairRows

Draw = Callable[..., Tensor]
"""Noise [B, C, h, w] fp32 on the run's device, B prompts, scales(pairs) -> scaled latents [B, C, h, w]."""

SampleLatents = Callable[[int, Sequence[str]], Tensor]
"""(seed, N prompts) -> latents [N, C, h, w] of the averaged student, fp32 on the CPU and the same on every
rank. Prompt i gets the noise of (seed, i). Every rank must call it."""

Validate = Callable[[SampleLatents, int], dict[str, float]]
"""What else to measure, from the commands: (the student, images seen) -> values named `val/...`."""


def held_out(pairs: int, count: int) -> range:
    """The positions kept out of training: the last `count` of `pairs`. Training takes those before.

    Their noise is new to the student; their prompts may not be, where a store has more pairs than prompts.
    Raises SettingError when training would have none left.
    """
    if count >= pairs:
        raise SettingError(f"train.validate_pairs is {count} of {pairs} pairs; expected fewer")
    return range(pairs - count, pairs)


@contextmanager
def averaged(module: nn.Module, averages: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the module has the averaged weights, and `averages` the module's own: exchanged in place, so
    that no third copy is needed; afterwards both are as before, bit for bit. For fp32 weights, whole or in
    shards alike.
    """
    _exchange(module, averages)
    try:
        yield
    finally:
        _exchange(module, averages)


@torch.no_grad()
def _exchange(module: nn.Module, averages: Mapping[str, Tensor]) -> None:
    for name, value in module.state_dict().items():
        mine, other = local_shard(value), local_shard(averages[name])
        assert mine.dtype == other.dtype, f"{name}: {mine.dtype} and {other.dtype} cannot be exchanged"
        kept = mine.clone()
        mine.copy_(other)
        other.copy_(kept)


@torch.no_grad()
def measure(
    draw: Draw,
    reader: PairRows,
    rows: range,
    distance: ELatentLPIPS | None,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, float]:
    """`val/e_latent_lpips` (where there is a `distance`) and `val/psnr` of the student on held-out rows.

    Each row's transforms are a function of (seed, its position): the same at every validation, and whatever
    the batch size and the number of ranks, over which the rows are shared out. Every rank draws equally often
    (FSDP2 gathers weights together) and returns the same values.
    """
    shares = _shares(len(rows), batch_size)
    found = [_rows(draw, reader, rows, part, distance, device, seed) for part in shares]
    together = torch.cat(process_group.gather(torch.cat(found)))
    together = together[together[:, 0].argsort()]  # one order of summing, whatever the ranks
    _, square, low, high, *rest = together.unbind(1)
    result = {"val/psnr": float(psnr_from_mse(square, float(high.max() - low.min())).mean())}
    return {"val/e_latent_lpips": float(rest[0].mean()), **result} if rest else result


def _rows(
    draw: Draw,
    reader: PairRows,
    rows: range,
    part: range,
    distance: ELatentLPIPS | None,
    device: torch.device | str,
    seed: int,
) -> Tensor:
    """One line for each place of `part` that is one of `rows`: place, squared error, least and largest value
    of the target, distance. float64, on the CPU.
    """
    numbers = [rows[min(place, len(rows) - 1)] for place in part]
    batch = reader.read(numbers)
    target = batch.latents.to(device)
    drawn = draw(batch.noise.to(device), batch.prompts, *scales(batch)).float()
    flat = target.flatten(1)
    values = [(drawn - target).square().flatten(1).mean(1), flat.amin(1), flat.amax(1)]
    if distance is not None:
        transforms = [
            distance.sample_transforms(target[:1], generator(seed, Stream.VALIDATION_TRANSFORMS, number))
            for number in numbers
        ]
        joined = [_joined(of_one_draw) for of_one_draw in zip(*transforms, strict=True)]
        values.append(distance(drawn, target, transforms=joined))
    lines = torch.stack([torch.tensor(part, device=target.device), *values], 1).double().cpu()
    return lines[lines[:, 0] < len(rows)]


@torch.no_grad()
def draw_together(
    draw: Draw,
    shape: tuple[int, int, int],
    seed: int,
    prompts: Sequence[str],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    guidance: float | None = None,
) -> Tensor:
    """Latents as `SampleLatents` says, the work shared out over the ranks, which draw equally often.
    `guidance`: for a student that is told it.
    """
    found = []
    for part in _shares(len(prompts), batch_size):
        numbers = [min(place, len(prompts) - 1) for place in part]
        told = () if guidance is None else (torch.full((len(numbers),), guidance),)
        z = noise(seed, numbers, shape).to(device)
        found.append(draw(z, [prompts[n] for n in numbers], *told).float().cpu())
    together = torch.stack(
        process_group.gather(torch.cat(found)), dim=1
    )  # [share, rank, ...]: place by place
    return together.flatten(0, 1)[: len(prompts)]


def _shares(count: int, size: int) -> list[range]:
    """This rank's places of 0 to `count` - 1 in batches: as many on every rank, the last of them beyond."""
    world = process_group.world_size()
    places = range(process_group.rank(), -(-count // world) * world, world)
    return [places[first : first + size] for first in range(0, len(places), size)]


def psnr_from_mse(mean_square: Tensor, peak: float) -> Tensor:
    """10 log10(peak^2 / mean squared error) in dB, at most 200. `peak`: largest minus smallest value of the
    teacher's latents, all rows together, as latents have no natural range.
    """
    return 10 * (peak**2 / mean_square.clamp(min=peak**2 * 1e-20)).log10()


def _joined(parts: Sequence[AugmentParams]) -> AugmentParams:
    """Transforms of one row each as those of a batch."""
    names = [f.name for f in fields(AugmentParams) if isinstance(getattr(parts[0], f.name), Tensor)]
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], **joined)


PREFERRED = ("val/fid", "val/e_latent_lpips", "val/psnr")
"""What decides which point is best: the first of these that a run reports."""

HIGHER = ("val/psnr",)
"""Of these, more is better."""


def best(lines: Sequence[Mapping[str, float]], saved: Collection[int]) -> tuple[int, str, float] | None:
    """(images, measure, value) of the best validation among the points `saved`; the first of equals.

    None where no saved point was validated.
    """
    for name in PREFERRED:
        found = [
            (line[name], int(line["nimg"]))
            for line in lines
            if math.isfinite(line.get(name, math.nan)) and line["nimg"] in saved
        ]
        if found:
            sign = -1 if name in HIGHER else 1
            value, nimg = min(found, key=lambda point: (sign * point[0], point[1]))
            return nimg, name, value
    return None
