"""Settings that a pair job chooses by measuring on this machine: batch size, precision, compilation.

A precision changes the stored numbers, and compilation their rounding. So both are chosen once, when a store
is created; the store's spec keeps the choice, and every later or parallel job of the store follows it.
"""

import time
from dataclasses import replace

import torch

from d2g.core.distributed import process_group
from d2g.core.logs import logger
from pairgen.config import PairConfig
from pairgen.job import Job, open_job, with_choices
from pairgen.store.spec import StoreSpec

LARGEST_BATCH = 1024
GAIN = 1.03  # a doubled batch, or compilation, must be at least this much faster per row
BF16_GAIN = 1.2  # bf16 costs accuracy
BF16_FROM, COMPILE_FROM = 60.0, 600.0  # seconds of a job; shorter ones stay in fp32, or uncompiled


def choose_speed(config: PairConfig, device: torch.device, stored: StoreSpec | None = None) -> PairConfig:
    """Decide the settings `precision` and `compile` of a config where they are `auto`.

    `stored`: the spec of an existing store, whose choice stays. Otherwise evaluations of the network are
    timed, and one line logs the choice. Raises UserError as `open_job`.
    """
    if stored is not None:
        return with_choices(config, stored.precision, stored.compiled)
    if "auto" not in (config.precision, config.compile):
        return config
    # Short jobs are exact, and are not worth a measurement.
    chosen = with_choices(config, "fp32", False)
    seconds = _job_seconds(chosen, device)
    before, notes = seconds, []
    if config.precision == "auto" and seconds >= BF16_FROM:
        rounded = with_choices(config, "bf16", False)
        if (faster := _job_seconds(rounded, device)) * BF16_GAIN < seconds:
            notes.append(f"bf16 is {seconds / faster:.2f} times as fast as fp32")
            chosen, seconds = rounded, faster
    if config.compile == "auto" and seconds >= COMPILE_FROM:
        compiled = replace(chosen, compile=True)
        if (faster := _job_seconds(compiled, device)) * GAIN < seconds:
            notes.append(f"compilation is {seconds / faster:.2f} times as fast")
            chosen, seconds = compiled, faster
    logger.info(
        "precision=%s compile=%s for this store, about %.0f s of computing%s",
        *(chosen.precision, str(bool(chosen.compile)).lower(), seconds),
        f" (measured: {', '.join(notes)}; fp32 alone {before:.0f} s)" if notes else "",
    )
    return chosen


def _job_seconds(config: PairConfig, device: torch.device) -> float:
    """Predict the seconds of this process's share of a job; infinite without enough memory or a compiler."""
    job = open_job(config, device)
    size = min(config.batch_size or 8, job.spec.num_pairs)
    try:
        row = evaluation_seconds(job, size) / size
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return float("inf")
    except RuntimeError as error:
        if not config.compile:
            raise
        logger.info("not compiled: %s", " ".join(str(error).split())[:300])
        return float("inf")
    return row * job.spec.steps * job.spec.num_pairs / process_group.world_size()


@torch.no_grad()
def fastest_batch(job: Job) -> int:
    """The batch size with the most rows/s: doubled until two doublings gain nothing or memory is full."""
    best, best_seconds, size = 1, float("inf"), 1
    while size <= min(4 * best, LARGEST_BATCH):
        try:
            seconds = evaluation_seconds(job, size) / size
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        # A larger batch must be clearly faster, or the smaller one stays.
        if seconds * GAIN < best_seconds:
            best, best_seconds = size, seconds
        size *= 2
    return best


def evaluation_seconds(job: Job, size: int) -> float:
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
