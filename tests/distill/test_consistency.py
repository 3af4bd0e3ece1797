"""Consistency distillation: boundary, the teacher's step, the gradient, whole runs, refusals."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.config import override
from d2g.core.errors import SettingError
from d2g.core.seeds import StepStream, Stream, generator, noise
from d2g.diffusion.edm import EDMSchedule
from d2g.diffusion.solvers import heun_step
from d2g.diffusion.teacher import load_teacher
from distill.config.presets import preset
from distill.config.run import DistillConfig
from distill.models.consistency import ConsistencyStudent, ConsistencyTarget
from distill.models.student import student_from_teacher
from distill.planning.cost import evaluations, table_evaluations
from distill.planning.flops import flop_per_image
from distill.planning.memory import predict
from distill.planning.unused_settings import refuse_unused
from distill.sampling import load_student
from distill.training.check_config import validate_config
from distill.training.data import pair_batches
from distill.training.train import train
from jobs import d2g, d2g_ranks, distill_arguments, distill_config, succeed
from pairgen.generate import generate_pairs
from pairgen.store.reader import PairReader
from runs import equal, losses, state_at

SHAPE = (3, 8, 8)
SETTINGS = ("regression.losses=pseudo_huber", "optim.lr=1e-3", "consistency.levels=6")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_teachers.save_edm(tmp_path_factory.mktemp("edm"))


@pytest.fixture(scope="module")
def store(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    generate_pairs(tiny.pair_config(teacher, "", solver="euler", guidance=1.0), folder)
    return folder


@pytest.fixture
def consistency(teacher: str) -> ConsistencyTarget:
    student = student_from_teacher(teacher, wrapper=ConsistencyStudent).requires_grad_(False)
    return ConsistencyTarget.of(student, 6)


def rows(target: ConsistencyTarget, level: int) -> tuple[Tensor, Tensor]:
    """Three images with noise of a level, and the number of the level for each."""
    return target.sigmas[level] * noise(0, range(3), SHAPE), torch.full((3,), level)


def config_of(teacher: str, store: Path | str, *settings: str) -> DistillConfig:
    return distill_config(Path(teacher), Path(store), *SETTINGS, *settings, stage="cd")


def command(teacher: str, store: Path, out: Path, *settings: str) -> list[str]:
    """The command line of the preset cifar10, small."""
    arguments = distill_arguments(config_of(teacher, store), out, "engine.gpus=1", *settings)
    return ["cifar10" if word == "miniature" else word for word in arguments]


def test_levels_are_edms_grid_from_below(consistency: ConsistencyTarget) -> None:
    schedule = consistency.teacher.schedule
    assert isinstance(schedule, EDMSchedule)
    expected = [point.sigma for point in schedule.points(6, (8, 8))[:-1]]
    assert consistency.sigmas.tolist() == pytest.approx(expected[::-1])


def test_the_function_is_the_identity_at_the_lowest_level(
    teacher: str, consistency: ConsistencyTarget
) -> None:
    x, level = rows(consistency, 0)
    cond = load_teacher(teacher).conditioner.encode(["1", "2", "3"])
    student = consistency.teacher
    torch.testing.assert_close(student(x, cond, sigma=consistency.sigmas[level]), x, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("level", [0, 2, 5])
def test_without_the_boundary_it_is_the_teachers_denoiser(
    teacher: str, consistency: ConsistencyTarget, level: int
) -> None:
    """Each row has a level of its own, and so has the time input."""
    loaded = load_teacher(teacher)
    assert isinstance(loaded.schedule, EDMSchedule)
    cond = loaded.conditioner.encode(["1", "2", "3"])
    x, levels = rows(consistency, level)
    levels[2] = 3
    own = consistency.teacher(x, cond, sigma=consistency.sigmas[levels], consistent=False)
    denoise = loaded.denoiser(cond, 1.0)
    for row in range(3):
        point = loaded.schedule.point(float(consistency.sigmas[levels[row]]))
        torch.testing.assert_close(own[row], denoise(x, point).x0[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", [1, 3, 5])
def test_the_target_is_a_heun_step_of_the_teacher(
    teacher: str, consistency: ConsistencyTarget, level: int
) -> None:
    loaded = load_teacher(teacher)
    assert isinstance(loaded.schedule, EDMSchedule)
    cond = loaded.conditioner.encode(["1", "2", "3"])
    x, levels = rows(consistency, level)
    now, after = (loaded.schedule.point(float(consistency.sigmas[n])) for n in (level, level - 1))
    expected = heun_step(loaded.denoiser(cond, 1.0), x, now, after)
    own = consistency.previous(x, levels, cond)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_one_step_from_noise_is_the_same_student(teacher: str, consistency: ConsistencyTarget) -> None:
    """Evaluated at sigma_max, the consistency function is the one-step student up to 5e-5 of its size."""
    cond = load_teacher(teacher).conditioner.encode(["1", "2", "3"])
    z, student = noise(0, range(3), SHAPE), consistency.teacher
    consistent = student(80 * z, cond, sigma=torch.full((3,), 80.0))
    one_step = student(z, cond)
    assert torch.equal(one_step, student_from_teacher(teacher)(z, cond))
    assert (consistent - one_step).abs().max() <= 1e-4 * one_step.abs().max()


@pytest.mark.parametrize(
    "engine",
    ["engine.compile=", pytest.param("engine.activation_checkpointing=true", marks=pytest.mark.slow)],
)
def test_a_resumed_run_equals_an_unbroken_one(teacher: str, store: Path, engine: str, tmp_path: Path) -> None:
    more = ("student.dropout=0.1", engine)
    config, shorter = (config_of(teacher, store, f"train.images={n}", *more) for n in (12, 4))
    train(config, tmp_path / "once")
    train(shorter, tmp_path / "twice")
    train(config, tmp_path / "twice")
    once, twice = (state_at(tmp_path / run, 12) for run in ("once", "twice"))
    assert equal(once, twice)
    assert losses(tmp_path / "once") == losses(tmp_path / "twice")
    assert load_student(str(tmp_path / "once"))(["1", "4"]).dtype == torch.uint8


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_and_micro_batches_train_like_one(
    teacher: str, store: Path, engine: str, tmp_path: Path
) -> None:
    settings = [*SETTINGS, "train.images=12"]
    for run, more in {"one": [], "parts": ["engine.gradient_accumulation=2"]}.items():
        succeed(d2g(command(teacher, store, tmp_path / run, *settings, *more), tmp_path / "log"))
    sharded = command(teacher, store, tmp_path / "two", *settings, f"engine.parallel={engine}")
    succeed(*d2g_ranks(sharded, tmp_path / "log"))
    curves = {run: [line["loss/g"] for line in losses(tmp_path / run)] for run in ("one", "parts", "two")}
    assert len(curves["one"]) == 3
    assert curves["parts"] == pytest.approx(curves["one"], rel=1e-5)
    assert curves["two"] == pytest.approx(curves["one"], rel=1e-4)


def test_loss_and_gradient_by_hand(
    teacher: str, store: Path, consistency: ConsistencyTarget, tmp_path: Path
) -> None:
    """Fresh noise and a level for each row, and a gradient through the noisier image alone."""
    config = config_of(teacher, store, "train.images=4", "regression.losses=mse")
    train(config, tmp_path / "run")
    batch = next(iter(pair_batches(PairReader(store), 4, config.seed, 0, 0, config.data)))
    level = torch.randint(1, 6, (4,), generator=generator(0, 0, StepStream.CONSISTENCY_LEVELS))
    fresh = noise(generator(0, Stream.CONSISTENCY_NOISE).initial_seed(), range(4), SHAPE)
    cond = load_teacher(teacher).conditioner.encode(batch.prompts)
    sigma, student = consistency.sigmas, consistency.teacher
    noisy = batch.latents.float() + sigma[level].view(-1, 1, 1, 1) * fresh
    target = student(consistency.previous(noisy, level, cond), cond, sigma=sigma[level - 1])
    student.requires_grad_(True)
    loss = (student(noisy, cond, sigma=sigma[level]) - target).square().mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()
    (line,) = losses(tmp_path / "run")
    assert line["loss/mse"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad/g"] == pytest.approx(float(norm), rel=1e-4)


def test_it_trains_on_images_without_pairs(teacher: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for number, label in enumerate((0, 5, 2, 2, 4)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")
    config = config_of(teacher, "", "pairs=", f"gan.real={folder}", "gan.real_fraction=1", "train.images=8")
    train(config, tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 2


def test_evaluations_are_four_per_row(teacher: str, store: Path) -> None:
    """Supplement A.2: 307.2 million for 150,000 steps of 512."""
    assert table_evaluations(preset("cifar10", "cd")) == 307_200_000
    config = config_of(teacher, store)
    once = override(replace(config, stage="ode"), ["train.images=12"])
    assert evaluations(override(config, ["train.images=12"])) == 4 * evaluations(once)
    # A forward and a backward pass of one in four; the teacher lies in memory.
    ratio = flop_per_image(config) / flop_per_image(replace(config, stage="ode"))
    assert 1.8 < ratio < 2.2
    assert predict(config, 1).frozen > predict(replace(config, stage="ode"), 1).frozen


def test_bf16_has_the_gradients_of_fp32(teacher: str, store: Path, tmp_path: Path) -> None:
    """torch 2.9 keeps the weights that autocast casts without a gradient, for the target, and takes
    them for the student's pass in the same context, too."""
    for precision in ("fp32", "bf16"):
        train(
            config_of(teacher, store, f"train.precision={precision}", "train.images=4"), tmp_path / precision
        )
    (expected,), (rounded,) = (losses(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert rounded["grad/g"] == pytest.approx(expected["grad/g"], rel=0.05)


def test_a_dry_run_and_a_run_from_the_command_line(teacher: str, store: Path, tmp_path: Path) -> None:
    arguments = command(teacher, store, tmp_path / "run", *SETTINGS, "train.images=8")
    planned = d2g([*arguments, "--dry-run", "--json"], tmp_path / "log")
    assert planned.code == 0, planned.stderr
    assert planned.json["evaluations"] == 32
    done = d2g([*arguments, "--json"], tmp_path / "log")
    assert done.code == 0 and done.json["images"] == 8, done.stderr


def test_what_does_not_fit_is_refused(teacher: str, store: Path, tmp_path: Path) -> None:
    sd = tiny_teachers.save_kind("sd", tmp_path / "sd")
    with pytest.raises(SettingError, match="stage cd needs a teacher of pixels that is preconditioned as in"):
        train(config_of(sd, store), tmp_path / "run")
    with pytest.raises(SettingError, match=r"levels is 1; expected 2 or more"):
        config_of(teacher, store, "consistency.levels=1")
    with pytest.raises(SettingError, match="give --pairs, or train on real images"):
        validate_config(config_of(teacher, "", "pairs="))
    config = config_of(teacher, store)
    for name, words in {
        "gan.weight": "only in `d2g distill gan`",
        "gan.real": "or in `d2g distill cd` without --pairs",
        "data.rewire": "only in `d2g distill ode`, `gan` and `text`",
        "clip_guidance.weight": "only in `d2g distill ode`, `gan` and `text`",
    }.items():
        with pytest.raises(SettingError, match=words):
            refuse_unused(config, [name])
    with pytest.raises(SettingError, match="only in `d2g distill cd`"):
        refuse_unused(replace(config, stage="ode"), ["consistency.levels"])
