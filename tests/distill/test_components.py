"""Every option of the GAN stage in real training: it changes the weights and resumes exactly."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2g.core.distributed import checkpoint
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion.pretrained import load_unet
from distill.training.state import new_state
from distill.training.train import train
from jobs import BATCH, distill_config

STEPS = 3
COMMON = (
    f"train.images={STEPS * BATCH}",
    "gan.r1_interval=2",
    "gan.r1_gamma=1",
    "gan.mix_fraction=0.5",
    "gan.optim.lr=1e-3",
    "optim.lr=1e-3",
)
OPTIONS = (
    "gan.loss=hinge",
    "gan.loss=rpgan",
    "gan.penalty=full",
    "gan.penalty=r1r2",
    "gan.penalty=approx",
    "gan.penalty=none",
    "gan.r1_reduction=sum",
    "gan.head_reduction=sum",
    "gan.timestep_mode=random",
    "gan.timestep=500",
    "gan.noise_augment=small",
    "gan.z_conditioning=false gan.mix_z=0",
    "gan.multi_scale_input=false",
    "gan.multi_scale_output=false",
    "gan.output_head=true",
    "gan.adaptive_weight=true",
    "regression.losses=[]",
    "init=teacher",
    "gan.freeze_backbone=true",
    "gan.mix_c=0",
    "gan.d_steps_per_g_step=2",
)
OFTEN = ("gan.loss=rpgan", "gan.penalty=r1r2", "gan.penalty=approx", "regression.losses=[]", *OPTIONS[-2:])
"""Options that are tested with every change; the others belong to the long tests."""


@pytest.fixture(scope="module")
def ode(teacher: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ode")
    train(distill_config(teacher, pairs, f"train.images={BATCH}"), out)
    return out


@pytest.fixture(scope="module")
def plain(teacher: Path, pairs: Path, ode: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain")
    train(distill_config(teacher, pairs, *COMMON, stage="gan", init=ode), out)
    return out


def ema_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{STEPS * BATCH:09d}" / "ema.safetensors")


def reports(run: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "mem/"))} for line in read_stats(run)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.long) for name in OPTIONS]
)
def test_option_changes_training_and_resumes_exactly(
    option: str, teacher: Path, pairs: Path, ode: Path, plain: Path, tmp_path: Path
) -> None:
    # The step after the first checkpoint has R1; with two steps of D per step of G, the one after it has G.
    first = BATCH if "d_steps" in option else 2 * BATCH
    sets = (f"train.checkpoint_images={first}", "train.keep_checkpoints=3")
    settings = (*COMMON, *sets, *option.split())
    config = distill_config(teacher, pairs, *settings, stage="gan", init=ode)
    train(config, tmp_path / "unbroken")
    # The other run goes on from the first checkpoint, as after a kill.
    shutil.copytree(tmp_path / "unbroken", tmp_path / "resumed")
    for later in checkpoint.complete_points(tmp_path / "resumed" / "checkpoints")[1:]:
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"{later:09d}")
    train(config, tmp_path / "resumed")
    unbroken, resumed = ema_weights(tmp_path / "unbroken"), ema_weights(tmp_path / "resumed")
    assert all(torch.equal(unbroken[name], value) for name, value in resumed.items())
    assert reports(tmp_path / "unbroken") == reports(tmp_path / "resumed")
    assert any(not torch.equal(unbroken[name], value) for name, value in ema_weights(plain).items())


def test_a_gan_without_regression_starts_from_the_teacher(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    """Adversarial training without a regression loss (as ADM)."""
    config = distill_config(teacher, pairs, "regression.losses=[]", stage="gan", init="teacher")
    student = new_state(config, torch.device("cpu")).student.module.unet.state_dict()
    weights = load_unet(str(teacher)).state_dict()
    assert all(torch.equal(student[name], value) for name, value in weights.items())
    train(config, tmp_path)
    assert {"loss/g_gan", "loss/d"} <= reports(tmp_path)[-1].keys() >= {"loss/g"}
    assert not [name for name in reports(tmp_path)[-1] if "lpips" in name]
