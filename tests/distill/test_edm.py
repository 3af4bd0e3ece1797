"""The CIFAR-10 recipe of Table A1 end to end at 8 px: EDM pairs by Heun, LPIPS in pixels, RAdam."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import squeezenet1_1

import tiny_teachers
from d2g.core.config import override, to_json
from d2g.core.distributed import checkpoint, sharded_checkpoint
from d2g.core.seeds import noise
from d2g.core.tracking.run_directory import read_stats
from distill.config.export import ExportConfig
from distill.config.optim import OptimConfig
from distill.config.presets import preset
from distill.config.regression import RegressionConfig
from distill.config.run import DistillConfig
from distill.export.export import export
from distill.sampling import default_student_prompts, load_student
from distill.training.train import train
from eval.images.resize import NATIVE
from eval.protocols.config import EvalRun
from eval.protocols.protocol import PROTOCOLS
from eval.runner.session import EvalSession
from jobs import TRAIN, d2g, d2g_ranks, succeed
from pairgen.config import PairConfig
from pairgen.generate import generate_pairs
from pairgen.store.reader import PairReader

BATCH = 8


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teacher/, pairs/ (made by the command line) and an LPIPS trunk."""
    folder = tmp_path_factory.mktemp("edm")
    tiny_teachers.save_edm(folder / "teacher")
    torch.manual_seed(0)
    torch.save(squeezenet1_1(weights=None).state_dict(), folder / "squeeze.pth")
    succeed(
        d2g(
            [
                *("pairs", "generate", "--preset", "cifar10", "--teacher", str(folder / "teacher")),
                *("--out", str(folder / "pairs"), "--num-pairs", "24", "--json"),
                *("--set", "shard_size=10", "--set", "batch_size=8", "--set", "dtype=float32"),
            ],
            folder / "log",
        )
    )
    return folder


def small_settings(workspace: Path, steps: int, **more: Any) -> list[str]:
    """Overrides that make the preset small enough for a test."""
    small = {
        **{f"train.{name}": value for name, value in to_json(TRAIN).items() if name != "ema_beta"},
        "train.images": steps * BATCH,
        "train.batch_size": BATCH,
        "train.checkpoint_images": 100_000,
        "train.ema_start_images": 2 * BATCH,
        "train.ema_beta": 0.9,
        "regression.lpips_net": "squeeze",
        "regression.lpips_weights": str(workspace / "squeeze.pth"),
        "regression.lpips_resize": 24,
    }
    return [f"{name}={json.dumps(value)}" for name, value in {**small, **more}.items()]


def arguments(workspace: Path, out: Path, steps: int, **more: Any) -> list[str]:
    options = [
        "--pairs",
        str(workspace / "pairs"),
        "--teacher",
        str(workspace / "teacher"),
        "--out",
        str(out),
    ]
    overrides = [part for s in small_settings(workspace, steps, **more) for part in ("--set", s)]
    return ["distill", "ode", "--preset", "cifar10", *options, *overrides, "--json"]


@pytest.fixture(scope="module")
def run(workspace: Path) -> Path:
    """An unbroken run of six steps with previews and validation."""
    out = workspace / "run"
    monitoring = {"train.preview_prompts": 4, "train.validate_images": 24, "train.validate_pairs": 4}
    succeed(d2g(arguments(workspace, out, 6, **monitoring), workspace / "log"))
    return out


def test_preset_matches_the_paper_except_for_size(workspace: Path) -> None:
    config = override(preset("cifar10", "ode"), small_settings(workspace, 6))
    assert (config.student.dropout, config.optim.name, config.optim.lr) == (0.1, "radam", 4e-4)
    assert config.regression.names == ("lpips",) and preset("cifar10", "ode").regression.lpips_resize == 224
    spec = PairReader(str(workspace / "pairs")).spec
    assert (spec.solver, spec.steps, spec.guidance, spec.conditioning) == ("heun", 18, 1.0, "label")


def test_stored_pairs_match_a_new_simulation(workspace: Path) -> None:
    """The store holds unit-variance noise and the images of the EDM sampler."""
    done = d2g(
        ["pairs", "verify", str(workspace / "pairs"), "--resimulate", "8", "--json"], workspace / "log"
    )
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["ok"] and summary["max_abs_err"] < 1e-4
    batch = PairReader(str(workspace / "pairs")).read(list(range(24)))
    assert torch.equal(batch.noise, noise(0, range(24), (3, 8, 8)))
    assert batch.prompts[:12] == [str(i % 10) for i in range(12)]


