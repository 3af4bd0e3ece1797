"""What a run costs before it starts: steps and network evaluations, as Table A1 counts them and as run."""

from dataclasses import dataclass
from typing import Any

from distill.config.components import DiscriminatorConfig
from distill.config.presets import TABLE_A1, Recipe
from distill.config.run import DistillConfig, microbatch_size


@dataclass(frozen=True, kw_only=True)
class Published:
    """What Table A1 says of a recipe beside its settings: its pairs, and what all of it took on A100s."""

    pairs: int
    solver: str
    steps: int
    gpu_days: float


PUBLISHED = {
    "cifar10": Published(pairs=1_000_000, solver="heun", steps=18, gpu_days=6.0),
    "sd15-cfg3": Published(pairs=3_000_000, solver="ddim", steps=50, gpu_days=43.6),
    "sd15-cfg8": Published(pairs=12_000_000, solver="ddim", steps=50, gpu_days=119.2),
    "sdxl-cfg7": Published(pairs=8_000_000, solver="ddim", steps=50, gpu_days=356.8),
}
"""Of the presets that are columns of Table A1, by name."""


def pair_evaluations(solver: str, steps: int) -> int:
    """Network evaluations of a pair. Guidance, which doubles them, is not counted, as in Table A1 (method.md
    "Pair data sets"). Heun saves its last correction: 18 steps are 35.
    """
    return 2 * steps - 1 if solver == "heun" else steps


def table_evaluations(config: DistillConfig) -> int:
    """Network evaluations of a run as Table A1 counts them: 1 a sample in stage 1, 5 in stage 2, where D's
    update is G, D(real), D(fake) and G's is G, D(fake) (method.md "Mix-and-match augmentation").
    """
    images = config.train.images
    return images if config.stage == "ode" else images * 3 + 2 * (images // config.gan.d_steps_per_g_step)


def evaluations(config: DistillConfig) -> int:
    """Forward passes of a row that this run does, in whole steps: G's one serves both updates, where a step
    has no micro-batches, and losses and penalties have passes of their own.
    """
    size = config.train.batch_size
    steps = _steps(config)
    if config.stage == "ode":
        return steps * size
    gan = config.gan
    student_steps = steps // gan.d_steps_per_g_step
    again = 0 if config.engine.gradient_accumulation == 1 else student_steps
    rival = student_steps if gan.loss == "rpgan" else 0
    penalties = -(-steps // gan.penalty_interval)  # the first step has one
    return size * (3 * steps + again + student_steps + rival) + penalties * _penalty_rows(gan, size)


def _penalty_rows(gan: DiscriminatorConfig, size: int) -> int:
    """Rows that pass through D for one penalty."""
    return {"none": 0, "single": gan.r1_rows, "approx": size, "full": size, "r1r2": 2 * size}[
        gan.active_penalty
    ]


def _steps(config: DistillConfig) -> int:
    return -(-config.train.images // config.train.batch_size)


def plan(config: DistillConfig, preset: str = "", world_size: int = 1) -> dict[str, Any]:
    """Steps, evaluations and rows for --dry-run; of a preset that is a column of Table A1, the column's sums.

    The rows of a process are those on `engine.gpus` GPUs, or on `world_size` processes where that is 0.
    Raises SettingError for a batch that does not divide over them.
    """
    gpus = config.engine.gpus or world_size
    found: dict[str, Any] = {
        "steps": _steps(config),
        "evaluations": evaluations(config),
        "gpus": gpus,
        "rows_per_gpu": microbatch_size(config, gpus),
    }
    return found | ({"table_a1": column(preset)} if preset in PUBLISHED else {})


def column(name: str) -> dict[str, float]:
    """The sums of a column of Table A1 from its preset: evaluations of pairs, of each stage, and in all; GPUs
    and their days; and the seconds a step that these imply, over both stages.
    """
    stages, paper = TABLE_A1[name], PUBLISHED[name]
    sums = recipe(stages, paper.pairs, pair_evaluations(paper.solver, paper.steps))
    gpus = stages["ode"].engine.gpus
    steps = sum(c.train.images // c.train.batch_size for c in stages.values())
    seconds = paper.gpu_days * 86_400 / gpus / steps
    return {**sums, "gpus": gpus, "gpu_days": paper.gpu_days, "seconds_per_step": seconds}


def recipe(stages: Recipe, pairs: int, evaluations_per_pair: int) -> dict[str, int]:
    """Evaluations of a whole recipe as Table A1 counts them: `pairs`, each stage by name, and `total`."""
    sums = {"pairs": pairs * evaluations_per_pair}
    sums |= {stage: table_evaluations(config) for stage, config in stages.items()}
    return {**sums, "total": sum(sums.values())}
