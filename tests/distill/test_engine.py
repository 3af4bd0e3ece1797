"""Engine options that must not change training; failures: killed ranks, damaged files, long prompts."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.config import override
from d2g.core.distributed import checkpoint, sharded_checkpoint
from d2g.core.errors import SettingError, UserError
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion import pretrained
from distill.config.run import DistillConfig
from distill.training.train import train
from forks import environments
from jobs import Running, d2g, d2g_ranks, distill_arguments, distill_config, make_pairs, succeed
from pairgen.generate import generate_pairs

STEPS = ("gan.r1_interval=2", "gan.mix_fraction=0.5", "gan.optim.lr=1e-4", "train.images=16")


@pytest.fixture(scope="module")
def ode(teacher: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short regression run, the start of the GAN stage."""
    out = tmp_path_factory.mktemp("ode")
    train(distill_config(teacher, pairs, "train.images=8"), out)
    return out


@pytest.fixture(scope="module")
def config(teacher: Path, pairs: Path, ode: Path) -> DistillConfig:
    return distill_config(teacher, pairs, stage="gan", init=ode)


@pytest.fixture(scope="module")
def plain(config: DistillConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference run: four steps on one process with default engine settings."""
    out = tmp_path_factory.mktemp("plain") / "run"
    succeed(d2g(distill_arguments(config, out, *STEPS), out.parent / "log"))
    return out


def ema_weights(run: Path, nimg: int = 16) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"{nimg:09d}" / "ema.safetensors")


def losses(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k.startswith("loss/")} for line in read_stats(run)]


def assert_same_learning(run: Path, plain: Path, rel: float = 1e-4) -> None:
    """Check that losses and EMA weights agree up to rounding."""
    for a, b in zip(losses(run), losses(plain), strict=True):
        assert a == pytest.approx(b, rel=rel, abs=1e-6)
    a, b = ema_weights(run), ema_weights(plain)
    assert a.keys() == b.keys() and all((a[k] - b[k]).abs().mean() < 1e-4 for k in b)


ENGINE_OPTIONS = {
    "own-passes": ["engine.own_generator_passes=true"],
    "accumulate": ["engine.gradient_accumulation=2"],
    "recompute": ["engine.activation_checkpointing=true"],
    "fsdp": ["engine.parallel=fsdp"],
    "compile": ["engine.compile=aot_eager"],
    "async": ["engine.async_checkpoints=true", "train.checkpoint_images=4"],
    "cache": ["data.text_cache=3"],
    "offload": ["engine.offload_optimizer=true"],
    "fused": ["optim.name=adamw_fused", "gan.optim.name=adamw_fused"],
}
SLOW_OPTIONS = dict.fromkeys(("own-passes", "async", "offload", "fused"), (pytest.mark.slow,)) | {
    "compile": (pytest.mark.slow, pytest.mark.long)
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=SLOW_OPTIONS.get(name, ())) for name in ENGINE_OPTIONS]
)
def test_engine_options_do_not_change_training(
    case: str, config: DistillConfig, plain: Path, tmp_path: Path
) -> None:
    succeed(d2g(distill_arguments(config, tmp_path / "run", *STEPS, *ENGINE_OPTIONS[case]), tmp_path / "log"))
    assert_same_learning(tmp_path / "run", plain)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_like_one_and_one_rank_resumes_them(
    parallel: str, config: DistillConfig, plain: Path, tmp_path: Path
) -> None:
    """Two steps on two ranks and two steps on one rank with another engine equal four steps on one."""
    out = tmp_path / "run"
    async_checkpoints = f"engine.async_checkpoints={json.dumps(parallel == 'fsdp')}"
    first = distill_arguments(
        config, out, *STEPS, f"engine.parallel={parallel}", async_checkpoints, "train.images=8"
    )
    succeed(*d2g_ranks(first, tmp_path / "log"))
    last = checkpoint.latest(out / "checkpoints")
    assert last is not None and last.meta["processes"] == 2
    assert len(list((last.folder / "state").glob("*.distcp"))) == 2, "each rank writes its own file"
    succeed(d2g(distill_arguments(config, out, *STEPS), tmp_path / "log1"))
    assert_same_learning(out, plain)


ROW_OPTIONS = (
    "gan.r1_rows=2",  # one for each rank
    "gan.r1_rows=4",
    "gan.penalty=approx gan.approx_sigma=1",
    "student.dropout=0.3",
    "gan.noise_augment=small",
)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("option", ROW_OPTIONS)
def test_row_randomness_does_not_depend_on_the_split(
    option: str, config: DistillConfig, tmp_path: Path
) -> None:
    """Eight rows in one batch train like two ranks with two micro-batches of two rows each."""
    steps = STEPS[1:] if "approx" in option else STEPS  # approx has no r1_interval
    settings = (*steps, "train.batch_size=8", "train.report_images=8", *option.split())
    succeed(d2g(distill_arguments(config, tmp_path / "one", *settings), tmp_path / "log"))
    split = distill_arguments(config, tmp_path / "two", *settings, "engine.gradient_accumulation=2")
    succeed(*d2g_ranks(split, tmp_path / "log"))
    assert_same_learning(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_ranks_resume_a_run_of_one_rank(config: DistillConfig, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    succeed(d2g(distill_arguments(config, out, *STEPS, "train.images=8"), tmp_path / "log"))
    arguments = distill_arguments(
        config, out, *STEPS, "engine.parallel=fsdp", "engine.gradient_accumulation=1"
    )
    succeed(*d2g_ranks(arguments, tmp_path / "log"))
    assert_same_learning(out, plain)


# Killed processes.


def start_ranks(arguments: list[str], folder: Path) -> list[Running]:
    return [
        Running(arguments, folder / f"rank{rank}", environment)
        for rank, environment in enumerate(environments(2))
    ]


@pytest.fixture(scope="module")
def unbroken_run(
    config: DistillConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[str, ...], Path]:
    """(settings, folder) of an unbroken run: eight steps on two ranks with a checkpoint at each step."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    settings = (*STEPS, "train.images=32", "train.checkpoint_images=4")
    succeed(*d2g_ranks(distill_arguments(config, out, *settings), out.parent / "log"))
    return settings, out


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("killed", ["one", "all"])
def test_a_run_with_killed_ranks_resumes_exactly(
    killed: str, config: DistillConfig, unbroken_run: tuple[tuple[str, ...], Path], tmp_path: Path
) -> None:
    """SIGKILL at a random step: the other rank ends with a one-line error, and a rerun is bit-identical."""
    settings, unbroken = unbroken_run
    out = tmp_path / "run"
    arguments = distill_arguments(config, out, *settings)
    step = random.Random(os.getpid()).randrange(1, 6)
    running = start_ranks(arguments, tmp_path / "first")
    folder = out / "checkpoints"
    running[0].wait_for(lambda: len(checkpoint.complete_points(folder)) > 0)
    running[0].wait_for(lambda: checkpoint.complete_points(folder)[-1:] >= [4 * step])
    for process in running if killed == "all" else running[1:]:
        process.send(signal.SIGKILL)
    ended = [each.wait() for each in running]
    assert ended[1].code == -signal.SIGKILL
    if killed == "one":
        assert ended[0].code == 1
        assert "another process of this run is gone" in ended[0].error and "goes on from" in ended[0].error
    succeed(*d2g_ranks(arguments, tmp_path / "again"))
    last = [checkpoint.open_checkpoint(run / "checkpoints" / "000000032") for run in (out, unbroken)]
    states = [sharded_checkpoint.read(each) for each in last]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert losses(out) == losses(unbroken)


@pytest.mark.long
@pytest.mark.slow
def test_torchrun_restarts_killed_workers(
    config: DistillConfig,
    unbroken_run: tuple[tuple[str, ...], Path],
    warm_python: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After SIGKILL of one worker, torchrun restarts both, and the run ends with the same weights."""
    settings, unbroken = unbroken_run
    out, root = tmp_path / "run", Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHON_EXEC", warm_python)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, "-m", *launch, "-m", "d2g_cli", *distill_arguments(config, out, *settings)]
    with open(tmp_path / "log", "w") as log:
        running = subprocess.Popen(command, cwd=root, stdout=log, stderr=log)
    try:
        while not checkpoint.complete_points(out / "checkpoints"):
            assert running.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        assert running.wait(600) == 0, (tmp_path / "log").read_text()
    finally:
        running.kill()
    assert losses(out) == losses(unbroken)
    assert all(
        torch.equal(value, ema_weights(unbroken, 32)[name]) for name, value in ema_weights(out, 32).items()
    )


def test_sigterm_saves_on_all_ranks(config: DistillConfig, tmp_path: Path) -> None:
    """Preemption: SIGTERM may reach only one rank and its data loader workers."""
    out = tmp_path / "run"
    arguments = distill_arguments(config, out, *STEPS, "train.images=4000", "train.loader_workers=2")
    running = start_ranks(arguments, tmp_path / "log")
    running[0].wait_for(lambda: len(read_stats(out)) > 1)
    for _ in range(2):
        running[1].send(signal.SIGTERM)  # to its whole process group
        time.sleep(0.05)
    ended = [each.wait() for each in running]
    assert [each.code for each in ended] == [130, 130], [each.stderr for each in ended]
    last = checkpoint.latest(out / "checkpoints")
    assert last is not None and "safe on disk" in ended[0].stderr
    sharded_checkpoint.verify(last)


# Other failures.


def damage_checkpoint(run: Path) -> None:
    shard = next((run / "checkpoints" / "000000016" / "state").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-64])


@pytest.mark.parametrize("damage", [damage_checkpoint, None])
def test_damaged_or_foreign_checkpoints_are_refused(
    damage: Callable[[Path], None] | None, config: DistillConfig, plain: Path, ode: Path, tmp_path: Path
) -> None:
    """A checkpoint with a damaged file, or one that a run with another config wrote."""
    out, steps = tmp_path / "run", (*STEPS, "train.checkpoint_images=8")
    succeed(d2g(distill_arguments(config, out, *steps), tmp_path / "log"))
    if damage is not None:
        damage(out)
    else:
        arguments = distill_arguments(config, tmp_path / "other", *steps, "gan.weight=1")
        succeed(d2g(arguments, tmp_path / "log"))
        (out / "checkpoints" / "000000016").rename(tmp_path / "away")
        (tmp_path / "other" / "checkpoints" / "000000016").rename(out / "checkpoints" / "000000016")
    ended = d2g(distill_arguments(config, out, *steps, "train.images=20"), tmp_path / "log")
    assert ended.code == 1 and "continue from the checkpoint before it" in ended.error
    assert ("of a run with other networks" in ended.error) == (damage is None)


def test_a_non_finite_pair_is_reported_and_repaired(
    config: DistillConfig, plain: Path, tmp_path: Path
) -> None:
    store, out = tmp_path / "pairs", tmp_path / "run"
    shutil.copytree(config.pairs, store)
    with h5py.File(sorted(store.rglob("*.h5"))[1], "r+") as file:
        number = int(file["index"][2])
        file["latent"][2, 0, 0, 0] = float("nan")
    arguments = distill_arguments(replace(config, pairs=str(store)), out, *STEPS)
    ranks = d2g_ranks(arguments, tmp_path / "log")
    for ended in ranks:
        assert ended.code == 1 and f"error: pair {number} of {store}: values that are not" in ended.error
        assert "`d2g pairs repair` makes it again, then the same command goes on" in ended.error
        assert ended.error.endswith(f"losses, logits and rows of the step: {out / 'failure'}")
    reports = [json.loads((out / "failure" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert number in [pair for report in reports for pair in report["pairs"]]
    assert all(report["norm"] == "nan" and len(report["pairs"]) == 2 for report in reports)
    assert {len(logits) for report in reports for logits in report["logits"].values()} == {6}
    assert d2g(["pairs", "repair", str(store)], tmp_path / "log").code == 0
    succeed(*d2g_ranks(arguments, tmp_path / "log"))
    assert_same_learning(out, plain)


@pytest.mark.long
@pytest.mark.slow
def test_three_ranks_resume_bit_for_bit(config: DistillConfig, tmp_path: Path) -> None:
    """DDP rebuilds its buckets after the first step, which may change the summation order of three ranks."""
    settings = (*STEPS, "train.batch_size=6", "train.report_images=6", "train.images=24")
    for run, image_counts in (("unbroken", (24,)), ("resumed", (12, 24))):
        for images in image_counts:
            arguments = distill_arguments(config, tmp_path / run, *settings, f"train.images={images}")
            succeed(*d2g_ranks(arguments, tmp_path / "log", 3))
    states = [
        sharded_checkpoint.read(checkpoint.open_checkpoint(tmp_path / run / "checkpoints" / "000000024"))
        for run in ("unbroken", "resumed")
    ]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert losses(tmp_path / "unbroken") == losses(tmp_path / "resumed")


def test_a_batch_of_one_per_rank_is_refused(config: DistillConfig, tmp_path: Path) -> None:
    ranks = d2g_ranks(distill_arguments(config, tmp_path / "run", "train.batch_size=2"), tmp_path / "log")
    assert [ended.code for ended in ranks] == [2, 2]
    assert "a micro-batch has 1 row per process" in ranks[0].error
    assert not (tmp_path / "run").exists()


def test_odd_batch_sizes_are_allowed_without_mixing(
    config: DistillConfig, teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    rows = ("train.batch_size=3", "train.images=6")
    assert train(distill_config(teacher, pairs, *rows), tmp_path / "ode").images == 6
    assert train(override(config, [*rows, "gan.mix_fraction=0"]), tmp_path / "gan").images == 6
    with pytest.raises(SettingError, match="has 3 rows per process"):
        override(config, rows)


def test_training_truncates_long_prompts_like_the_teacher(teacher: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(" ".join([caption] * 40) for caption in tiny.CAPTIONS) + "\n")
    generate_pairs(tiny.pair_config(str(teacher), str(prompts)), tmp_path / "pairs")
    summary = train(distill_config(teacher, tmp_path / "pairs", "train.images=8"), tmp_path / "run")
    assert summary.images == 8 and summary.loss["g"] > 0


# SDXL.


def test_sdxl_recipe_on_a_tiny_teacher(tmp_path: Path) -> None:
    """Both stages with two text encoders, noise augmentation of D, no R1, held-out pairs and a preview."""
    folder = tiny_teachers.save_sdxl(tmp_path / "teacher")
    tiny.save_lpips(tmp_path / "teacher" / "latent_lpips")
    pairs, validation = (
        make_pairs(Path(folder), tmp_path),
        ("train.validate_pairs=3", "train.validate_images=8"),
    )
    train(distill_config(Path(folder), pairs, *validation, "train.preview_prompts=2"), tmp_path / "ode")
    settings = ("gan.penalty=none", "gan.noise_augment=uniform", "gan.weight=1", "data.text_cache=10")
    config = distill_config(Path(folder), pairs, *settings, stage="gan", init=tmp_path / "ode")
    summary = train(config, tmp_path / "gan")
    assert summary.images == 20 and set(summary.loss) == {"d", "e_latent_lpips", "g_gan", "g"}
    heads = {name for name in read_stats(tmp_path / "gan")[-1] if name.startswith("logit/real/")}
    blocks = len(pretrained.load_on_meta(folder, "unet").up_blocks)
    assert len(heads) == 3 * blocks


def test_real_images_change_the_discriminator_loss(
    config: DistillConfig, plain: Path, tmp_path: Path
) -> None:
    """Real images change D's loss, on two ranks as on one."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        Image.new("RGB", (40, 30), (40 * number, 10, 200)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a red cube {number}")
    settings = (*STEPS, f"gan.real={images}", "gan.real_fraction=0.3")
    succeed(d2g(distill_arguments(config, tmp_path / "one", *settings), tmp_path / "log"))
    succeed(*d2g_ranks(distill_arguments(config, tmp_path / "two", *settings), tmp_path / "log"))
    assert_same_learning(tmp_path / "two", tmp_path / "one")
    assert losses(tmp_path / "one")[0]["loss/d"] != losses(plain)[0]["loss/d"]


# Validation.


def test_validation_does_not_change_training_and_the_best_checkpoint_is_kept(
    config: DistillConfig, teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    """The learning rate is too high, so the best checkpoint is an early one, which pruning must keep."""
    validation = ("train.validate_pairs=4", "train.validate_images=4", "train.images=40", "optim.lr=0.01")
    keep = ("train.keep_best=true", "train.keep_checkpoints=1", "train.preview_prompts=2", "train.plot=true")
    train(distill_config(teacher, pairs, *validation), tmp_path / "last_only")
    train(distill_config(teacher, pairs, *validation, *keep), tmp_path / "keep_best")
    plain = [line for line in losses(tmp_path / "last_only") if line]
    assert plain == [line for line in losses(tmp_path / "keep_best") if line] and len(plain) == 10
    values = {
        int(line["nimg"]): line["val/e_latent_lpips"]
        for line in read_stats(tmp_path / "keep_best")
        if "val/e_latent_lpips" in line
    }
    assert sorted(values) == list(range(4, 44, 4))
    best = min(values, key=lambda nimg: (values[nimg], nimg))
    assert checkpoint.complete_points(tmp_path / "keep_best" / "checkpoints") == sorted({best, 40})
    assert (tmp_path / "keep_best" / "health.png").is_file()
    assert len(list((tmp_path / "keep_best" / "previews").glob("preview-*.png"))) == 10
    assert json.loads((tmp_path / "keep_best" / "config.json").read_text())["length"]["keep_best"] is True


def test_a_resumed_run_repeats_a_missing_validation(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    validation = ("train.validate_pairs=4", "train.validate_images=8", "train.images=16")
    config = distill_config(teacher, pairs, *validation)
    train(config, tmp_path)
    stats, reports = tmp_path / "stats.jsonl", read_stats(tmp_path)
    assert [line["nimg"] for line in reports if "val/psnr" in line] == [8, 16]
    stats.write_text("".join(stats.read_text().splitlines(keepends=True)[:-1]))
    train(config, tmp_path)
    assert read_stats(tmp_path) == reports


def test_a_run_needs_its_init_only_at_the_start(config: DistillConfig, ode: Path, tmp_path: Path) -> None:
    init = tmp_path / "init"
    shutil.copytree(ode, init)
    started = replace(config, init=str(init))
    for images in (4, 8):
        settings = override(started, [f"train.images={images}"])
        train(settings, tmp_path / "run")
        shutil.rmtree(init, ignore_errors=True)


def test_reports_of_a_run_killed_before_its_first_checkpoint_are_dropped(
    teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    out, config = tmp_path / "run", distill_config(teacher, pairs, "train.images=8")
    running = Running(distill_arguments(config, out, "train.images=4000"), tmp_path / "log")
    running.wait_for(lambda: len(read_stats(out)) > 2)
    running.send(signal.SIGKILL)
    running.wait()
    assert not (out / "ended.json").exists(), "a killed run writes no ended.json"
    hours = read_stats(out)[-1]["time/device_hours"]
    succeed(d2g(distill_arguments(config, out), tmp_path / "log"))
    assert [line["nimg"] for line in read_stats(out)] == [4, 8]
    assert read_stats(out)[0]["time/device_hours"] > hours, "lost steps count, too"
    assert json.loads((out / "ended.json").read_text())["how"] == "done"


def test_a_failed_run_writes_ended_json_and_health_png(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    settings = ("optim.lr=1e30", "train.on_collapse=stop", "train.images=400", "train.plot=true")
    with pytest.raises((FloatingPointError, UserError)) as caught:
        train(distill_config(teacher, pairs, *settings), tmp_path)
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert ended["how"] == "failed" and ended["why"] == str(caught.value)
    assert (tmp_path / "health.png").is_file()


def test_refused_settings_leave_the_run_folder_usable(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    validation = ("train.validate_images=4", "train.images=4")
    with pytest.raises(SettingError, match="validate_pairs is 5000 of 12 pairs"):
        train(distill_config(teacher, pairs, *validation, "train.validate_pairs=5000"), tmp_path)
    train(distill_config(teacher, pairs, *validation, "train.validate_pairs=4"), tmp_path)


@pytest.mark.long
@pytest.mark.slow
def test_validate_option_measures_fid_during_training(tmp_path: Path) -> None:
    """`--validate miniature`: FID on a few scenes, with one process and with two FSDP2 ranks."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cube\na blue sphere\na green cone\n")
    settings = tiny.pair_config("miniature", str(prompts), num_pairs=8, steps=2, dtype="float16")
    generate_pairs(settings, tmp_path / "pairs")
    config = distill_config(Path("miniature"), tmp_path / "pairs", "train.images=8")
    validation = ("train.validate_pairs=2", "train.validate_images=4", "train.keep_best=true")
    arguments = distill_arguments(config, tmp_path / "run", *validation)
    options = ["--validate", "miniature", "--validate-num", "16"]
    succeed(d2g([*arguments, *options], tmp_path / "log"))
    lines = [line for line in read_stats(tmp_path / "run") if "val/fid" in line]
    assert [line["nimg"] for line in lines] == [4, 8]
    assert all(line["val/fid"] > 0 and line["val/psnr"] > 0 for line in lines)
    sharded = distill_arguments(config, tmp_path / "sharded", *validation, "engine.parallel=fsdp")
    succeed(*d2g_ranks([*sharded, *options], tmp_path / "log"))
    fids = [line["val/fid"] for line in read_stats(tmp_path / "sharded") if "val/fid" in line]
    assert fids == pytest.approx([line["val/fid"] for line in lines], rel=1e-3)
    refused = d2g([*distill_arguments(config, tmp_path / "other"), *options], tmp_path / "log")
    assert refused.code == 2 and "train.validate_images" in refused.error


def test_reports_include_terms_of_earlier_steps(config: DistillConfig, tmp_path: Path) -> None:
    """R1 acts at every third step and G at even steps, but each report contains both."""
    settings = ("gan.r1_interval=3", "gan.d_steps_per_g_step=2", "train.report_images=20", "train.images=40")
    succeed(d2g(distill_arguments(config, tmp_path / "run", *settings), tmp_path / "log"))
    lines = read_stats(tmp_path / "run")
    assert [line["nimg"] for line in lines] == [20, 40]
    for line in lines:
        assert {"loss/r1", "loss/d", "loss/g", "loss/g_gan", "grad/g", "grad/d", "d/auc"} <= set(line)
