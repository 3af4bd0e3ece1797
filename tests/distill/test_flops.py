"""distill.planning.flops: counted on fake tensors, in real training steps, and published.

tests/distill/test_fake_cuda.py compares it with steps at the size of SD 1.5.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiny_teachers
from benchmarks.scaling import row_flops, unet_flops
from benchmarks.training_step import RandomStep
from d2g.core.config import override
from d2g.diffusion.pretrained import new_unet
from distill.config.presets import DISTILL_PRESETS
from distill.planning.flops import count, flop_per_image
from distill.planning.reference_models import UNETS, configs_only

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


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", [*tiny_teachers.UNETS, *tiny_teachers.TRANSFORMERS, *tiny_teachers.STAGES])
def test_the_flop_of_every_family_are_counted(kind: str, tmp_path: Path) -> None:
    """Those of stage 2, in which the discriminator is trained too, are more."""
    teacher = tiny_teachers.save_kind(kind, tmp_path / "teacher")
    counts = []
    for stage in ("ode", "gan"):
        chosen = (*tiny_teachers.stage_settings(kind, stage), "regression.losses=mse:1")
        config = override(replace(DISTILL_PRESETS["trial"][stage], teacher=teacher), chosen)
        counts.append(flop_per_image(config))
    assert 0 < counts[0] < counts[1]


@pytest.mark.slow
def test_the_flop_of_sd15_are_the_published_ones() -> None:
    """A forward pass of the U-Net on a latent of 64 x 64 and 77 tokens: 0.80 TFLOP (401 GMAC).

    Counters of layers see no product of attention. BK-SDM (Kim et al. 2023) has 339 GMAC for SD 1.4, whose
    U-Net is the same, by such a counter, thop.
    """
    with FakeTensorMode(), torch.no_grad():
        unet = new_unet(**UNETS["sd15"])
        inputs = torch.empty(1, 4, 64, 64), 999, torch.empty(1, 77, 768)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            unet(*inputs)
    total = counter.get_total_flops()
    assert total == pytest.approx(0.80e12, rel=0.01)
    # Only attention multiplies batches of matrices.
    attention = sum(
        n for operator, n in counter.get_flop_counts()["Global"].items() if "bmm" in str(operator)
    )
    assert total - attention == pytest.approx(2 * 339e9, rel=0.01)
    assert total == unet_flops("sd15")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ode", "gan"])
@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=pytest.mark.long)])
def test_the_scaling_table_has_the_flop_of_the_mfu(kind: str, stage: str, tmp_path: Path) -> None:
    """Without R1 and recomputation. benchmarks/scaling.py takes multiples of the forward passes of the U-Net
    and the metric, distill/planning/flops.py counts every forward and backward pass.

    In stage 2 the table has 1 % less: it counts the backward pass of a frozen D as one forward pass, but that
    of attention, which has no weights, costs two.
    """
    recipe = DISTILL_PRESETS["sd15-cfg3" if kind == "sd15" else "sdxl-cfg7"]
    config = replace(recipe[stage], teacher=configs_only(recipe.model, tmp_path))
    config = override(config, ["gan.penalty=none", "engine.activation_checkpointing=false"])
    assert row_flops(config, kind, unet_flops(kind)) == pytest.approx(flop_per_image(config), rel=0.02)
