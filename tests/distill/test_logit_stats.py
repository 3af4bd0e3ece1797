"""distill.training.logit_stats: what a report says of the networks, in closed form, and the same of a batch
however it is shared out.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2g.core.tracking.run_directory import read_stats
from distill.config.run import DistillConfig
from distill.training.logit_stats import LogitStats, auc, logit_report, spread
from distill.training.microbatch import MicroBatch
from distill.training.train import train
from jobs import d2g, d2g_ranks, distill_arguments, distill_config, make_pairs

values = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=9)


def test_logits_by_kind_and_head() -> None:
    said = {
        "real": torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 4.0]]),
        "fake": torch.tensor([[0.0, 0.0], [4.0, 2.0], [-2.0, 0.0]]),
    }
    plain, student = torch.tensor([True, False, True]), {"student": torch.tensor([[1.0, 2.0]])}
    report = logit_report(said, ["0_before", "1_after"], plain)
    assert report == {
        "logit/real": 2.0, "logit/real/0_before": 2.0, "logit/real/1_after": 2.0,
        "logit/fake": -0.5, "logit/fake/0_before": -1.0, "logit/fake/1_after": 0.0,
        "logit/mismatched": 3.0, "logit/mismatched/0_before": 4.0, "logit/mismatched/1_after": 2.0,
        "d/auc": 1.0,
    }  # fmt: skip
    more = logit_report(said | student, ["0_before", "1_after"], plain)
    assert more == report | {"logit/student": 1.5, "logit/student/0_before": 1, "logit/student/1_after": 2}
    alone = logit_report(said, ["0_before", "1_after"], torch.ones(3, dtype=torch.bool))
    assert not any("mismatched" in name for name in alone) and "d/auc" in alone
    mixed = logit_report(said, ["0_before", "1_after"], torch.zeros(3, dtype=torch.bool))
    assert (
        "d/auc" not in mixed
        and "logit/fake" not in mixed
        and mixed["logit/mismatched"] == pytest.approx(2 / 3)
    )


@given(values, values)
def test_auc_is_the_share_of_ordered_pairs(a: list[float], b: list[float]) -> None:
    share = sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b))
    assert float(auc(torch.tensor(a), torch.tensor(b))) == pytest.approx(share, abs=1e-6)


def test_spread_is_one_for_the_teacher_and_nought_for_one_image() -> None:
    teacher = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    student = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert spread([teacher], [teacher]) == pytest.approx(1)
    assert spread([0.5 * teacher + 3], [teacher]) == pytest.approx(0.25)
    assert 0 <= spread([teacher[:1].expand(16, -1, -1, -1)], [teacher]) < 1e-12
    plain = float(student.var(0).mean() / teacher.var(0).mean())
    for rows in (16, 4, 1):
        assert spread(student.split(rows), teacher.split(rows)) == pytest.approx(plain, rel=1e-5)


def test_what_was_said_of_micro_batches_is_of_all_their_rows() -> None:
    """Two heads of two sizes; what is said again of a micro-batch stands for what was said before."""
    g = torch.Generator().manual_seed(0)
    fake, real, *said = (torch.randn(6, 1, 4, 4, generator=g) for _ in range(5))
    mode = torch.tensor([0, 1, 0, 0, 3, 0])
    stats, micros = LogitStats(), []
    for number, rows in enumerate((slice(0, 2), slice(2, 4), slice(4, 6))):
        blank = torch.zeros(2, 1, 4, 4)
        micro = MicroBatch(
            prompts=["", ""], noise=blank, target=real[rows], cond=blank, guidance=(), transforms=None,
            rows=range(2), dropout_keys=None, mix_mode=mode[rows], mix_partner=torch.arange(2), t=None,
            augment_noise=(None, None), r1_noise=None,
        )  # fmt: skip
        micro.generated = fake[rows].clone().requires_grad_()
        micros.append(micro)
        stats.add(number, **{kind: {"a": blank, "b": blank} for kind in ("real", "fake", "student")})
        for kind, of in zip(("real", "fake", "student"), said, strict=True):
            stats.add(number, **{kind: {"a": of[rows].requires_grad_(), "b": of[rows, :, :2, :2]}})
    means = [torch.stack([x.mean((1, 2, 3)), x[:, :, :2, :2].mean((1, 2, 3))], 1) for x in said]
    expected = logit_report(dict(zip(("real", "fake", "student"), means, strict=True)), ["a", "b"], mode == 0)
    expected["latent/spread"] = float(fake.var(0).mean() / real.var(0).mean())
    expected["latent/contrast"] = float((fake.std((0, 2, 3), False) / real.std((0, 2, 3), False)).mean())
    shift = (fake.mean((0, 2, 3)) - real.mean((0, 2, 3))).abs() / real.std((0, 2, 3), False)
    expected["latent/color"] = float(shift.max())
    assert stats.report(micros) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert set(LogitStats().report(micros)) == {f"latent/{x}" for x in ("spread", "contrast", "color")}


# Of the whole batch, in real training.

KINDS = ("logit/", "d/auc", "latent/")
WHOLE = ("train.batch_size=12", "train.images=36", "train.report_images=12", "gan.mix_fraction=0.4")
PAIR = ("train.batch_size=2", "train.images=6", "train.report_images=2", "gan.mix_fraction=0")
STEPS = ("gan.penalty=none", "gan.d_steps_per_g_step=2", "gan.optim.lr=1e-5")


@pytest.fixture(scope="module")
def config(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    """A second stage."""
    folder = tmp_path_factory.mktemp("first")
    pairs = make_pairs(teacher, folder)
    train(distill_config(teacher, pairs, "train.images=8"), folder / "ode")
    return distill_config(teacher, pairs, stage="gan", init=folder / "ode")


@pytest.fixture(scope="module")
def alone(config: DistillConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """Three steps of one process, without micro-batches."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {WHOLE: folder / "whole", PAIR: folder / "pair"}
    for batch, out in runs.items():
        done = d2g(distill_arguments(config, out, *batch, *STEPS), folder / "log")
        assert done.code == 0, done.stderr
    return runs