def test_training_writes_losses_validation_and_previews(run: Path) -> None:
    lines = read_stats(run)
    losses = [line["loss/lpips"] for line in lines if "loss/lpips" in line]
    assert len(losses) == 6 and all(loss > 0 for loss in losses)
    assert [line["nimg"] for line in lines if "val/psnr" in line] == [24, 48]
    assert len(list((run / "previews").glob("*.png"))) == 6


def test_a_resumed_run_equals_an_unbroken_one(workspace: Path, run: Path, tmp_path: Path) -> None:
    """Bit-identical weights and optimizer states, with dropout on."""
    monitoring = {"train.preview_prompts": 4, "train.validate_images": 24, "train.validate_pairs": 4}
    for steps in (3, 6):
        succeed(d2g(arguments(workspace, tmp_path / "run", steps, **monitoring), tmp_path / "log"))
    states = [
        sharded_checkpoint.read(checkpoint.open_checkpoint(p / "checkpoints" / "000000048"))
        for p in (tmp_path / "run", run)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    averages = [load_file(p / "checkpoints/000000048/ema.safetensors") for p in (tmp_path / "run", run)]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_like_one(workspace: Path, engine: str, tmp_path: Path) -> None:
    """Dropout masks depend on the row only, not on the process."""
    succeed(d2g(arguments(workspace, tmp_path / "one", 3), tmp_path / "log"))
    more = {"engine.parallel": engine, "data.text_cache": 4}
    succeed(*d2g_ranks(arguments(workspace, tmp_path / "two", 3, **more), tmp_path / "log"))
    curves = [[line["loss/lpips"] for line in read_stats(tmp_path / name)] for name in ("one", "two")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and len(curves[0]) == 3


@pytest.mark.slow
def test_student_overfits_its_pairs(workspace: Path, tmp_path: Path) -> None:
    """On 16 pairs (Heun, 18 steps) the squared error falls by a factor of 20 in 150 steps."""
    pairs = PairConfig(
        teacher=str(workspace / "teacher"),
        num_pairs=16,
        guidance=1.0,
        steps=18,
        solver="heun",
        dtype="float32",
    )
    generate_pairs(pairs, tmp_path / "pairs")
    config = DistillConfig(
        teacher=str(workspace / "teacher"),
        pairs=str(tmp_path / "pairs"),
        optim=OptimConfig(name="radam", lr=1e-2, weight_decay=0.0, attention_weight_decay=0.0),
        regression=RegressionConfig(losses=(("mse", 1.0),)),
        train=replace(TRAIN, images=16 * 150, batch_size=16, report_images=16 * 10),
    )
    train(config, tmp_path / "run")
    losses = [line["loss/mse"] for line in read_stats(tmp_path / "run")]

    assert losses[-1] < losses[0] / 20, losses


# Sampling, export and evaluation of the trained student.


def test_sampling_covers_all_classes(workspace: Path, run: Path, tmp_path: Path) -> None:
    succeed(
        d2g(["sample", "--student", str(run), "--out", str(tmp_path / "all"), "--json"], tmp_path / "log")
    )
    assert len(list((tmp_path / "all").glob("0*.png"))) == 10, "all classes if no prompt is given"
    assert default_student_prompts(str(run)) == [str(i) for i in range(10)]
    command = [
        "sample",
        "--student",
        str(run),
        "--prompt",
        "3",
        "--prompt",
        "ship",
        "--out",
        str(tmp_path / "no"),
    ]
    done = d2g(command, tmp_path / "log")
    assert done.code == 1 and "prompt 'ship': expected a class number, 0 to 9" in done.error


def test_safetensors_export_samples_the_same_images(run: Path, tmp_path: Path) -> None:
    assert export(ExportConfig(student=str(run), dtype="fp32"), tmp_path)["parity_max_abs_err"] == 0
    z = noise(5, range(2), (3, 8, 8))
    own, other = (load_student(str(folder)).latents(z, ["2", "7"]) for folder in (run, tmp_path))
    assert torch.equal(own, other)
    assert json.loads((tmp_path / "student.json").read_text())["student_timestep"] == -1


def test_evaluation_cycles_through_all_classes(run: Path) -> None:
    session = EvalSession(EvalRun(student=str(run), protocol=PROTOCOLS["cifar10-50k"], seed=4))
    (batch,) = session.source(session.config).draw(range(8, 13), 64, (NATIVE,))
    assert batch.prompts == ["8", "9", "0", "1", "2"]
    own = load_student(str(run)).images(noise(4, range(8, 13), (3, 8, 8)), batch.prompts)
    assert (batch.views[NATIVE].int() - own.int()).abs().max() <= 1
