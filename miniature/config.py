"""Settings of `d2g demo` and their presets."""

from dataclasses import dataclass, replace
from typing import Any

from d2g.core.config import Presets, require, setting
from distill.config.presets import DISTILL_PRESETS
from distill.config.run import DistillConfig
from pairgen.config import PAIR_PRESETS, PairConfig


def _with_train(stage: str, **settings: Any) -> DistillConfig:
    config = DISTILL_PRESETS["miniature"][stage]
    return replace(config, train=replace(config.train, **settings))


_PAIRS = replace(PAIR_PRESETS["miniature"], compile=False)
"""The precision is measured, except for a job of less than a minute, which stays in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Sizes of the demo. The stages are ordinary configs of pairgen and distill."""

    seed: int = setting(0, "Seed of everything random")
    pairs: PairConfig = setting(replace(_PAIRS, num_pairs=4_096), "Pair generation")
    ode: DistillConfig = setting(
        _with_train("ode", images=67_200, batch_size=32, ema_beta=0.99), "The regression stage"
    )
    gan: DistillConfig = setting(_with_train("gan", images=4_096), "The GAN stage")
    eval_images: int = setting(512, "Images of each evaluation")
    teacher_steps: int = setting(25, "Solver steps of the teacher's own samples: as many as of its pairs")
    columns: int = setting(8, "Images side by side in the report")

    def __post_init__(self) -> None:
        require(
            self,
            eval_images=(self.eval_images >= 2, "2 or more"),
            columns=(1 <= self.columns <= self.eval_images, f"1 to eval_images, {self.eval_images}"),
        )


EVALUATIONS_PER_SECOND = 900.0
"""Evaluations of the miniature's network on two CPU cores (docs/LOG.md, "two processes beat two threads")."""


def planned_seconds(config: DemoConfig) -> float:
    """About how long the demo computes on two CPU cores: to a factor of two, without its start."""
    # Guided steps take two evaluations; an image of stage 1 forward and backward; one of stage 2 about 12.
    evaluations = 2 * config.pairs.num_pairs * config.pairs.steps
    evaluations += 2 * config.eval_images * config.teacher_steps
    evaluations += 3 * config.ode.train.images + 12 * config.gan.train.images
    return evaluations / EVALUATIONS_PER_SECOND


def _short(config: DistillConfig, images: int) -> DistillConfig:
    return replace(
        config, train=replace(config.train, images=images, report_images=images // 4, batch_size=16)
    )


DEMO_PRESETS = Presets(
    {
        "default": ("Minutes on two CPU cores", DemoConfig()),
        "quick": (
            "A smoke run of half a minute; its numbers mean little",
            DemoConfig(
                pairs=replace(_PAIRS, num_pairs=64, steps=5, shard_size=32),
                ode=_short(DISTILL_PRESETS["miniature"]["ode"], 256),
                gan=_short(DISTILL_PRESETS["miniature"]["gan"], 128),
                eval_images=32,
                teacher_steps=10,
                columns=4,
            ),
        ),
    }
)
"""Presets of `d2g demo`."""
