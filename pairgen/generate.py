"""Teacher -> stored (noise, latent, prompt, index): the loop, and the plan printed before it."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from core import dist, pretrained
from core.errors import Interrupted, SettingError, UserError
from core.progress import Progress, quiet
from core.schedule import timesteps
from core.seeds import noise
from core.stop import StopFlag
from pairgen.config import PairConfig
from pairgen.layout import StoreSpec, create_store, pending, read_spec, shards_present
from pairgen.prompts import prompts_sha256, read_prompts
from pairgen.sample import evaluations
from pairgen.store import PairReader
from pairgen.teacher import Teacher, load_teacher
from pairgen.writer import PairWriter


@dataclass(frozen=True, kw_only=True)
class PairSummary:
    """What `generate_pairs` left in the folder. `new_pairs`: made by this call, over all ranks of it."""

    out: str
    pairs: int
    new_pairs: int
    shards: int
    seconds: float
    pairs_per_sec: float


def resolve_spec(config: PairConfig, teacher: Teacher, prompts: list[str]) -> StoreSpec:
    """The store's spec: everything that decides its rows, with the settings left to the teacher filled in."""
    channels, height, width = teacher.latent_shape
    if config.latent_size:
        height = width = config.latent_size
    return StoreSpec(
        teacher=config.teacher,
        teacher_sha256=pretrained.weights_sha256(config.teacher),
        prompts_sha256=prompts_sha256(prompts),
        num_pairs=config.num_pairs or len(prompts) * config.per_prompt,
        num_prompts=len(prompts),
        per_prompt=config.per_prompt,
        solver=config.solver,
        steps=config.steps,
        spacing=teacher.schedule.spacing,
        final_alpha_one=teacher.schedule.final_alpha_one,
        guidance=config.guidance,
        seed=config.seed,
        dtype=config.dtype,
        latent_shape=(channels, height, width),
        latent_space=teacher.space,
        noise=config.noise,
        shard_size=config.shard_size,
    )


def open_job(config: PairConfig, device: torch.device | str = "cpu") -> tuple[Teacher, list[str], StoreSpec]:
    """Load what a job needs, and check it, before anything is written."""
    for name in ("teacher", "prompts"):
        if not getattr(config, name):
            raise SettingError(f"{name} is not set; give --{name}")
    prompts = read_prompts(Path(config.prompts))
    teacher = load_teacher(config.teacher, device, config.precision, config.spacing, config.final_alpha)
    schedule = (
        teacher.schedule
    )  # its timesteps are checked here too: a spec of impossible steps is never stored
    timesteps(len(schedule), config.steps, schedule.spacing, schedule.steps_offset)
    return teacher, prompts, resolve_spec(config, teacher, prompts)


