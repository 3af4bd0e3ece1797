"""Cost of a run before it starts: steps, network evaluations, and how Table A1 of the paper counts them."""

from dataclasses import dataclass
from typing import Any

from distill.config.discriminator import DiscriminatorConfig
from distill.config.presets import TABLE_A1, Recipe
from distill.config.run import DistillConfig, TrainConfig, microbatch_size


@dataclass(frozen=True, kw_only=True)
class Published:
    """Facts of a column of Table A1 beside its settings: its pairs, and A100 GPU-days of both stages."""

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
"""Published facts by preset, for the presets that are columns of Table A1."""


PASSES = {"ode": 1, "cd": 4}
"""Network evaluations per row of the stages without a discriminator. cd: the student, its target, and two of
the teacher in a step of Heun."""


def pair_evaluations(solver: str, steps: int) -> int:
    """Network evaluations of a pair. Guidance, which doubles them, is not counted, as in Table A1.

    Heun's method needs no correction in its last step: 18 steps are 35 evaluations (method.md "Pair data
    sets").
    """
    return 2 * steps - 1 if solver == "heun" else steps


def table_evaluations(config: DistillConfig) -> int:
    """Network evaluations of a run as the paper counts them: 1 per row in stage 1, 5 per row in stage 2, 4
    per row of consistency distillation (supplement A.2).

    Stage 2 has G, D(real) and D(fake) in the update of D, and G and D(fake) in the update of G (method.md
    "Mix-and-match augmentation").
    """
    images = config.train.images
    if not config.adversarial:
        return images * PASSES[config.stage]
    return images * 3 + 2 * (images // config.gan.d_steps_per_g_step)


def evaluations(config: DistillConfig) -> int:
    """Network evaluations that this run performs, in whole steps.

    One generator pass serves both updates unless gradients are accumulated. The relativistic loss and the
    penalties add passes of their own.
    """
    size = config.train.batch_size
    steps = _steps(config.train)
    if not config.adversarial:
        return steps * size * PASSES[config.stage]
    gan = config.gan
    student_steps = steps // gan.d_steps_per_g_step
    reused = config.engine.gradient_accumulation == 1 and not config.engine.own_generator_passes
    second_generator_pass = 0 if reused else student_steps
    real_logits_pass = student_steps if gan.loss == "rpgan" else 0
    passes = 3 * steps + student_steps + second_generator_pass + real_logits_pass
    penalties = -(-steps // gan.penalty_interval)  # the first step has one
    return size * passes + penalties * _penalty_rows(gan, size)


def _penalty_rows(gan: DiscriminatorConfig, size: int) -> int:
    """Rows that pass through D for one gradient penalty."""
    return {"none": 0, "single": gan.r1_rows, "approx": size, "full": size, "r1r2": 2 * size}[
        gan.active_penalty
    ]


def _steps(train: TrainConfig) -> int:
    """Training steps, the last one rounded up."""
    return -(-train.images // train.batch_size)


def plan(config: DistillConfig, preset: str = "", world_size: int = 1) -> dict[str, Any]:
    """Steps, evaluations, GPUs and rows per GPU for --dry-run.

    For a preset that is a column of Table A1, `table_a1` holds the sums of that column. The batch is divided
    over `engine.gpus` GPUs, or over `world_size` processes if that is 0. Raises SettingError for a batch that
    does not divide evenly.
    """
    gpus = config.engine.gpus or world_size
    facts: dict[str, Any] = {
        "steps": _steps(config.train),
        "evaluations": evaluations(config),
        "gpus": gpus,
        "rows_per_gpu": microbatch_size(config, gpus),
    }
    return facts | ({"table_a1": column(preset)} if preset in PUBLISHED else {})


def column(name: str) -> dict[str, float]:
    """Sums of a column of Table A1, computed from its preset.

    Evaluations of the pairs, of each stage and in total; GPUs and GPU-days; and the mean seconds per step
    over both stages that these imply.
    """
    stages, paper = TABLE_A1[name], PUBLISHED[name]
    sums = recipe_evaluations(stages, paper.pairs, pair_evaluations(paper.solver, paper.steps))
    gpus = stages["ode"].engine.gpus
    steps = sum(c.train.images // c.train.batch_size for c in stages.values())
    seconds = paper.gpu_days * 86_400 / gpus / steps
    return {**sums, "gpus": gpus, "gpu_days": paper.gpu_days, "seconds_per_step": seconds}


def recipe_evaluations(stages: Recipe, pairs: int, evaluations_per_pair: int) -> dict[str, int]:
    """Network evaluations of both stages as Table A1 counts them: `pairs`, each stage, and `total`."""
    sums = {"pairs": pairs * evaluations_per_pair}
    sums |= {stage: table_evaluations(config) for stage, config in stages.items()}
    return {**sums, "total": sum(sums.values())}
