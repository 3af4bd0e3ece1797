"""distill.training.finite_check: a loss or gradient that is not finite reaches no weight; the run stops."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from d2g.core.config import override
from d2g.core.distributed import checkpoint, sharded_checkpoint
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion.pretrained import teacher_digests
from distill.config.run import DistillConfig
from distill.training import train as run_module
from distill.training.data import open_pairs, pair_batches
from distill.training.state import State
from distill.training.train import train
from jobs import d2g_ranks, distill_arguments, distill_config, succeed


def pair_numbers(config: DistillConfig, step: int) -> list[int]:
    """The pairs of a step of batch 4."""
    reader = open_pairs(config.pairs, teacher_digests(config.teacher))
    batch = next(islice(pair_batches(reader, 4, config.seed, 0, 0), step, None))
    return [int(number) for number in batch.index]


def set_latent(store: Path, number: int, value: float) -> None:
    """Set a latent value of a pair, past the checksums."""
    for file in store.rglob("*.h5"):
        with h5py.File(file, "r+") as shard:
            for row in (shard["index"][:] == number).nonzero()[0]:
                shard["latent"][row, 0, 0, 0] = value


@pytest.mark.parametrize("stage", ["ode", "gan"])
def test_the_step_after_a_bad_one_changes_nothing(
    stage: Any, teacher: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host learns of a bad step one step later; until then, all updates are switched off."""
    sets = ("train.report_images=1000", "gan.mix_fraction=0", "gan.r1_interval=1")
    init = "teacher" if stage == "gan" else ""
    config = distill_config(teacher, pairs, *sets, stage=stage, init=init)
    train(override(config, ["train.images=4"]), tmp_path / "good")
    bad_step = pair_numbers(config, 1)
    shutil.copytree(pairs, tmp_path / "pairs")
    set_latent(tmp_path / "pairs", bad_step[2], float("nan"))

    states: list[State] = []
    new_state = run_module.new_state

    def remember(*arguments: Any, **settings: Any) -> State:
        states.append(new_state(*arguments, **settings))
        return states[-1]

    monkeypatch.setattr(run_module, "new_state", remember)
    with pytest.raises(FloatingPointError, match=rf"pair {bad_step[2]} of .* training stopped at image 4"):
        train(replace(config, pairs=str(tmp_path / "pairs")), tmp_path / "bad")

    # The report is about the bad step, and one more step was taken.
    report = json.loads((tmp_path / "bad" / "failure" / "rank-0.json").read_text())
    assert (report["step"], report["images"], report["pairs"]) == (1, 4, bad_step)
    assert "nan" in report["losses"].values() and report["norm"] == "nan"
    (state,) = states
    assert (state.steps, state.nimg) == (3, 12) and not read_stats(tmp_path / "bad")

    # Weights and optimizers have every bit of the step before.
    last = checkpoint.latest(tmp_path / "good" / "checkpoints")
    assert last is not None
    tensors = sharded_checkpoint.network_tensors("student", state.student.module)
    tensors |= sharded_checkpoint.optimizer_tensors("optim.student", state.optim_g, state.student.module)
    if state.discriminator is not None and state.optim_d is not None:
        d = state.discriminator.module
        tensors |= sharded_checkpoint.network_tensors("discriminator", d)
        tensors |= sharded_checkpoint.optimizer_tensors("optim.discriminator", state.optim_d, d)
    saved = sharded_checkpoint.read(last)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in saved)


def test_a_loss_that_is_not_finite_stops_a_run_whose_gradient_is_finite(
    teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    # c^2 overflows in fp32: the loss is infinite, and its gradient d / sqrt(d^2 + c^2) is zero.
    settings = ("regression.losses=pseudo_huber:1", "regression.huber_c=1e20")
    with pytest.raises(
        FloatingPointError, match=r"loss/.* is (inf|nan) at image 0; no checkpoint was written"
    ):
        train(distill_config(teacher, pairs, *settings), tmp_path)
    report = json.loads((tmp_path / "failure" / "rank-0.json").read_text())
    assert report["norm"] == "nan" and report["losses"]["loss/g"] in ("inf", "nan")
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_loss_that_is_infinite_on_one_rank_stops_both(
    parallel: str, teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    config = distill_config(teacher, pairs, "regression.losses=mse:1", f"engine.parallel={parallel}")
    store = tmp_path / "pairs"
    shutil.copytree(pairs, store)
    set_latent(store, pair_numbers(config, 0)[3], float("inf"))
    ranks = d2g_ranks(
        distill_arguments(replace(config, pairs=str(store)), tmp_path / "run"), tmp_path / "log"
    )
    assert [ended.code for ended in ranks] == [1, 1]
    reports = [
        json.loads((tmp_path / "run" / "failure" / f"rank-{rank}.json").read_text()) for rank in (0, 1)
    ]
    assert [report["norm"] for report in reports] == ["nan", "nan"]
    assert [isinstance(report["losses"]["loss/g"], str) for report in reports] == [False, True]
    assert not read_stats(tmp_path / "run")


@pytest.mark.slow
def test_ranks_exchange_their_flags_in_the_background(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    """Between reports, a time limit stops both ranks at the same image."""
    config = distill_config(teacher, pairs, "train.report_images=100000", "train.images=400000")
    sets = ("train.minutes=0.05",)
    succeed(*d2g_ranks(distill_arguments(config, tmp_path / "run", *sets), tmp_path / "log"))
    lines = read_stats(tmp_path / "run")
    assert len(lines) == 1 and checkpoint.latest(tmp_path / "run" / "checkpoints") is not None
