"""distill.training.logit_stats: closed forms; independence of ranks and micro-batches."""

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
from jobs import d2g, d2g_ranks, distill_arguments, distill_config, make_pairs, succeed

values = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=9)


def test_logits_by_kind_and_head() -> None:
    logits = {
        "real": torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 4.0]]),
        "fake": torch.tensor([[0.0, 0.0], [4.0, 2.0], [-2.0, 0.0]]),
    }
    plain, student = torch.tensor([True, False, True]), {"student": torch.tensor([[1.0, 2.0]])}
    report = logit_report(logits, ["0_before", "1_after"], plain)
    assert report == {
        "logit/real": 2.0, "logit/real/0_before": 2.0, "logit/real/1_after": 2.0,
        "logit/fake": -0.5, "logit/fake/0_before": -1.0, "logit/fake/1_after": 0.0,
        "logit/mismatched": 3.0, "logit/mismatched/0_before": 4.0, "logit/mismatched/1_after": 2.0,
        "d/auc": 1.0,
    }  # fmt: skip
    more = logit_report(logits | student, ["0_before", "1_after"], plain)
    assert more == report | {"logit/student": 1.5, "logit/student/0_before": 1, "logit/student/1_after": 2}
    without_mismatches = logit_report(logits, ["0_before", "1_after"], torch.ones(3, dtype=torch.bool))
    assert not any("mismatched" in name for name in without_mismatches) and "d/auc" in without_mismatches
    only_mismatches = logit_report(logits, ["0_before", "1_after"], torch.zeros(3, dtype=torch.bool))
    assert (
        "d/auc" not in only_mismatches
        and "logit/fake" not in only_mismatches
        and only_mismatches["logit/mismatched"] == pytest.approx(2 / 3)
    )


@given(values, values)
def test_auc_is_the_fraction_of_ordered_pairs(a: list[float], b: list[float]) -> None:
    fraction = sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b))
    assert float(auc(torch.tensor(a), torch.tensor(b))) == pytest.approx(fraction, abs=1e-6)


def test_spread_is_one_for_the_teacher_and_zero_for_one_image() -> None:
    teacher = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    student = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert spread([teacher], [teacher]) == pytest.approx(1)
    assert spread([0.5 * teacher + 3], [teacher]) == pytest.approx(0.25)
    assert 0 <= spread([teacher[:1].expand(16, -1, -1, -1)], [teacher]) < 1e-12
    plain = float(student.var(0).mean() / teacher.var(0).mean())
    for rows in (16, 4, 1):
        assert spread(student.split(rows), teacher.split(rows)) == pytest.approx(plain, rel=1e-5)


def test_logit_statistics_cover_all_microbatches() -> None:
    """Two heads of different sizes. Adding a micro-batch again replaces its earlier logits."""
    g = torch.Generator().manual_seed(0)
    fake, real, *logits = (torch.randn(6, 1, 4, 4, generator=g) for _ in range(5))
    mode = torch.tensor([0, 1, 0, 0, 3, 0])
    stats, microbatches = LogitStats(), []
    for number, rows in enumerate((slice(0, 2), slice(2, 4), slice(4, 6))):
        zeros = torch.zeros(2, 1, 4, 4)
        microbatch = MicroBatch(
            prompts=["", ""], noise=zeros, target=real[rows], cond=zeros, student_noise=zeros,
            student_cond=zeros, guidance=(),
            rows=range(2), dropout_keys=None, mix_mode=mode[rows], mix_partner=torch.arange(2), t=None,
            transforms=None, augment_noise=(None, None), r1_noise=None,
        )  # fmt: skip
        microbatch.generated = fake[rows].clone().requires_grad_()
        microbatches.append(microbatch)
        stats.add(number, **{kind: {"a": zeros, "b": zeros} for kind in ("real", "fake", "student")})
        for kind, kind_logits in zip(("real", "fake", "student"), logits, strict=True):
            stats.add(
                number, **{kind: {"a": kind_logits[rows].requires_grad_(), "b": kind_logits[rows, :, :2, :2]}}
            )
    means = [torch.stack([x.mean((1, 2, 3)), x[:, :, :2, :2].mean((1, 2, 3))], 1) for x in logits]
    expected = logit_report(dict(zip(("real", "fake", "student"), means, strict=True)), ["a", "b"], mode == 0)
    expected["latent/spread"] = float(fake.var(0).mean() / real.var(0).mean())
    expected["latent/contrast"] = float((fake.std((0, 2, 3), False) / real.std((0, 2, 3), False)).mean())
    shift = (fake.mean((0, 2, 3)) - real.mean((0, 2, 3))).abs() / real.std((0, 2, 3), False)
    expected["latent/color"] = float(shift.max())
    assert stats.report(microbatches) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert set(LogitStats().report(microbatches)) == {f"latent/{x}" for x in ("spread", "contrast", "color")}


