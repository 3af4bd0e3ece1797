"""distill.training.train: exact resume, golden curves, several ranks, and parts of the training loop.

Golden curves: tests/golden/distill_{ode,gan}.json hold the first six reports of both stages on the tiny
teacher. After a change that intentionally alters them, write them again and state why they changed:

    D2G_WRITE_GOLDEN=1 uv run pytest -n 0 tests/distill/test_train.py -k golden
"""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from d2g.core.distributed import checkpoint, sharded_checkpoint
from d2g.core.distributed.engine import DistributedModule
from d2g.core.errors import SettingError, UserError
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion.fp32_attention import FP32Attention
from distill.config.optim import OptimConfig
from distill.config.run import DistillConfig
from distill.models.student import student_from_teacher
from distill.training.failure import not_finite_error
from distill.training.optim import optimizer, update
from distill.training.state import new_state
from distill.training.train import train
from exported import save_run
from jobs import BATCH, d2g_ranks, distill_arguments, distill_config, make_pairs, succeed
from runs import equal

GOLDEN = Path(__file__).parents[1] / "golden"
COMMON = (
    # With seed 0, E-LatentLPIPS of the fifth step differs by 1e-3 between CPUs, and by 1e-6 in the others.
    "seed=1",
    "optim.warmup_images=24",
    "optim.decay_images=200",
    "optim.clip_norm=5",
    "regression.losses=e_latent_lpips:1,latent_lpips:0.5,l1:0.1",
    "train.ema_start_images=16",
)
SETTINGS = {"ode": COMMON, "gan": (*COMMON, "gan.r1_interval=4", "gan.r1_gamma=0.1", "gan.optim.lr=1e-4")}


