"""distill.planning.flops: counted on fake tensors, and counted in real training steps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.training_step import RandomStep
from d2g.core.config import override
from distill.config.presets import DISTILL_PRESETS
from distill.planning.flops import count, flop_per_image

SETTINGS = (
    *("train.precision=fp32", "train.batch_size=4"),
    *("regression.losses=latent_lpips:1", "lpips=full-width"),
)
"""No such folder: a LatentLPIPS of full width, which RandomStep has too."""


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("ode", ("student.lora_rank=2", "engine.gradient_accumulation=2")),
        pytest.param(
            "gan",
            ("gan.r1_interval=2", "gan.r1_rows=2", "gan.loss=rpgan", "engine.gradient_accumulation=2"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_real_steps_have_the_operations_that_fake_tensors_say(
    teacher: Path, stage: str, settings: tuple[str, ...], tmp_path: Path
) -> None:
    """All forward and backward passes of two steps, the first one with R1, to the last multiplication."""
    config = replace(DISTILL_PRESETS["trial"][stage], teacher=str(teacher))
    config = override(config, (*SETTINGS, *settings))
    step = RandomStep(config, torch.device("cpu"), tmp_path)
    steps = count(lambda: [step(at_once=True) for _ in range(2)])
    assert steps == 2 * config.train.batch_size * flop_per_image(config)
