"""Validation during training on held-out pairs, sampled with the EMA weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from d2g.core.distributed import process_group
from d2g.core.distributed.engine import local_shard
from d2g.core.errors import SettingError
from d2g.core.logs import EVERY_RANK, logger
from d2g.core.seeds import Stream, generator, noise
from latent_lpips.augment import AugmentParams
from latent_lpips.distance import ELatentLPIPS
from pairgen.store.concat import guidance_scales
from pairgen.store.dataset import Rows

Draw = Callable[..., Tensor]
"""(noise [B, C, h, w] fp32 on the run's device, B prompts, *guidance_scales(pairs),
prior=pairs.condition) -> scaled latents [B, C, h, w]."""

SampleLatents = Callable[[int, Sequence[str]], Tensor]
"""(seed, N prompts) -> latents [N, C, h, w] of the EMA student, fp32, on the CPU, identical on every rank.
Prompt i uses the noise of (seed, i). Every rank must call it."""


class Validate(Protocol):
    """Additional validation, injected by the command. Every rank must call both."""

    facts: dict[str, Any]
    """How the last call measured, as JSON, on rank 0: values compare only if these are equal."""

    def open(self) -> None:
        """Load what it needs, before the run begins. Raises UserError for what is missing."""

    def __call__(self, sample: SampleLatents, nimg: int) -> dict[str, float]:
        """(sampling function, images seen) -> values `val/...`."""
        ...


def held_out(pairs: int, count: int) -> range:
    """Return the positions of the held-out pairs: the last `count` of `pairs`. Training uses the others.

    The student never trains on their noise, unless several stores share a seed, but it may train on their
    prompts if the store repeats prompts.
    Raises SettingError if no pairs are left for training.
    """
    if count >= pairs:
        raise SettingError(f"train.validate_pairs is {count} of {pairs} pairs; expected fewer")
    return range(pairs - count, pairs)


@contextmanager
def use_ema_weights(module: nn.Module, averages: Mapping[str, Tensor]) -> Iterator[None]:
    """Swap the module's weights and `averages` in place inside the context, and swap them back afterwards.

    The swap needs no third copy of the weights, and the restored weights are bit-identical. Weights must be
    fp32 and sharded like `averages`.
    """
    _swap_weights(module, averages)
    try:
        yield
    finally:
        _swap_weights(module, averages)


@torch.no_grad()
def _swap_weights(module: nn.Module, averages: Mapping[str, Tensor]) -> None:
    for name, value in module.state_dict().items():
        weight, average = local_shard(value), local_shard(averages[name])
        assert weight.dtype == average.dtype, f"{name}: cannot swap {weight.dtype} and {average.dtype}"
        backup = weight.clone()
        weight.copy_(average)
        average.copy_(backup)


@torch.no_grad()
def measure(
    draw: Draw,
    reader: Rows,
    rows: range,
    distance: ELatentLPIPS | None,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, float]:
    """Measure `val/psnr` in dB and, with a `distance`, `val/e_latent_lpips` of the student on held-out rows.

    The augmentations of a row depend only on (seed, position of the row): they are the same at every
    validation, for any batch size and number of ranks. The rows are split over the ranks. Every rank samples
    equally many batches, because FSDP2 gathers weights collectively, and every rank returns the same values.
    """
    batches, skipped = _rank_batches(len(rows), batch_size), dict[str, str]()
    local = [_measure_batch(draw, reader, rows, part, distance, device, seed, skipped) for part in batches]
    # A reader with `skip_bad` replaces damaged rows by those of another shard, which the run may train on.
    for file, reason in skipped.items():
        logger.warning(
            "validation: %s: %s; its held-out pairs are replaced by others, which the run may train on; "
            "`d2g pairs repair` makes them again",
            *(file, reason),
            extra=EVERY_RANK,
        )
    values = torch.cat(process_group.gather(torch.cat(local)))
    # Sort by row, so that sums do not depend on the number of ranks.
    values = values[values[:, 0].argsort()]
    _, squared_error, low, high, *distances = values.unbind(1)
    result = {"val/psnr": float(psnr_from_mse(squared_error, float(high.max() - low.min())).mean())}
    return {"val/e_latent_lpips": float(distances[0].mean()), **result} if distances else result


def _measure_batch(
    draw: Draw,
    reader: Rows,
    rows: range,
    part: range,
    distance: ELatentLPIPS | None,
    device: torch.device | str,
    seed: int,
    skipped: dict[str, str],
) -> Tensor:
    """Measure the rows at the positions `part` of `rows`; positions beyond the end are padding.

    Returns float64 [N, 4 or 5] on the CPU, without padding: position, mean squared error, minimum and maximum
    of the target, and the distance if there is one. Adds the damaged files whose rows are replaced to
    `skipped`, with what is wrong with them.
    """
    # Draw the student's latents. Padding repeats the last row.
    numbers = [rows[min(position, len(rows) - 1)] for position in part]
    batch = reader.read(numbers)
    skipped |= batch.skipped
    target = batch.latents.to(device)
    latents = draw(
        batch.noise.to(device), batch.prompts, *guidance_scales(batch), prior=batch.condition
    ).float()
    # Values of each row.
    flat = target.flatten(1)
    values = [(latents - target).square().flatten(1).mean(1), flat.amin(1), flat.amax(1)]
    if distance is not None:
        # Sample the augmentations of each row separately, then batch them for one call.
        row_transforms = [
            distance.sample_transforms(target[:1], generator(seed, Stream.VALIDATION_TRANSFORMS, number))
            for number in numbers
        ]
        transforms = [_batch_params(params) for params in zip(*row_transforms, strict=True)]
        values.append(distance(latents, target, transforms=transforms))
    # One line per row, without the padding.
    table = torch.stack([torch.tensor(part, device=target.device), *values], 1).double().cpu()
    return table[table[:, 0] < len(rows)]


@torch.no_grad()
def sample_across_ranks(
    draw: Draw,
    shape: tuple[int, ...],
    seed: int,
    prompts: Sequence[str],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    guidance: float | None = None,
) -> Tensor:
    """Sample one latent per prompt on all ranks together; see `SampleLatents` for the result.

    Every rank samples equally many batches. `shape`: of a row's noise. `guidance`: the guidance scale,
    for a student that takes it as an input.
    """
    local = []
    for part in _rank_batches(len(prompts), batch_size):
        numbers = [min(position, len(prompts) - 1) for position in part]
        scale = () if guidance is None else (torch.full((len(numbers),), guidance),)
        z = noise(seed, numbers, shape).to(device)
        local.append(draw(z, [prompts[n] for n in numbers], *scale).float().cpu())
    # Interleave the ranks, [positions per rank, ranks, ...], which restores the order of the prompts.
    latents = torch.stack(process_group.gather(torch.cat(local)), dim=1)
    return latents.flatten(0, 1)[: len(prompts)]


def _rank_batches(count: int, size: int) -> list[range]:
    """Split positions 0 to `count` - 1 over the ranks and return this rank's batches of at most `size`.

    All ranks get equally many positions, so the last positions may be `count` or larger (padding).
    """
    world = process_group.world_size()
    positions = range(process_group.rank(), -(-count // world) * world, world)
    return [positions[first : first + size] for first in range(0, len(positions), size)]


def psnr_from_mse(mean_square: Tensor, peak: float) -> Tensor:
    """Compute the PSNR in dB, 10 log10(peak^2 / mean squared error), at most 200.

    `peak`: maximum minus minimum of the teacher's latents over all rows, because latents have no fixed range.
    """
    return 10 * (peak**2 / mean_square.clamp(min=peak**2 * 1e-20)).log10()


def _batch_params(parts: Sequence[AugmentParams]) -> AugmentParams:
    """Concatenate augmentation parameters of single rows to those of a batch."""
    names = [f.name for f in fields(AugmentParams) if isinstance(getattr(parts[0], f.name), Tensor)]
    batched: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], **batched)
