"""Measure the fastest batch size, precision and compilation of a pair job on this machine.

Precision changes the stored numbers, and compilation their rounding. Both are therefore chosen once, when a
store is created. The store's spec records the choice, and all later or parallel jobs of the store follow it.
"""

import time
from dataclasses import replace

import torch

from d2g.core.distributed import process_group
from d2g.core.logs import logger
from d2g.diffusion.solvers import evaluations_per_sample
from pairgen.config import PairConfig
from pairgen.job import Job, open_job, resolve_auto
from pairgen.prompts import PromptList
from pairgen.store.spec import StoreSpec

LARGEST_BATCH = 1024
GAIN = 1.03  # a doubled batch, or compilation, must be at least this much faster per row
BF16_GAIN = 1.2  # bf16 costs accuracy
BF16_FROM, COMPILE_FROM = 60.0, 600.0  # seconds of a job; shorter ones stay in fp32, or uncompiled


def choose_speed(
    config: PairConfig,
    device: torch.device,
    stored: StoreSpec | None = None,
    prompts: PromptList | None = None,
) -> PairConfig:
    """Replace `auto` in the settings `precision` and `compile` of a config.

    stored: the spec of an existing store, whose choice is kept. prompts: as in `open_job`. For a new store,
    evaluations of the network are timed, and the choice is logged. Raises UserError as `open_job` does.
    """
    if stored is not None:
        return resolve_auto(config, stored.precision, stored.compiled)
    if "auto" not in (config.precision, config.compile):
        return config
    # Start from fp32 without compilation, which is best for short jobs.
    best = resolve_auto(config, "fp32", False)
    seconds = fp32_seconds = _job_seconds(best, device, prompts)
    notes: list[str] = []
    # Try bf16 and then compilation, where the job is long enough to gain from them.
    if config.precision == "auto" and seconds >= BF16_FROM:
        in_bf16 = resolve_auto(config, "bf16", False)
        if (bf16_seconds := _job_seconds(in_bf16, device, prompts)) * BF16_GAIN < seconds:
            notes.append(f"bf16 is {seconds / bf16_seconds:.2f} times as fast as fp32")
            best, seconds = in_bf16, bf16_seconds
    if config.compile == "auto" and seconds >= COMPILE_FROM:
        compiled = replace(best, compile=True)
        if (compiled_seconds := _job_seconds(compiled, device, prompts)) * GAIN < seconds:
            notes.append(f"compilation is {seconds / compiled_seconds:.2f} times as fast")
            best, seconds = compiled, compiled_seconds
    logger.info(
        "precision=%s compile=%s for this store, about %.0f s of computing%s",
        *(best.precision, str(bool(best.compile)).lower(), seconds),
        f" (measured: {', '.join(notes)}; fp32 alone {fp32_seconds:.0f} s)" if notes else "",
    )
    return best


def _job_seconds(config: PairConfig, device: torch.device, prompts: PromptList | None) -> float:
    """Predict the seconds of this process's share of a job; infinite without enough memory or a compiler."""
    job = open_job(config, device, prompts=prompts)
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
    return row * solver_evaluations(job.spec) * job.spec.num_pairs / process_group.world_size()


def solver_evaluations(spec: StoreSpec) -> int:
    """How often the solver evaluates the guided network for a pair: Heun nearly twice per step."""
    return evaluations_per_sample(spec.steps, spec.solver, 1.0)


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