def health(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k.startswith(KINDS)} for line in read_stats(run)]


CASES = {
    "accumulate 2": (WHOLE, 1, "engine.gradient_accumulation=2"),
    "accumulate 3": (WHOLE, 1, "engine.gradient_accumulation=3"),
    "two ranks, three each": (WHOLE, 2, "engine.gradient_accumulation=3"),
    "two ranks of FSDP2": (WHOLE, 2, "engine.parallel=fsdp"),
    "one row a process": (PAIR, 2, "engine.parallel=ddp"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_report_is_of_the_whole_batch(
    case: str, config: DistillConfig, alone: dict[tuple[str, ...], Path], tmp_path: Path
) -> None:
    batch, ranks, setting = CASES[case]
    arguments = distill_arguments(config, tmp_path / "run", *batch, *STEPS, setting)
    ended = d2g_ranks(arguments, tmp_path / "log", ranks) if ranks > 1 else [d2g(arguments, tmp_path / "log")]
    assert all(each.code == 0 for each in ended), ended[0].stderr
    health_of_run, expected = health(tmp_path / "run"), health(alone[batch])
    assert len(health_of_run) == len(expected) == 3
    for a, b in zip(health_of_run, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert all("latent/spread" in line and "d/auc" in line for line in health_of_run)


def test_the_student_s_logits_are_the_last_that_are_known(alone: dict[tuple[str, ...], Path]) -> None:
    """Of two steps of D one moves the student: what D said of it stands until the next."""
    for run in alone.values():
        begun, moved, stood = (
            {k: v for k, v in line.items() if k.startswith("logit/student")} for line in health(run)
        )
        assert not begun and moved and stood == moved