# Real training with ranks and micro-batches.

KINDS = ("logit/", "d/auc", "latent/")
BATCH_OF_12 = ("train.batch_size=12", "train.images=36", "train.report_images=12", "gan.mix_fraction=0.4")
BATCH_OF_2 = ("train.batch_size=2", "train.images=6", "train.report_images=2", "gan.mix_fraction=0")
STEPS = ("gan.penalty=none", "gan.d_steps_per_g_step=2", "gan.optim.lr=1e-5")


@pytest.fixture(scope="module")
def config(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    """Config of a GAN stage."""
    folder = tmp_path_factory.mktemp("first")
    pairs = make_pairs(teacher, folder)
    train(distill_config(teacher, pairs, "train.images=8"), folder / "ode")
    return distill_config(teacher, pairs, stage="gan", init=folder / "ode")


@pytest.fixture(scope="module")
def single_process_runs(
    config: DistillConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, ...], Path]:
    """Runs of three steps on one process without gradient accumulation, by batch setting."""
    folder = tmp_path_factory.mktemp("single")
    runs = {BATCH_OF_12: folder / "batch_12", BATCH_OF_2: folder / "batch_2"}
    for batch, out in runs.items():
        succeed(d2g(distill_arguments(config, out, *batch, *STEPS), folder / "log"))
    return runs


def health(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k.startswith(KINDS)} for line in read_stats(run)]


CASES = {
    "accumulate 2": (BATCH_OF_12, 1, "engine.gradient_accumulation=2"),
    "accumulate 3": (BATCH_OF_12, 1, "engine.gradient_accumulation=3"),
    "two ranks, three each": (BATCH_OF_12, 2, "engine.gradient_accumulation=3"),
    "two ranks of FSDP2": (BATCH_OF_12, 2, "engine.parallel=fsdp"),
    "one row per process": (BATCH_OF_2, 2, "engine.parallel=ddp"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "accumulate 3" else pytest.mark.slow) for case in CASES]
)
def test_reports_cover_the_whole_batch(
    case: str, config: DistillConfig, single_process_runs: dict[tuple[str, ...], Path], tmp_path: Path
) -> None:
    batch, ranks, setting = CASES[case]
    arguments = distill_arguments(config, tmp_path / "run", *batch, *STEPS, setting)
    ended = d2g_ranks(arguments, tmp_path / "log", ranks) if ranks > 1 else [d2g(arguments, tmp_path / "log")]
    assert all(each.code == 0 for each in ended), ended[0].stderr
    health_of_run, expected = health(tmp_path / "run"), health(single_process_runs[batch])
    assert len(health_of_run) == len(expected) == 3
    for a, b in zip(health_of_run, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert all("latent/spread" in line and "d/auc" in line for line in health_of_run)


def test_student_logits_persist_between_generator_steps(
    single_process_runs: dict[tuple[str, ...], Path],
) -> None:
    """G updates at every second step of D; the logits of the student persist until the next update."""
    for run in single_process_runs.values():
        first, second, third = (
            {k: v for k, v in line.items() if k.startswith("logit/student")} for line in health(run)
        )
        assert not first and second and third == second
