"""Predicting the time and cost of a pair job from a few batches on this machine."""

import time
from math import prod
from typing import Any

import torch

from d2g.core.distributed import process_group
from d2g.core.progress import Progress, quiet
from pairgen.config import PairConfig
from pairgen.job import Job, log_supported_stages, open_job

LARGEST_BATCH = 1024
GAIN = 1.03  # a doubled batch must be at least this much faster per row
GPU_COUNTS = (1, 8, 64, 128)


def plan_pairs(
    config: PairConfig, batches: int = 2, price: float = 0.0, progress: Progress = quiet
) -> dict[str, Any]:
    """Time `batches` batches on this machine and extrapolate to the complete job.

    Returns pairs/s, GPU-hours, GiB and shards, and hours (and cost) by number of GPUs. `price`: of one
    GPU-hour in any currency, 0 or more; 0 omits costs.
    """
    device = process_group.init()
    log_supported_stages(config)
    # Time the complete computation of rows at the batch size of the real job.
    job = open_job(config, device)
    spec = job.spec
    batch_size = config.batch_size or fastest_batch(job)
    seconds = seconds_per_row(job, batch_size, batches, progress=progress)
    # Everything else is proportional to the number of pairs.
    channels, height, width = spec.latent_shape
    gib = spec.num_pairs * channels * height * width * spec.torch_dtype.itemsize / 2**30
    condition = spec.num_pairs * prod(spec.condition_shape or (0,)) * spec.torch_dtype.itemsize / 2**30
    hours = seconds * spec.num_pairs / 3600
    return {
        "pairs": spec.num_pairs,
        "gib": gib + condition,
        "gib_with_noise": 2 * gib + condition,
        "gib_here": (gib if spec.noise == "seeded" else 2 * gib) + condition,
        "shards": spec.num_shards,
        "evaluations_per_pair": spec.evaluations_per_pair,
        "batch_size": batch_size,
        "seconds_per_pair": seconds,
        "pairs_per_sec": 1 / seconds,
        "gpu_hours": hours,
        "by_gpus": {
            str(count): {"hours": hours / count} | ({"cost": hours * price} if price else {})
            for count in GPU_COUNTS
        },
        "measured_on": device_name(device),
    }


def seconds_per_row(job: Job, batch_size: int, batches: int, progress: Progress = quiet) -> float:
    """Mean seconds per row of the complete computation, after a warm-up batch."""
    started = 0.0
    for batch in range(batches + 1):
        first = batch * batch_size
        indices = [index % job.spec.num_pairs for index in range(first, first + batch_size)]
        job.rows(indices)[1].cpu()  # waits for the device
        # The first batch warms up: compilation, memory and caches.
        if batch == 0:
            started = time.monotonic()
        progress("timing", batch, batches)
    return (time.monotonic() - started) / (batches * batch_size)


@torch.no_grad()
def fastest_batch(job: Job) -> int:
    """The batch size with the most rows/s: doubled until two doublings gain nothing or memory is full."""
    best, best_seconds, size = 1, float("inf"), 1
    while size <= min(4 * best, LARGEST_BATCH):
        try:
            seconds = _evaluation_seconds(job, size) / size
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        # A larger batch must be clearly faster, or the smaller one stays.
        if seconds * GAIN < best_seconds:
            best, best_seconds = size, seconds
        size *= 2
    return best


def _evaluation_seconds(job: Job, size: int) -> float:
    """Seconds per evaluation of the guided network: the fastest of three after a warm-up."""
    spec = job.spec
    indices = [index % spec.num_pairs for index in range(size)]
    encoded = job.encode(indices)
    cond = encoded.cond[[encoded.position[text] for text in job.texts(indices)]]
    if (condition := job.condition(indices)) is not None:
        cond = cond.with_prior(condition)
    noise = torch.zeros(size, *spec.latent_shape)
    seconds = []
    for _ in range(4):
        started = time.monotonic()
        job.teacher.sample(noise, job.texts(indices), 1, spec.guidance, spec.solver, 0.0, cond).cpu()
        seconds.append(time.monotonic() - started)
    return min(seconds[1:])


def device_name(device: torch.device) -> str:
    """The device's name for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