def make_rows(
    teacher: Teacher, spec: StoreSpec, prompts: list[str], indices: list[int]
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Rows `indices` of the store: noise and latent fp32 [B, C, h, w], and their prompts.

    The noise is rounded to the stored type before the teacher sees it, so that the file holds what it was
    given.
    """
    texts = [prompts[spec.prompt_of(index)] for index in indices]
    drawn = noise(spec.seed, indices, spec.latent_shape, spec.torch_dtype).float()
    latents = teacher.sample(drawn, texts, spec.steps, spec.guidance, spec.solver)  # type: ignore[arg-type]
    return drawn, latents.cpu(), texts


def generate_pairs(config: PairConfig, out: Path, progress: Progress = quiet) -> PairSummary:
    """Make every row that the store does not hold yet, each rank its own shards. Run again to resume.

    Raises UserError for bad input or a folder of another spec, Interrupted on Ctrl-C with all finished rows
    safe, FloatingPointError when the teacher's latents are not finite.
    """
    started = time.monotonic()
    device = dist.init()
    teacher, prompts, spec = open_job(config, device)
    if dist.rank() == 0:
        create_store(out, spec)
    dist.barrier()
    todo = pending(out, spec)
    before = spec.num_pairs - sum(map(len, todo))
    dist.barrier()  # every rank has listed the work before one adds to the folder
    mine = todo[dist.rank() :: dist.world_size()]
    made, recovered, total = 0, 0, sum(map(len, mine))
    with StopFlag() as stop:
        for rows in mine:
            with PairWriter(out, spec, rows[0] // spec.shard_size) as writer:
                missing = writer.missing
                recovered += len(rows) - len(missing)
                made += len(rows) - len(missing)
                for start in range(0, len(missing), config.batch_size):
                    indices = missing[start : start + config.batch_size]
                    drawn, latents, texts = make_rows(teacher, spec, prompts, indices)
                    writer.append(drawn, latents, texts, torch.tensor(indices))
                    made += len(indices)
                    progress("pairs", made, total)
                    if stop:
                        break
                if not writer.missing:
                    writer.commit()
            if stop:
                raise Interrupted(
                    f"stopped; {before + made} of {spec.num_pairs} pairs are safe in {out}; "
                    "run the same command again to make the rest"
                )
    seconds = time.monotonic() - started
    new = round(dist.mean({"new": float(made - recovered)})["new"] * dist.world_size())  # waits for all ranks
    pairs = len(PairReader(out))
    return PairSummary(
        out=str(out),
        pairs=pairs,
        new_pairs=new,
        shards=len(shards_present(out, spec)),
        seconds=seconds,
        pairs_per_sec=new / seconds,
    )


def regenerate(folder: Path, prompts: Path, progress: Progress = quiet) -> int:
    """Make the rows that a store lacks, with the settings in its own spec; returns how many were made.

    Raises UserError when teacher or prompts are not those the store was made with.
    """
    spec = read_spec(folder)
    config = PairConfig(
        teacher=spec.teacher,
        prompts=str(prompts),
        num_pairs=spec.num_pairs,
        per_prompt=spec.per_prompt,
        solver=spec.solver,  # type: ignore[arg-type]  # a spec's words were a config's once
        steps=spec.steps,
        spacing=spec.spacing,  # type: ignore[arg-type]
        final_alpha="one" if spec.final_alpha_one else "teacher",
        guidance=spec.guidance,
        seed=spec.seed,
        dtype=spec.dtype,
        noise=spec.noise,
        shard_size=spec.shard_size,
        latent_size=spec.latent_shape[1],
    )
    return generate_pairs(config, folder, progress).new_pairs


def plan_pairs(config: PairConfig, batches: int = 2) -> dict[str, Any]:
    """Time a few batches here and extrapolate: GPU-hours, GiB and shards, before anything is spent."""
    device = dist.init()
    teacher, prompts, spec = open_job(config, device)
    make_rows(teacher, spec, prompts, list(range(config.batch_size)))  # warm-up
    started = time.monotonic()
    for batch in range(batches):
        first = batch * config.batch_size
        make_rows(teacher, spec, prompts, list(range(first, first + config.batch_size)))
    seconds = (time.monotonic() - started) / (batches * config.batch_size)
    channels, height, width = spec.latent_shape
    gib = spec.num_pairs * channels * height * width * spec.torch_dtype.itemsize / 2**30
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    return {
        "pairs": spec.num_pairs,
        "gib": gib,
        "gib_with_noise": 2 * gib,
        "shards": spec.num_shards,
        "evaluations_per_pair": evaluations(spec.steps, config.solver, spec.guidance),
        "seconds_per_pair": seconds,
        "gpu_hours": seconds * spec.num_pairs / 3600,
        "measured_on": name,
    }


def resimulate(folder: Path, count: int, teacher_name: str | None = None) -> float:
    """Send `count` stored rows, evenly spread, through the teacher again; returns the largest absolute
    difference.

    Raises UserError when the teacher's weights are not those the store was made with.
    """
    reader = PairReader(folder)
    spec, name = reader.spec, teacher_name or reader.spec.teacher
    found = pretrained.weights_sha256(name)
    if found != spec.teacher_sha256:
        raise UserError(
            f"teacher {name} has sha256 {found[:12]}, {folder} was made with {spec.teacher_sha256[:12]}; "
            "give --teacher the folder it was made with"
        )
    teacher = load_teacher(name, dist.init(), spacing=spec.spacing)  # type: ignore[arg-type]
    teacher = replace(teacher, schedule=replace(teacher.schedule, final_alpha_one=spec.final_alpha_one))
    rows = sorted({round(i * (len(reader) - 1) / max(1, count - 1)) for i in range(count)})
    batch = reader.read(rows)
    latents = teacher.sample(batch.noise, batch.prompts, spec.steps, spec.guidance, spec.solver)  # type: ignore[arg-type]
    return float((latents.cpu() - batch.latent).abs().max())
