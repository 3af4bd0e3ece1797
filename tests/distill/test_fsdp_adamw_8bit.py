"""Moments in 8 bits under FSDP2: two processes hold a shard each, and resume bit for bit."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from benchmarks.training_step import RandomStep
from d2g.core.config import override
from d2g.core.distributed import checkpoint, process_group, sharded_checkpoint
from d2g.core.distributed.engine import local_shard
from distill.config.presets import DISTILL_PRESETS
from jobs import environments

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    *("train.precision=fp32", "train.batch_size=4", "regression.losses=mse:1"),
    *("engine.parallel=fsdp", "optim.name=adamw_8bit", "optim.lr=1e-3"),
)


def states(step: RandomStep) -> dict[str, torch.Tensor]:
    """Weights and moments of the student, as DTensors."""
    module = step.state.student.module
    return {
        **sharded_checkpoint.network_tensors("student", module),
        **sharded_checkpoint.optimizer_tensors("optim", step.state.optim_g, module),
    }


def main(teacher: str, folder: Path) -> None:
    """Four steps; and two steps in new networks and optimizers from the checkpoint after two."""
    device = process_group.init()
    config = override(replace(DISTILL_PRESETS["trial"]["ode"], teacher=teacher), SETTINGS)
    unbroken = RandomStep(config, device, folder)
    for number in range(4):
        if number == 2:
            writer = sharded_checkpoint.Writer(folder / "checkpoints")
            unbroken.state.save(writer)
            writer.finish()
        unbroken(at_once=True)
    resumed = RandomStep(config, device, folder)
    last = checkpoint.latest(folder / "checkpoints")
    assert last is not None and last.nimg == 8 and last.meta["processes"] == 2
    resumed.state.load(last)
    for _ in range(2):
        resumed(at_once=True)
    once, twice = states(unbroken), states(resumed)
    assert once.keys() == twice.keys()
    assert all(torch.equal(local_shard(once[name]), local_shard(twice[name])) for name in once)

    # Every large moment has its codes in shards.
    codes = {name: value for name, value in once.items() if value.dtype == torch.uint8}
    assert codes and all(isinstance(value, DTensor) for value in codes.values())
    shares = sum(local_shard(value).numel() for value in codes.values()) / sum(
        value.numel() for value in codes.values()
    )
    assert 0.45 < shares < 0.55
    process_group.finish()


@pytest.mark.long
@pytest.mark.slow
def test_moments_of_8_bits_are_sharded_and_resume_bit_for_bit(teacher: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, __file__, str(teacher), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors[0]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