@pytest.fixture(scope="module")
def teacher(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher with a stored tokenizer, because training one breaks ties of frequency at random."""
    folder = tmp_path_factory.mktemp("pinned") / "teacher"
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("tokenizer"))
    shutil.copytree(GOLDEN / "tokenizer", folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def pairs(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(teacher, tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def unbroken(teacher: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Unbroken runs of both stages, 20 steps each."""
    folder = tmp_path_factory.mktemp("unbroken")
    for stage in ("ode", "gan"):
        train(config_of(stage, teacher, pairs, folder), folder / stage)
    return {stage: folder / stage for stage in ("ode", "gan")}


def config_of(stage: str, teacher: Path, pairs: Path, folder: Path, steps: int = 20) -> DistillConfig:
    init = folder / "ode" if stage == "gan" else ""
    images = f"train.images={steps * BATCH}"
    return distill_config(teacher, pairs, *SETTINGS[stage], images, stage=stage, init=init)


def curve(run: Path) -> list[dict[str, float]]:
    """Reports without values that depend on the machine."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "mem/"))} for line in read_stats(run)
    ]


# Complete runs.


@pytest.mark.parametrize("stage", ["ode", "gan"])
def test_a_resumed_run_equals_an_unbroken_one(
    stage: str, unbroken: dict[str, Path], teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    """Weights, EMA, optimizer states and all reports are bit-identical."""
    folder, out = unbroken["ode"].parent, tmp_path / stage
    first = train(config_of(stage, teacher, pairs, folder, steps=10), out)
    assert (first.images, first.steps) == (40, 10) and first.checkpoint.endswith("000000040")
    second = train(config_of(stage, teacher, pairs, folder), out)
    assert (second.images, second.steps) == (80, 20)
    a, b = (run / "checkpoints" / "000000080" for run in (out, unbroken[stage]))
    assert equal(*(load_file(path / "ema.safetensors") for path in (a, b)))
    states = [sharded_checkpoint.read(checkpoint.open_checkpoint(path)) for path in (a, b)]
    assert equal(*states)
    names = {"ode": ["student"], "gan": ["discriminator", "student"]}[stage]
    assert sorted({name.partition(".")[0] for name in states[0]} - {"optim"}) == names
    with_optimizer_state = {name.split(".")[1] for name in states[0] if name.startswith("optim.")}
    assert sorted(with_optimizer_state) == names and any(name.endswith(".exp_avg_sq") for name in states[0])
    assert curve(out) == curve(unbroken[stage]) and len(curve(out)) == 20
    assert second.loss == {
        k.removeprefix("loss/"): v for k, v in curve(out)[-1].items() if k.startswith("loss/")
    }


def losses_of(run: Path) -> list[dict[str, float]]:
    """The losses of the first six reports."""
    return [{k: v for k, v in line.items() if k.startswith("loss/")} for line in curve(run)[:6]]


def assert_golden(stage: str, run: Path, tolerance: float) -> None:
    losses, expected = losses_of(run), json.loads((GOLDEN / f"distill_{stage}.json").read_text())
    assert [line.keys() for line in losses] == [line.keys() for line in expected]
    for line, expected_line in zip(losses, expected, strict=True):
        assert line == pytest.approx(expected_line, rel=tolerance)


@pytest.mark.parametrize("stage", ["ode", "gan"])
def test_golden_curves(stage: str, unbroken: dict[str, Path]) -> None:
    if os.environ.get("D2G_WRITE_GOLDEN"):
        (GOLDEN / f"distill_{stage}.json").write_text(json.dumps(losses_of(unbroken[stage]), indent=1) + "\n")
    assert_golden(stage, unbroken[stage], 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["ode", "gan"])
def test_golden_curves_on_a_gpu(stage: str, unbroken: dict[str, Path]) -> None:
    """Random numbers come from the CPU, so a CUDA run differs from the CPU run by rounding only."""
    assert torch.cuda.is_available(), "no CUDA device; `-m gpu` is for machines that have one"
    assert_golden(stage, unbroken[stage], 1e-2)


def test_both_stages_learn(unbroken: dict[str, Path]) -> None:
    ode, gan = curve(unbroken["ode"]), curve(unbroken["gan"])

    def mean(lines: list[dict[str, float]], name: str) -> float:
        return sum(line[name] for line in lines) / len(lines)

    assert mean(ode[-5:], "loss/latent_lpips") < 0.9 * mean(ode[:5], "loss/latent_lpips")
    assert mean(gan[-5:], "loss/d") < mean(gan[:5], "loss/d")
    assert mean(gan[-5:], "logit/real") > mean(gan[-5:], "logit/fake")


LATENT_STATISTICS = ("latent/spread", "latent/contrast", "latent/color")


def test_reports_contain_the_expected_keys(unbroken: dict[str, Path]) -> None:
    ode, gan = curve(unbroken["ode"]), curve(unbroken["gan"])
    assert [line["nimg"] for line in ode] == list(range(4, 84, 4))
    losses = {"loss/e_latent_lpips", "loss/latent_lpips", "loss/l1", "loss/g"}
    assert set(ode[-1]) == {"nimg", "grad/g", "ema/drift", *losses, *LATENT_STATISTICS}
    assert "ema/drift" not in ode[0], "the EMA is a copy at the start"
    assert [("loss/r1" in line) for line in gan] == [index % 4 == 0 for index in range(20)]
    assert {"loss/d", "loss/g_gan", "logit/real", "logit/student/0_skip", "d/auc", "grad/d"} <= set(gan[1])
    for line in ode:
        total = line["loss/e_latent_lpips"] + 0.5 * line["loss/latent_lpips"] + 0.1 * line["loss/l1"]
        assert line["loss/g"] == pytest.approx(total, rel=1e-5)
    for line in gan:
        total = line["loss/e_latent_lpips"] + 0.5 * line["loss/latent_lpips"] + 0.1 * line["loss/l1"]
        assert line["loss/g"] == pytest.approx(total + 0.25 * line["loss/g_gan"], rel=1e-5)


def test_the_gan_stage_starts_from_the_ema_of_the_regression_stage(
    unbroken: dict[str, Path], teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    """With a learning rate of 1e-30 the weights after one step are the initial weights."""
    settings = ("optim.lr=1e-30", "optim.weight_decay=0", "train.images=4")
    config = distill_config(teacher, pairs, *settings, stage="gan", init=unbroken["ode"])
    train(config, tmp_path)
    before = load_file(unbroken["ode"] / "checkpoints" / "000000080" / "ema.safetensors")
    after = sharded_checkpoint.read(checkpoint.open_checkpoint(tmp_path / "checkpoints" / "000000004"))
    assert equal(before, {name: after[f"student.{name}"] for name in before})


def test_a_stage_continues_at_the_timestep_of_its_student(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    """Weights for one timestep give noise at another one."""
    run = save_run(tmp_path / "run", str(teacher), student_timestep=981)
    config = distill_config(teacher, pairs, stage="gan", init=run)
    message = "a student at timestep 981, but this run's student is at 999; set student_timestep=981$"
    with pytest.raises(SettingError, match=message):
        new_state(config, torch.device("cpu"))
    state = new_state(replace(config, student_timestep=981), torch.device("cpu"))
    assert state.student.module.timestep == 981
    last = save_run(tmp_path / "last", str(teacher), student_timestep=999)  # -1 is the last one, too
    new_state(replace(config, init=last), torch.device("cpu"))


def test_a_stage_starts_from_a_student_of_the_same_prediction(
    teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    """Weights that predict epsilon give noise where they are read as v."""
    other = tiny.save_teacher(tmp_path / "v", prediction_type="v_prediction")
    message = (
        "init is .*, a student whose network makes a prediction of type epsilon, but .* has v_prediction;"
    )
    train(distill_config(teacher, pairs, "train.images=4"), tmp_path / "ode")
    exported = save_run(tmp_path / "run", str(teacher), student_timestep=999)  # one that records no pairs
    for init in (tmp_path / "ode", exported):
        config = distill_config(Path(other), tmp_path, stage="gan", init=init)
        with pytest.raises(SettingError, match=message):
            new_state(config, torch.device("cpu"))


@pytest.mark.parametrize("written", [3, {"precision": ["bf16"]}])
def test_auto_of_a_damaged_run_is_one_line(
    written: object, teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"train": written}))
    config = distill_config(teacher, pairs, "train.precision=auto")
    with pytest.raises(UserError, match=r"config\.json is damaged \(train.*expected"):
        train(config, tmp_path)


def test_a_checkpoint_in_the_background_survives_an_error(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    """Damage that the step after a checkpoint meets: the first shard is needed then, in this order."""
    store = shutil.copytree(pairs, tmp_path / "pairs")
    shard = store / "shards" / "pairs-00000.h5"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    shard.write_bytes(data)
    order = ("data.block=5", "data.window=1", f"train.checkpoint_images={BATCH}")
    config = distill_config(teacher, store, *order, "engine.async_checkpoints=true")
    with pytest.raises(UserError, match=r"pairs-00000\.h5"):
        train(config, tmp_path / "run")
    assert checkpoint.complete_points(tmp_path / "run" / "checkpoints") == [BATCH]


def test_no_average_is_no_collapse(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    """With ema_beta=0 the average equals the weights, which does not mean that they stand still."""
    train(distill_config(teacher, pairs, "train.ema_beta=0", "train.on_collapse=stop"), tmp_path)
    assert all("ema/drift" not in line for line in read_stats(tmp_path))


def test_a_finished_run_is_not_changed(unbroken: dict[str, Path], teacher: Path, pairs: Path) -> None:
    before = {
        p: p.stat().st_mtime_ns for p in unbroken["ode"].rglob("*") if p.is_file() and p.name != "stats.jsonl"
    }
    again = train(config_of("ode", teacher, pairs, unbroken["ode"].parent), unbroken["ode"])
    assert (again.images, again.steps, again.images_per_sec) == (80, 20, 0.0) and set(again.loss) >= {"g"}
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_the_time_limit_ends_a_run_with_a_checkpoint(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    summary = train(distill_config(teacher, pairs, "train.images=100000", "train.minutes=1e-6"), tmp_path)
    assert (summary.images, summary.steps) == (4, 1) and Path(summary.checkpoint).name == "000000004"
    assert json.loads((tmp_path / "ended.json").read_text()) == {"nimg": 4, "how": "minutes", "why": ""}


def test_checkpoints_are_pruned_and_bf16_keeps_fp32_weights(
    teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    settings = (
        "train.precision=bf16",
        "train.checkpoint_images=4",
        "train.keep_checkpoints=2",
        "train.images=16",
    )
    train(distill_config(teacher, pairs, *settings), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000000012", "000000016"]
    last = checkpoint.latest(tmp_path / "checkpoints")
    assert last is not None
    tensors = [*last.tensors("ema").values(), *sharded_checkpoint.read(last).values()]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    assert all(math.isfinite(line["loss/g"]) for line in curve(tmp_path))


@pytest.mark.parametrize("hardware", [True, False])
def test_auto_is_what_the_hardware_has_and_is_recorded(
    hardware: bool, teacher: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on in the same precision, also with the setting written out."""
    has_bf16 = "distill.planning.choose_precision.supports_bf16"
    monkeypatch.setattr(has_bf16, lambda device: hardware)
    precision = "bf16" if hardware else "fp32"
    train(distill_config(teacher, pairs, "train.precision=auto", "train.images=4"), tmp_path / "run")
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["precision"] == precision
    # Other hardware goes on in the same precision.
    monkeypatch.setattr(has_bf16, lambda device: not hardware)
    same = distill_config(teacher, pairs, "train.precision=auto", "train.images=8")
    assert train(same, tmp_path / "run").steps == 2
    same = distill_config(teacher, pairs, f"train.precision={precision}", "train.images=12")
    assert train(same, tmp_path / "run").steps == 3
    other = replace(same, train=replace(same.train, precision="fp32" if hardware else "bf16"))
    with pytest.raises(UserError, match="precision"):
        train(other, tmp_path / "run")


@pytest.mark.parametrize("rank", [0, 2])
def test_a_cpu_computes_attention_in_fp32_in_a_run_in_bf16(rank: int, teacher: Path, pairs: Path) -> None:
    """In the student, also below adapters, and in the discriminator. In fp32 layers keep diffusers' own."""
    for precision, expected in (("bf16", FP32Attention), ("fp32", AttnProcessor2_0)):
        settings = (f"train.precision={precision}", f"student.lora_rank={rank}")
        config = distill_config(teacher, pairs, *settings, stage="gan", init="teacher")
        state = new_state(config, torch.device("cpu"))
        assert state.discriminator is not None
        for network in (state.student.module, state.discriminator.module):
            layers = [layer for layer in network.modules() if isinstance(layer, Attention)]
            assert layers and all(type(layer.processor) is expected for layer in layers)


# Several ranks.


def test_ranks_report_together_with_different_kinds_of_rows(
    unbroken: dict[str, Path], teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    """With two rows per rank, a rank often has no mismatched row or no other fake row."""
    config = distill_config(teacher, pairs, stage="gan", init=unbroken["ode"])
    settings = ("gan.mix_fraction=0.6", "gan.r1_interval=2", "train.images=24")
    succeed(*d2g_ranks(distill_arguments(config, tmp_path / "run", *settings), tmp_path / "log"))
    lines = curve(tmp_path / "run")
    assert len(lines) == 6 and all(math.isfinite(v) for line in lines for v in line.values())
    assert any("logit/mismatched" in line for line in lines) and any("logit/fake" in line for line in lines)


def test_a_batch_that_does_not_divide_is_refused(
    teacher: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SettingError, match=r"3 processes; expected a multiple of 3, or ano.*--gpus of"):
        train(distill_config(teacher, pairs), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Refused inputs.


def test_another_config_is_refused_with_the_changed_settings(
    unbroken: dict[str, Path], teacher: Path, pairs: Path
) -> None:
    config = config_of("ode", teacher, pairs, unbroken["ode"].parent)
    other = replace(config, seed=2, optim=replace(config.optim, lr=3e-4))
    with pytest.raises(UserError, match=r"another config: optim\.lr \(0\.0001 -> 0\.0003\), seed \(1 -> 2\)"):
        train(other, unbroken["ode"])


def test_other_pairs_and_teachers_are_refused(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    tiny.save_teacher(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was made by teacher"):
        train(distill_config(tmp_path / "other", pairs), tmp_path / "run")
    for name in ("pairs", "teacher", "init"):
        config = distill_config(teacher, pairs, stage="gan", init="somewhere")
        with pytest.raises(SettingError, match=rf"{name} is not set.*; give --{name}"):
            train(replace(config, **{name: ""}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Parts of the loop.


def test_weight_decay_groups(teacher: Path) -> None:
    """Parameters of attention layers have weight decay 1e-5, all others 1e-2 (method.md "Schedule and
    hyperparameters").
    """
    student = student_from_teacher(str(teacher)).requires_grad_(True)
    decay_of = {
        id(p): g["weight_decay"] for g in optimizer(student, OptimConfig()).param_groups for p in g["params"]
    }
    expected = {id(p): 1e-5 if ".attentions." in n else 1e-2 for n, p in student.named_parameters()}
    assert decay_of == expected and set(decay_of.values()) == {1e-5, 1e-2}
    inside = {n for n, _ in student.named_parameters() if ".attn1." in n or ".attn2." in n or ".ff." in n}
    assert inside <= {n for n, p in student.named_parameters() if decay_of[id(p)] == 1e-5}


def without_process_group(module: nn.Module) -> DistributedModule:
    return DistributedModule(module, "ddp", torch.device("cpu"))


def test_gradient_clipping_and_reported_norm() -> None:
    module = nn.Linear(1, 1, bias=False)
    for clip, expected in ((0.0, 3.0), (1.0, 1.0), (10.0, 3.0)):
        config = OptimConfig(clip_norm=clip)
        norms: list[float] = []

        def stop(norm: Tensor, norms: list[float] = norms) -> Tensor:
            norms.append(norm.item())
            return torch.zeros(())

        sgd = torch.optim.SGD(module.parameters(), lr=1.0)
        before = module.weight.detach().clone()
        module.weight.grad = torch.full((1, 1), 3.0)
        assert update(sgd, without_process_group(module), config, 1.0, stop) == 3.0
        torch.testing.assert_close(before - module.weight.detach(), torch.full((1, 1), expected))
        assert norms == [3.0]


def test_the_error_names_what_is_not_finite(tmp_path: Path) -> None:
    nan = torch.tensor(math.nan)
    error = str(not_finite_error("grad/g", nan, {"loss/g": torch.tensor(1.0)}, 8, tmp_path))
    assert error.startswith("grad/g is nan at image 8; no checkpoint was written before")
    error = str(not_finite_error("grad/g", nan, {"loss/g": torch.tensor(math.inf)}, 8, tmp_path))
    assert error.startswith("loss/g is inf at image 8")
