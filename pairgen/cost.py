"""Predicting the time and cost of a pair job from a few batches on this machine."""

import time
from math import prod
from typing import Any

import torch

from d2g.core.distributed import process_group
from d2g.core.progress import Progress, quiet
from pairgen.config import PairConfig
from pairgen.job import Job, expected_spec, log_supported_stages, open_job, streamed_prompts
from pairgen.speed import choose_speed, fastest_batch
from pairgen.store.spec import StoreSpec

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
    prompts = streamed_prompts(config)
    config = choose_speed(config, device, prompts=prompts)
    job = open_job(config, device, prompts=prompts)
    spec = job.spec
    batch_size = config.batch_size or fastest_batch(job)
    seconds = seconds_per_row(job, batch_size, batches, progress=progress)
    # The hours are proportional to the number of pairs.
    hours = seconds * spec.num_pairs / 3600
    return {
        **_size(spec),
        "batch_size": batch_size,
        "precision": spec.precision,
        "compile": spec.compiled,
        "seconds_per_pair": seconds,
        "pairs_per_sec": 1 / seconds,
        "gpu_hours": hours,
        "by_gpus": {
            str(count): {"hours": hours / count} | ({"cost": hours * price} if price else {})
            for count in GPU_COUNTS
        },
        "measured_on": device_name(device),
    }


def expected_size(config: PairConfig) -> dict[str, Any]:
    """The pairs, GiB and shards of a job and its evaluations per pair, without the teacher's weights.

    Empty where the prompts are not known yet. Raises errors as `pairgen.job.expected_spec` does.
    """
    spec = expected_spec(config)
    return {} if spec is None else _size(spec)


def _size(spec: StoreSpec) -> dict[str, Any]:
    gib = spec.num_pairs * prod(spec.latent_shape) * spec.torch_dtype.itemsize / 2**30
    condition = spec.num_pairs * prod(spec.condition_shape or (0,)) * spec.torch_dtype.itemsize / 2**30
    return {
        "pairs": spec.num_pairs,
        "gib": gib + condition,
        "gib_with_noise": 2 * gib + condition,
        "gib_here": (gib if spec.noise == "seeded" else 2 * gib) + condition,
        "shards": spec.num_shards,
        "evaluations_per_pair": spec.evaluations_per_pair,
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


def device_name(device: torch.device) -> str:
    """The device's name for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"
