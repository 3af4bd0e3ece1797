"""Ways to run that must not change what is learnt, and bad times: killed ranks, damage, long prompts."""

import json
import os
import random
import shutil
import signal
import socket
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
from jobs import Running, d2g, d2g_ranks, distill_arguments, distill_config, make_pairs
from pairgen.generate import generate_pairs

STEPS = ("gan.r1_interval=2", "gan.mix_fraction=0.5", "gan.optim.lr=1e-4", "train.images=16")


@pytest.fixture(scope="module")
def pairs(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(teacher, tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def ode(teacher: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short first stage to start from."""
    out = tmp_path_factory.mktemp("ode")
    train(distill_config(teacher, pairs, "train.images=8"), out)
    return out


@pytest.fixture(scope="module")
def config(teacher: Path, pairs: Path, ode: Path) -> DistillConfig:
    return distill_config(teacher, pairs, stage="gan", init=ode)


@pytest.fixture(scope="module")
def plain(config: DistillConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on one process with nothing special."""
    out = tmp_path_factory.mktemp("plain") / "run"
    done = d2g(distill_arguments(config, out, *STEPS), out.parent / "log")
    assert done.code == 0, done.stderr
    return out


def averages(run: Path, nimg: int = 16) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"{nimg:09d}" / "ema.safetensors")


def losses(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k.startswith("loss/")} for line in read_stats(run)]


def assert_same_learning(run: Path, plain: Path, rel: float = 1e-4) -> None:
    """Losses within rounding, and averages that moved alike."""
    for a, b in zip(losses(run), losses(plain), strict=True):
        assert a == pytest.approx(b, rel=rel, abs=1e-6)
    a, b = averages(run), averages(plain)
    assert a.keys() == b.keys() and all((a[k] - b[k]).abs().mean() < 1e-4 for k in b)


ALONE = {
    "accumulate": ["engine.gradient_accumulation=2"],
    "recompute": ["engine.activation_checkpointing=true"],
    "fsdp": ["engine.parallel=fsdp"],
    "compile": ["engine.compile=aot_eager"],
    "async": ["engine.async_checkpoints=true", "train.checkpoint_images=4"],
    "cache": ["data.text_cache=3"],
    "fused": ["optim.name=adamw_fused", "gan.optim.name=adamw_fused"],
}


@pytest.mark.parametrize("case", ALONE)
def test_the_engine_does_not_change_what_is_learnt(
    case: str, config: DistillConfig, plain: Path, tmp_path: Path
) -> None:
    done = d2g(distill_arguments(config, tmp_path / "run", *STEPS, *ALONE[case]), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert_same_learning(tmp_path / "run", plain)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_are_one_and_either_goes_on_for_the_other(
    parallel: str, config: DistillConfig, plain: Path, tmp_path: Path
) -> None:
    """Two steps on two ranks, then two on one, with another engine: as four on one."""
    out = tmp_path / "run"
    late = f"engine.async_checkpoints={json.dumps(parallel == 'fsdp')}"
    first = distill_arguments(config, out, *STEPS, f"engine.parallel={parallel}", late, "train.images=8")
    both = d2g_ranks(first, tmp_path / "log")
    assert [ended.code for ended in both] == [0, 0], both[0].stderr
    last = checkpoint.latest(out / "checkpoints")
    assert last is not None and last.meta["processes"] == 2
    assert len(list((last.folder / "state").glob("*.distcp"))) == 2, "each rank writes its own"
    done = d2g(distill_arguments(config, out, *STEPS), tmp_path / "log1")
    assert done.code == 0, done.stderr
    assert_same_learning(out, plain)


ROWS = (
    "gan.r1_rows=2",  # one for each rank
    "gan.r1_rows=4",
    "gan.penalty=approx gan.approx_sigma=1",
    "student.dropout=0.3",
    "gan.noise_augment=small",
)


@pytest.mark.slow
@pytest.mark.parametrize("option", ROWS)
def test_what_is_drawn_for_a_row_is_the_row_s_own(option: str, config: DistillConfig, tmp_path: Path) -> None:
    """Eight rows in one batch, and as two ranks' two micro-batches of two."""
    steps = STEPS[1:] if "approx" in option else STEPS  # the approximation is for every step
    settings = (*steps, "train.batch_size=8", "train.report_images=8", *option.split())
    alone = d2g(distill_arguments(config, tmp_path / "one", *settings), tmp_path / "log")
    assert alone.code == 0, alone.stderr
    shared = distill_arguments(config, tmp_path / "two", *settings, "engine.gradient_accumulation=2")
    both = d2g_ranks(shared, tmp_path / "log")
    assert [ended.code for ended in both] == [0, 0], both[0].stderr
    assert_same_learning(tmp_path / "two", tmp_path / "one")


def test_two_ranks_go_on_for_one(config: DistillConfig, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = d2g(distill_arguments(config, out, *STEPS, "train.images=8"), tmp_path / "log")
    assert done.code == 0, done.stderr
    more = distill_arguments(config, out, *STEPS, "engine.parallel=fsdp", "engine.gradient_accumulation=1")
    both = d2g_ranks(more, tmp_path / "log")
    assert [ended.code for ended in both] == [0, 0], both[0].stderr
    assert_same_learning(out, plain)


# Killed.


def start_ranks(arguments: list[str], folder: Path) -> list[Running]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [
        Running(arguments, folder / f"rank{r}", {**group, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(2)
    ]


@pytest.fixture(scope="module")
def long(config: DistillConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], Path]:
    """Twelve steps on two ranks that save at each, unbroken."""
    out = tmp_path_factory.mktemp("long") / "run"
    settings = (*STEPS, "train.images=48", "train.checkpoint_images=4")
    both = d2g_ranks(distill_arguments(config, out, *settings), out.parent / "log")
    assert [ended.code for ended in both] == [0, 0], both[0].stderr
    return settings, out


@pytest.mark.slow
@pytest.mark.parametrize("which", ["one", "all"])
def test_killed_ranks(
    which: str, config: DistillConfig, long: tuple[tuple[str, ...], Path], tmp_path: Path
) -> None:
    """kill -9 at a random moment; the other rank ends with one line; the rerun ends bit for bit alike."""
    settings, unbroken = long
    out = tmp_path / "run"
    arguments = distill_arguments(config, out, *settings)
    moment = random.Random(os.getpid()).randrange(1, 8)
    running = start_ranks(arguments, tmp_path / "first")
    folder = out / "checkpoints"
    running[0].wait_for(lambda: len(checkpoint.complete_points(folder)) > 0)
    running[0].wait_for(lambda: checkpoint.complete_points(folder)[-1:] >= [4 * moment])
    for victim in running if which == "all" else running[1:]:
        victim.send(signal.SIGKILL)
    ended = [each.wait(120) for each in running]
    assert ended[1].code == -signal.SIGKILL
    if which == "one":
        assert ended[0].code == 1
        assert "another process of this run is gone" in ended[0].error and "goes on from" in ended[0].error
    again = d2g_ranks(arguments, tmp_path / "again")
    assert [each.code for each in again] == [0, 0], again[0].stderr
    last = [checkpoint.open_checkpoint(run / "checkpoints" / "000000048") for run in (out, unbroken)]
    states = [sharded_checkpoint.read(each) for each in last]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert losses(out) == losses(unbroken)


@pytest.mark.slow
def test_torchrun_starts_killed_workers_again(
    config: DistillConfig, long: tuple[tuple[str, ...], Path], tmp_path: Path
) -> None:
    """One worker is killed with -9; torchrun ends the other, starts both, and they go on to the same end."""
    settings, unbroken = long
    out, root = tmp_path / "run", Path(__file__).resolve().parents[2]
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
        assert running.wait(240) == 0, (tmp_path / "log").read_text()
    finally:
        running.kill()
    assert losses(out) == losses(unbroken)
    assert all(torch.equal(value, averages(unbroken, 48)[name]) for name, value in averages(out, 48).items())


def test_sigterm_saves_on_all_ranks(config: DistillConfig, tmp_path: Path) -> None:
    """As on a machine that is taken away: only one rank may hear of it, and its loader's workers too."""
    out = tmp_path / "run"
    arguments = distill_arguments(config, out, *STEPS, "train.images=4000", "train.loader_workers=2")
    running = start_ranks(arguments, tmp_path / "log")
    running[0].wait_for(lambda: len(read_stats(out)) > 1)
    for _ in range(2):
        running[1].send(signal.SIGTERM)  # to the whole group
        time.sleep(0.05)
    ended = [each.wait(120) for each in running]
    assert [each.code for each in ended] == [130, 130], [each.stderr for each in ended]
    last = checkpoint.latest(out / "checkpoints")
    assert last is not None and "safe on disk" in ended[0].stderr
    sharded_checkpoint.verify(last)


# Other bad times.


def damaged(run: Path) -> None:
    shard = next((run / "checkpoints" / "000000016" / "state").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-64])


@pytest.mark.parametrize("harm", [damaged, None])
def test_a_checkpoint_that_is_not_this_run_s(
    harm: Callable[[Path], None] | None, config: DistillConfig, plain: Path, ode: Path, tmp_path: Path
) -> None:
    """A damaged file, or a folder that another config wrote, put in place of one's own."""
    out = tmp_path / "run"
    done = d2g(distill_arguments(config, out, *STEPS), tmp_path / "log")
    assert done.code == 0, done.stderr
    if harm is not None:
        harm(out)
    else:
        changed = distill_arguments(config, tmp_path / "other", *STEPS, "gan.weight=1")
        other = d2g(changed, tmp_path / "log")
        assert other.code == 0, other.stderr
        (out / "checkpoints" / "000000016").rename(tmp_path / "away")
        (tmp_path / "other" / "checkpoints" / "000000016").rename(out / "checkpoints" / "000000016")
    ended = d2g(distill_arguments(config, out, *STEPS, "train.images=20"), tmp_path / "log")
    assert ended.code == 1 and "continue from the checkpoint before it" in ended.error
    assert ("of a run with other networks" in ended.error) == (harm is None)


def test_a_pair_that_is_not_finite_is_named_and_made_again(
    config: DistillConfig, plain: Path, tmp_path: Path
) -> None:
    store, out = tmp_path / "pairs", tmp_path / "run"
    shutil.copytree(config.pairs, store)
    with h5py.File(sorted(store.rglob("*.h5"))[1], "r+") as file:
        number = int(file["index"][2])
        file["latent"][2, 0, 0, 0] = float("nan")
    arguments = distill_arguments(replace(config, pairs=str(store)), out, *STEPS)
    both = d2g_ranks(arguments, tmp_path / "log")
    for ended in both:
        assert ended.code == 1 and f"error: pair {number} of {store}: values that are not" in ended.error
        assert "`d2g pairs repair` makes it again, then the same command goes on" in ended.error
        assert ended.error.endswith(f"losses, logits and rows of the step: {out / 'failure'}")
    reports = [json.loads((out / "failure" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert number in [pair for report in reports for pair in report["pairs"]]
    assert all(report["norm"] == "nan" and len(report["pairs"]) == 2 for report in reports)
    assert {len(logits) for report in reports for logits in report["logits"].values()} == {6}
    assert d2g(["pairs", "repair", str(store)], tmp_path / "log").code == 0
    both = d2g_ranks(arguments, tmp_path / "log")
    assert [ended.code for ended in both] == [0, 0], both[0].stderr
    assert_same_learning(out, plain)


def test_three_ranks_resume_bit_for_bit(config: DistillConfig, tmp_path: Path) -> None:
    """DDP moves gradients about after a run's first step, where the order of a sum of three would show."""
    settings = (*STEPS, "train.batch_size=6", "train.report_images=6", "train.images=24")
    for run, lengths in (("once", (24,)), ("twice", (12, 24))):
        for images in lengths:
            arguments = distill_arguments(config, tmp_path / run, *settings, f"train.images={images}")
            ended = d2g_ranks(arguments, tmp_path / "log", 3)
            assert [each.code for each in ended] == [0, 0, 0], ended[0].stderr
    states = [
        sharded_checkpoint.read(checkpoint.open_checkpoint(tmp_path / run / "checkpoints" / "000000024"))
        for run in ("once", "twice")
    ]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert losses(tmp_path / "once") == losses(tmp_path / "twice")


def test_a_batch_of_one_per_rank_is_refused(config: DistillConfig, tmp_path: Path) -> None:
    both = d2g_ranks(distill_arguments(config, tmp_path / "run", "train.batch_size=2"), tmp_path / "log")
    assert [ended.code for ended in both] == [2, 2]
    assert "a micro-batch has 1 row per process" in both[0].error
    assert not (tmp_path / "run").exists()


def test_the_first_stage_and_one_without_mixing_take_odd_numbers(
    config: DistillConfig, teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    rows = ("train.batch_size=3", "train.images=6")
    assert train(distill_config(teacher, pairs, *rows), tmp_path / "ode").images == 6
    assert train(override(config, [*rows, "gan.mix_fraction=0"]), tmp_path / "gan").images == 6
    with pytest.raises(SettingError, match="has 3 rows per process"):
        override(config, rows)


def test_a_prompt_beyond_the_tokenizer_s_limit_is_cut_as_the_teacher_cut_it(
    teacher: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(" ".join([caption] * 40) for caption in tiny.CAPTIONS) + "\n")
    generate_pairs(tiny.pair_config(str(teacher), str(prompts)), tmp_path / "pairs")
    summary = train(distill_config(teacher, tmp_path / "pairs", "train.images=8"), tmp_path / "run")
    assert summary.images == 8 and summary.loss["g"] > 0


# SDXL.


def test_sdxl_s_recipe_on_a_tiny_sdxl(tmp_path: Path) -> None:
    """Both stages with two text encoders: noise before D, no R1, held-out pairs, a preview."""
    folder = tiny_teachers.save_sdxl(tmp_path / "teacher")
    tiny.save_lpips(tmp_path / "teacher" / "latent_lpips")
    pairs, held = make_pairs(Path(folder), tmp_path), ("train.validate_pairs=3", "train.validate_images=8")
    train(distill_config(Path(folder), pairs, *held, "train.preview_prompts=2"), tmp_path / "ode")
    settings = ("gan.penalty=none", "gan.noise_augment=uniform", "gan.weight=1", "data.text_cache=10")
    config = distill_config(Path(folder), pairs, *settings, stage="gan", init=tmp_path / "ode")
    summary = train(config, tmp_path / "gan")
    assert summary.images == 20 and set(summary.loss) == {"d", "e_latent_lpips", "g_gan", "g"}
    heads = {name for name in read_stats(tmp_path / "gan")[-1] if name.startswith("logit/real/")}
    blocks = len(pretrained.load_on_meta(folder, "unet").up_blocks)
    assert len(heads) == 3 * blocks


def test_photographs_count_as_real(config: DistillConfig, plain: Path, tmp_path: Path) -> None:
    """They move D's loss, the same on two ranks as on one."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(5):
        Image.new("RGB", (40, 30), (40 * number, 10, 200)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"a red cube {number}")
    settings = (*STEPS, f"gan.real={photos}", "gan.real_fraction=0.3")
    done = d2g(distill_arguments(config, tmp_path / "one", *settings), tmp_path / "log")
    assert done.code == 0, done.stderr
    both = d2g_ranks(distill_arguments(config, tmp_path / "two", *settings), tmp_path / "log")
    assert [ended.code for ended in both] == [0, 0], both[0].stderr
    assert_same_learning(tmp_path / "two", tmp_path / "one")
    assert losses(tmp_path / "one")[0]["loss/d"] != losses(plain)[0]["loss/d"]


# Validation.


def test_validation_does_not_touch_training_and_the_best_stays(
    config: DistillConfig, teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    """A learning rate that soon is too high: the best is an early point, which pruning leaves."""
    held = ("train.validate_pairs=4", "train.validate_images=4", "train.images=40", "optim.lr=0.01")
    keep = ("train.keep_best=true", "train.keep_checkpoints=1", "train.preview_prompts=2")
    train(distill_config(teacher, pairs, *held), tmp_path / "seen")
    train(distill_config(teacher, pairs, *held, *keep), tmp_path / "kept")
    plain = [line for line in losses(tmp_path / "seen") if line]
    assert plain == [line for line in losses(tmp_path / "kept") if line] and len(plain) == 10
    values = {
        int(line["nimg"]): line["val/e_latent_lpips"]
        for line in read_stats(tmp_path / "kept")
        if "val/e_latent_lpips" in line
    }
    assert sorted(values) == list(range(4, 44, 4))
    best = min(values, key=lambda nimg: (values[nimg], nimg))
    assert checkpoint.complete_points(tmp_path / "kept" / "checkpoints") == sorted({best, 40})
    assert (tmp_path / "kept" / "health.png").is_file()
    assert len(list((tmp_path / "kept" / "previews").glob("preview-*.png"))) == 10
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["length"]["keep_best"] is True


def test_a_validation_that_a_kill_came_before_is_made_up_for(
    teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    held = ("train.validate_pairs=4", "train.validate_images=8", "train.images=16")
    config = distill_config(teacher, pairs, *held)
    train(config, tmp_path)
    stats, whole = tmp_path / "stats.jsonl", read_stats(tmp_path)
    assert [line["nimg"] for line in whole if "val/psnr" in line] == [8, 16]
    stats.write_text("".join(stats.read_text().splitlines(keepends=True)[:-1]))
    train(config, tmp_path)
    assert read_stats(tmp_path) == whole


def test_a_run_needs_its_init_only_to_begin(config: DistillConfig, ode: Path, tmp_path: Path) -> None:
    init = tmp_path / "init"
    shutil.copytree(ode, init)
    started = replace(config, init=str(init))
    for images in (4, 8):
        settings = override(started, [f"train.images={images}"])
        train(settings, tmp_path / "run")
        shutil.rmtree(init, ignore_errors=True)


def test_lines_of_a_run_that_died_before_its_first_checkpoint_go(
    teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    out, made = tmp_path / "run", distill_config(teacher, pairs, "train.images=8")
    running = Running(distill_arguments(made, out, "train.images=4000"), tmp_path / "log")
    running.wait_for(lambda: len(read_stats(out)) > 2)
    running.send(signal.SIGKILL)
    running.wait()
    assert not (out / "ended.json").exists(), "nobody knows how it ended"
    done = d2g(distill_arguments(made, out), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert [line["nimg"] for line in read_stats(out)] == [4, 8]
    assert json.loads((out / "ended.json").read_text())["how"] == "done"


def test_a_run_that_breaks_says_so_and_leaves_its_panel(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    settings = ("optim.lr=1e30", "train.on_collapse=stop", "train.images=400")
    with pytest.raises((FloatingPointError, UserError)) as caught:
        train(distill_config(teacher, pairs, *settings), tmp_path)
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert ended["how"] == "failed" and ended["why"] == str(caught.value)
    assert (tmp_path / "health.png").is_file()


def test_what_is_refused_before_the_first_step_blocks_no_folder(
    teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    held = ("train.validate_images=4", "train.images=4")
    with pytest.raises(SettingError, match="validate_pairs is 5000 of 12 pairs"):
        train(distill_config(teacher, pairs, *held, "train.validate_pairs=5000"), tmp_path)
    train(distill_config(teacher, pairs, *held, "train.validate_pairs=4"), tmp_path)


def test_fid_on_the_way_decides_which_point_is_best(tmp_path: Path) -> None:
    """`--validate`: the miniature's own protocol, on a few scenes, through the command line."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cube\na blue sphere\na green cone\n")
    settings = tiny.pair_config("miniature", str(prompts), num_pairs=8, steps=2, dtype="float16")
    generate_pairs(settings, tmp_path / "pairs")
    config = distill_config(Path("miniature"), tmp_path / "pairs", "train.images=8")
    held = ("train.validate_pairs=2", "train.validate_images=4", "train.keep_best=true")
    arguments = distill_arguments(config, tmp_path / "run", *held)
    asked = ["--validate", "miniature", "--validate-num", "16"]
    done = d2g([*arguments, *asked], tmp_path / "log")
    assert done.code == 0, done.stderr
    lines = [line for line in read_stats(tmp_path / "run") if "val/fid" in line]
    assert [line["nimg"] for line in lines] == [4, 8]
    assert all(line["val/fid"] > 0 and line["val/psnr"] > 0 for line in lines)
    shards = distill_arguments(config, tmp_path / "shards", *held, "engine.parallel=fsdp")
    both = d2g_ranks([*shards, *asked], tmp_path / "log")
    assert [ended.code for ended in both] == [0, 0], both[0].stderr
    fids = [line["val/fid"] for line in read_stats(tmp_path / "shards") if "val/fid" in line]
    assert fids == pytest.approx([line["val/fid"] for line in lines], rel=1e-3)
    again = d2g([*distill_arguments(config, tmp_path / "other"), *asked], tmp_path / "log")
    assert again.code == 2 and "train.validate_images" in again.error


def test_reports_hold_what_only_some_steps_have(config: DistillConfig, tmp_path: Path) -> None:
    """R1 of the third step and G's losses of even ones, in reports at other steps."""
    settings = ("gan.r1_interval=3", "gan.d_steps_per_g_step=2", "train.report_images=20", "train.images=40")
    done = d2g(distill_arguments(config, tmp_path / "run", *settings), tmp_path / "log")
    assert done.code == 0, done.stderr
    lines = read_stats(tmp_path / "run")
    assert [line["nimg"] for line in lines] == [20, 40]
    for line in lines:
        assert {"loss/r1", "loss/d", "loss/g", "loss/g_gan", "grad/g", "grad/d", "d/auc"} <= set(line)
