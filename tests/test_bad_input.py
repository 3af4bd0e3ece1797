"""Bad input, damaged files, full disks and signals: one line of error, the right exit code, nothing lost.

Every command runs in its own process (jobs.d2g), so that signals and exit codes are real.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from d2g.core.distributed import process_group, sharded_checkpoint
from d2g.core.distributed.checkpoint import open_checkpoint
from d2g.core.shuffle import permuted_batch
from d2g.core.tracking.run_directory import read_stats
from distill.training.train import train
from forks import environments
from jobs import Running, d2g, d2g_ranks, distill_arguments, distill_config, make_pairs
from pairgen.store.reader import PairReader
from pairgen.store.spec import create_store, read_spec
from pairgen.store.writer import PairWriter
from pairgen.verify import verify_store


@pytest.fixture(scope="module")
def job(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts.txt, pairs/ and a short ode/ run. Read only."""
    folder = tmp_path_factory.mktemp("job")
    train(distill_config(teacher, make_pairs(teacher, folder), "train.images=8"), folder / "ode")
    return folder


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def generate(teacher: Path | str, prompts: Path | str, out: Path, *sets: str) -> list[str]:
    settings = [
        "num_pairs=12",
        "steps=4",
        "guidance=3",
        "shard_size=5",
        "batch_size=4",
        "dtype=float32",
        *sets,
    ]
    options = ["--teacher", str(teacher), "--prompts", str(prompts), "--out", str(out)]
    return ["pairs", "generate", *options, *(part for s in settings for part in ("--set", s))]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Teachers.


def _truncate_unet(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "the folder is missing": (shutil.rmtree, "no such folder; give a folder in diffusers layout or a hub id"),
    "no VAE": (
        lambda folder: shutil.rmtree(folder / "vae"),
        "no vae; expected the components unet, vae, text_encoder, tokenizer, scheduler",
    ),
    "a truncated UNet": (_truncate_unet, "unet cannot be loaded"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_the_error_for_a_broken_teacher_comes_before_anything_is_written(
    case: str, teacher: Path, job: Path, tmp_path: Path
) -> None:
    damage, message = BROKEN[case]
    shutil.copytree(teacher, tmp_path / "broken")
    damage(tmp_path / "broken")
    ended = d2g(generate(tmp_path / "broken", job / "prompts.txt", tmp_path / "pairs"), tmp_path / "log")
    assert ended.code == 1 and message in ended.error and str(tmp_path / "broken") in ended.error
    assert not (tmp_path / "pairs").exists()


# Prompts.


# Damaged pairs.


def _truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-100])


def _flip(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    latent = PairReader(shard.parents[1]).read([7]).latents.numpy().tobytes()
    data[bytes(data).index(latent)] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip])
def test_a_damaged_shard_is_reported_quarantined_and_generated_again(
    damage: Callable[[Path], None], teacher: Path, job: Path, tmp_path: Path, log: Path
) -> None:
    pairs = tmp_path / "pairs"
    shutil.copytree(job / "pairs", pairs)
    damage(pairs / "shards" / "pairs-00001.h5")
    config = distill_config(teacher, pairs, "train.checkpoint_images=4")
    refused = d2g(distill_arguments(config, tmp_path / "run"), log)
    assert refused.code == 1 and "pairs-00001.h5" in refused.error and "d2g pairs repair" in refused.error
    verified = d2g(["pairs", "verify", str(pairs), "--json"], log)
    assert verified.code == 1 and '"shards/pairs-00001.h5"' in verified.stdout and "not ok" in verified.error
    assert d2g(["pairs", "repair", str(pairs)], log).code == 0
    assert (pairs / "quarantine" / "pairs-00001.h5").is_file()
    assert d2g(generate(teacher, job / "prompts.txt", pairs), log).code == 0
    assert verify_store(pairs).ok
    assert torch.equal(
        PairReader(pairs).read(range(12)).noise, PairReader(job / "pairs").read(range(12)).noise
    )
    assert d2g(distill_arguments(config, tmp_path / "run"), log).code == 0


def test_a_missing_student_or_lpips_is_an_error(teacher: Path, job: Path, tmp_path: Path, log: Path) -> None:
    gan = distill_arguments(
        distill_config(teacher, job / "pairs", stage="gan", init=tmp_path / "no"), tmp_path / "run"
    )
    ended = d2g(gan, log)
    assert ended.code == 1 and f"student {tmp_path / 'no'}" in ended.error
    ode = distill_arguments(
        distill_config(teacher, job / "pairs"), tmp_path / "run", f"lpips={tmp_path / 'no'}"
    )
    ended = d2g(ode, log)
    assert ended.code == 1 and str(tmp_path / "no") in ended.error
    assert not (tmp_path / "run").exists()


# Damaged files of a run.


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        (
            "config.json",
            "copy it from another --out, where the same command as before writes it at its start",
        ),
        ("checkpoints/000000008/meta.json", "000000008 to continue from the checkpoint before it"),
    ],
)
def test_the_error_names_a_damaged_file_of_a_run(
    file: str, remedy: str, job: Path, teacher: Path, tmp_path: Path, log: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(job / "ode", run)
    (run / file).write_bytes((run / file).read_bytes()[:20])
    sampled = d2g(["sample", "--student", str(run), "--prompt", "a", "--out", str(tmp_path / "samples")], log)
    gan = distill_config(teacher, job / "pairs", stage="gan", init=run)
    for ended in (sampled, d2g(distill_arguments(gan, tmp_path / "gan"), log)):
        assert ended.code == 1 and f"{run / file} is damaged" in ended.error
        assert ended.error.endswith(remedy), ended.error
    assert not (tmp_path / "samples").exists() and not (tmp_path / "gan").exists()


@pytest.mark.parametrize("name", ["student.json", "ema.safetensors"])
def test_the_error_names_a_damaged_file_of_an_export(name: str, job: Path, tmp_path: Path, log: Path) -> None:
    assert d2g(_export(tmp_path, job, tmp_path / "student"), log).code == 0
    file = tmp_path / "student" / name
    file.write_bytes(file.read_bytes()[:20])
    arguments = ["sample", "--student", str(file.parent), "--prompt", "a", "--out", str(tmp_path / "samples")]
    ended = d2g(arguments, log)
    assert (
        ended.code == 1 and f"{file} is damaged" in ended.error and "export the student again" in ended.error
    )


def test_a_run_resumes_after_its_damaged_checkpoint_is_deleted(
    teacher: Path, job: Path, tmp_path: Path, log: Path
) -> None:
    """The error says to delete the folder of the checkpoint; then the same command works."""
    config = distill_config(teacher, job / "pairs", "train.images=12", "train.checkpoint_images=4")
    arguments = distill_arguments(config, tmp_path / "run")
    assert d2g(arguments, log).code == 0
    last = tmp_path / "run" / "checkpoints" / "000000012"
    (last / "meta.json").write_text("{")
    assert f"delete {last} to continue" in d2g(arguments, log).error
    shutil.rmtree(last)
    assert d2g(arguments, log).code == 0
    assert [line["nimg"] for line in read_stats(tmp_path / "run")] == [4, 8, 12]


def test_the_empty_prompt_is_valid(job: Path, tmp_path: Path, log: Path) -> None:
    arguments = ["sample", "--student", str(job / "ode"), "--prompt", "", "--out", str(tmp_path), "--json"]
    assert d2g(arguments, log).json["images"] == 1 and (tmp_path / "00000.png").is_file()


# Full disks: a limit on the file size makes write(2) fail.


def test_a_full_disk_while_generating_pairs(teacher: Path, job: Path, tmp_path: Path, log: Path) -> None:
    """A shard exceeds the limit. Without the limit, the same command completes the store."""
    out, sets = tmp_path / "pairs", ["num_pairs=48", "shard_size=24", "batch_size=8"]
    ended = d2g(generate(teacher, job / "prompts.txt", out, *sets), log, file_limit=12_000)
    assert ended.code == 1 and "no room to write in" in ended.error
    assert (
        "0 complete shards and 0 rows of pairs-00000.h5 are safe; make room and run the same command"
        in ended.error
    )
    assert not list(out.rglob("*.tmp")) and not list(out.glob("shards/*"))
    assert d2g(generate(teacher, job / "prompts.txt", out, *sets), log).code == 0
    assert verify_store(out).ok


def test_a_full_disk_while_writing_a_checkpoint(teacher: Path, job: Path, tmp_path: Path, log: Path) -> None:
    out = tmp_path / "run"
    first = distill_config(teacher, job / "pairs", "train.images=8", "train.checkpoint_images=8")
    assert d2g(distill_arguments(first, out), log).code == 0
    before = files(out / "checkpoints")
    more = replace(first, train=replace(first.train, images=24))
    ended = d2g(distill_arguments(more, out), log, file_limit=50_000)
    assert (
        ended.code == 1 and f"the last good checkpoint is {out / 'checkpoints' / '000000008'}" in ended.error
    )
    assert "free space, then run the same command again" in ended.error
    assert files(out / "checkpoints") == before and os.listdir(out / "checkpoints") == ["000000008"]
    assert d2g(distill_arguments(more, out), log).code == 0
    assert [line["nimg"] for line in read_stats(out)] == [4, 8, 12, 16, 20, 24]


def test_a_full_disk_while_writing_images(job: Path, tmp_path: Path, log: Path) -> None:
    arguments = ["sample", "--student", str(job / "ode"), "--prompt", "a", "--out", str(tmp_path / "samples")]
    ended = d2g(arguments, log, file_limit=600)
    assert ended.code == 1 and "cannot write" in ended.error and ".png" in ended.error


# SIGINT and SIGTERM.


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_while_pairs_are_generated(
    number: int, teacher: Path, job: Path, tmp_path: Path, log: Path
) -> None:
    out, sets = tmp_path / "pairs", ["num_pairs=60", "steps=8", "shard_size=20", "batch_size=1"]
    running = Running(generate(teacher, job / "prompts.txt", out, *sets), log)
    running.wait_for(lambda: (out / "shards" / "pairs-00000.h5").exists())
    running.send(number)
    ended = running.wait()
    assert ended.code == 130 and f"of 60 pairs are safe in {out}; run the same command again" in ended.error
    safe = int(ended.error.split("stopped; ")[1].split()[0])
    again = d2g([*generate(teacher, job / "prompts.txt", out, *sets), "--json"], log)
    assert again.code == 0 and f'"new_pairs": {60 - safe}' in again.stdout and 20 <= safe <= 60
    assert verify_store(out).ok


@pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning"
)  # Python 3.12 warns about forking with threads
@pytest.mark.parametrize(
    ("stage", "number", "workers"), [("ode", signal.SIGINT, 1), ("gan", signal.SIGTERM, 0)]
)
def test_a_signal_while_a_student_trains(
    stage: str, number: int, workers: int, teacher: Path, job: Path, tmp_path: Path, log: Path
) -> None:
    out, init = tmp_path / "run", job / "ode" if stage == "gan" else ""
    settings = ("train.images=1000000", f"train.loader_workers={workers}")
    config = distill_config(teacher, job / "pairs", *settings, stage=stage, init=init)
    running = Running(distill_arguments(config, out), log)
    running.wait_for(lambda: len(read_stats(out)) >= 2 if (out / "stats.jsonl").exists() else False)
    running.send(number)
    ended = running.wait()
    assert ended.code == 130 and "run the same command again to go on" in ended.error
    (safe,) = (out / "checkpoints").iterdir()
    assert f"stopped at image {int(safe.name)}; safe on disk: {safe}" in ended.error
    more = replace(config, train=replace(config.train, images=int(safe.name) + 4))
    assert d2g(distill_arguments(more, out), log).code == 0
    assert [line["nimg"] for line in read_stats(out)] == list(range(4, int(safe.name) + 8, 4))


def test_a_signal_while_the_input_is_read(teacher: Path, tmp_path: Path, log: Path) -> None:
    """The prompt file is a pipe to which nothing is written, so the command waits for it."""
    pipe = tmp_path / "prompts.txt"
    os.mkfifo(pipe)
    write_ends: list[int] = []

    def command_has_opened_the_pipe() -> bool:
        try:
            write_ends.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # the command has not opened the pipe yet
            return False
        return True

    def command_sleeps() -> bool:
        return "State:\tS" in Path(f"/proc/{running.pid}/status").read_text()

    running = Running(generate(teacher, pipe, tmp_path / "pairs"), log)
    running.wait_for(command_has_opened_the_pipe)
    # Python does not see a signal that comes between its last look for one and the read.
    running.wait_for(command_sleeps)
    running.send(signal.SIGINT)
    ended = running.wait()
    os.close(write_ends[0])
    assert ended.code == 130 and "error: interrupted; what was finished before is safe" in ended.error
    assert not (tmp_path / "pairs").exists()


# Losses that are not finite.


@pytest.fixture(scope="module")
def pairs_with_overflow(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairs of the job with one huge latent in the third batch of seed 0, whose features overflow."""
    folder = tmp_path_factory.mktemp("overflow")
    spec, rows = read_spec(job / "pairs"), PairReader(job / "pairs").read(range(12))
    rows.latents[permuted_batch(0, 12, 8, 4)[1]] = 3e38
    create_store(folder, spec)
    for shard in range(spec.num_shards):
        with PairWriter(folder, spec, shard) as writer:
            index = list(spec.rows(shard))
            writer.append(rows.noise[index], rows.latents[index], [rows.prompts[i] for i in index], index)
            writer.commit()
    return folder


@pytest.mark.parametrize("stage", ["ode", "gan"])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(
    stage: str, teacher: Path, job: Path, pairs_with_overflow: Path, tmp_path: Path, log: Path
) -> None:
    out, init = tmp_path / "run", job / "ode" if stage == "gan" else ""
    sets = ["regression.augment=none", "train.checkpoint_images=4"]
    sets += ["gan.r1_gamma=0", "gan.mix_fraction=0"] if stage == "gan" else []
    ended = d2g(
        distill_arguments(distill_config(teacher, pairs_with_overflow, stage=stage, init=init), out, *sets),
        log,
    )
    last = out / "checkpoints" / "000000008"
    assert (
        ended.code == 1
        and "is nan at image 8" in ended.error
        and f"last good checkpoint: {last};" in ended.error
    )
    assert f"lower the learning rate in another --out, from there with --set init={out}" in ended.error
    assert f"losses, logits and rows of the step: {out / 'failure'};" in ended.error
    report = json.loads((out / "failure" / "rank-0.json").read_text())
    gradient = "grad/d" if stage == "gan" else "grad/g"
    assert (report["step"], report["images"], report["gradient"], report["norm"]) == (2, 8, gradient, "nan")
    assert len(set(report["pairs"])) == 4 and "nan" in report["losses"].values()
    assert ("loss/d" in report["losses"]) == (stage == "gan")
    assert set(report["logits"]) == ({"real", "fake", "student"} if stage == "gan" else set())
    assert sorted(os.listdir(out / "checkpoints")) == ["000000004", "000000008"]
    saved = [
        *load_file(last / "ema.safetensors").values(),
        *sharded_checkpoint.read(open_checkpoint(last)).values(),
    ]
    assert all(torch.isfinite(value).all() for value in saved)
    assert [line["nimg"] for line in read_stats(out)] == [4, 8]


# Output that cannot be written.


def _generate(teacher: Path, job: Path, out: Path) -> list[str]:
    return generate(teacher, job / "prompts.txt", out)


def _distill(teacher: Path, job: Path, out: Path) -> list[str]:
    return distill_arguments(distill_config(teacher, job / "pairs"), out)


def _sample(teacher: Path, job: Path, out: Path) -> list[str]:
    return ["sample", "--student", str(job / "ode"), "--prompt", "a", "--out", str(out)]


def _export(teacher: Path, job: Path, out: Path) -> list[str]:
    return ["export", "--student", str(job / "ode"), "--out", str(out)]


def _merge(teacher: Path, job: Path, out: Path) -> list[str]:
    return ["pairs", "merge", str(job / "pairs"), "--out", str(out)]


def _train_teacher(teacher: Path, job: Path, out: Path) -> list[str]:
    return [
        "teacher",
        "train",
        "--data",
        "scenes",
        "--stages",
        "data",
        "--out",
        str(out),
        "--set",
        "images=1",
    ]


@pytest.mark.parametrize("arguments", [_generate, _distill, _sample, _export, _merge, _train_teacher])
def test_output_that_cannot_be_written_is_an_error(
    arguments: Callable[[Path, Path, Path], list[str]], teacher: Path, job: Path, tmp_path: Path, log: Path
) -> None:
    """The output is inside a file instead of a folder, which fails for every user, also for root."""
    (tmp_path / "file").write_text("not a folder")
    ended = d2g(arguments(teacher, job, tmp_path / "file" / "out"), log)
    assert ended.code == 1 and f"cannot write {tmp_path / 'file' / 'out'}" in ended.error
    assert "unexpected" not in ended.error and (tmp_path / "file").read_text() == "not a folder"


# Several processes under torchrun: they use its store to print an error of all ranks only once.


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A TCPStore like torchrun's, and the environment variables that point to it.

    A rank waits for the error of rank 0 for as long as a busy machine may need to start it.
    """
    monkeypatch.setattr(process_group, "GRACE", GRACE)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}


GRACE = timedelta(seconds=100)
INVALID_COMMAND = ["distill", "ode", "--set", "optim.lr=Infinity"]


def start_rank_1(arguments: list[str], log: Path, environment: Mapping[str, str]) -> Running:
    """Start rank 1 of two, without rank 0."""
    return Running(arguments, log / "rank1", {**environments(2)[1], **environment})


def test_an_invalid_setting_is_printed_by_rank_0_only(torchrun: dict[str, str], log: Path) -> None:
    first, second = d2g_ranks(INVALID_COMMAND, log, environment=torchrun)
    assert (first.code, second.code, second.stderr) == (2, 2, "")
    assert first.error == "error: setting 'optim.lr' is 'Infinity'; expected a finite number"
    first, second = d2g_ranks(["--debug", *INVALID_COMMAND], log / "debug", environment=torchrun)
    assert "Traceback" in first.stderr and "Traceback" in second.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pairs generate --gidance 3", "--guidance"),
        ("pairs genrate", "generate"),
        ("--nope", "--nope"),
        ("pairs generate --steps many", "--steps"),
        ("pairs generate --batch-size none", "neither a number of rows nor auto"),
    ],
)
def test_a_usage_error_is_printed_by_rank_0_only(
    words: str, message: str, torchrun: dict[str, str], log: Path
) -> None:
    environment = {**torchrun, "COLUMNS": "200"}
    first, second = d2g_ranks(words.split(), log, environment=environment)
    assert (first.code, second.code, second.stderr, second.stdout) == (2, 2, "", "")
    assert message in first.stderr and first.stdout == ""


def test_a_usage_error_of_rank_1_only_is_printed(torchrun: dict[str, str], log: Path) -> None:
    second = start_rank_1(["pairs", "genrate"], log, torchrun)
    first = d2g(INVALID_COMMAND, log, environment={**environments(2)[0], **torchrun})
    ended = second.wait()
    assert (first.code, ended.code) == (2, 2) and "'genrate'" in ended.stderr


def test_an_error_of_all_ranks_after_init_is_printed_by_rank_0_only(
    teacher: Path, tmp_path: Path, torchrun: dict[str, str], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_group, "GRACE_IN_STEP", GRACE)
    arguments = distill_arguments(distill_config(teacher, tmp_path / "none"), tmp_path / "run")
    first, second = d2g_ranks(arguments, log, environment=torchrun)
    # Gloo of torch 2.9 writes lines of its own.
    lines = [line for line in second.stderr.splitlines() if not line.startswith("[Gloo]")]
    assert (first.code, second.code, lines) == (1, 1, [])
    assert str(tmp_path / "none") in first.error


def test_a_rank_reports_that_another_rank_has_exited(
    teacher: Path, tmp_path: Path, torchrun: dict[str, str], log: Path
) -> None:
    """Only rank 0 reads the prompts and fails; the connection of rank 1 is closed."""
    arguments = generate(teacher, tmp_path / "none.txt", tmp_path / "pairs")
    first, second = d2g_ranks(arguments, log, environment=torchrun)
    assert (first.code, second.code) == (1, 1) and "none.txt: No such file" in first.error
    assert second.error == ("error: another process is gone (process 1 lost it); its own message says why")


@pytest.mark.parametrize("command", ["pairs", "distill"])
def test_a_file_missing_on_one_rank_is_reported_at_once_and_first(
    command: str, teacher: Path, job: Path, tmp_path: Path, torchrun: dict[str, str], log: Path
) -> None:
    """Rank 1 has no teacher or no pairs. Rank 0 waits for it and then reports that it has exited."""
    complete, missing = tmp_path / "complete", tmp_path / "missing"
    complete.symlink_to(teacher if command == "pairs" else job / "pairs")

    def arguments(source: Path) -> list[str]:
        if command == "pairs":
            return generate(source, job / "prompts.txt", tmp_path / "out")
        return distill_arguments(distill_config(teacher, source), tmp_path / "out")

    start = time.monotonic()
    second = start_rank_1(arguments(missing), log, torchrun)
    first = Running(arguments(complete), log / "rank0", {**environments(2)[0], **torchrun})
    ended = second.wait()
    assert time.monotonic() - start < GRACE.total_seconds() and str(missing) in ended.error
    assert "is gone (process 0 lost it); its own message says why" in first.wait().error and ended.code == 1
    assert second.err.stat().st_mtime_ns < first.err.stat().st_mtime_ns


def catches_sigterm(running: Running) -> bool:
    """Whether the process handles SIGTERM, as it does while it waits for the message of rank 0."""
    status = Path(f"/proc/{running.pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) & 1 << (signal.SIGTERM - 1))


def test_an_error_of_one_rank_only_is_printed(torchrun: dict[str, str], log: Path) -> None:
    """Rank 1 prints its error if rank 0 has another error, or had the same error only before a restart.

    After one rank has exited, torchrun sends SIGTERM to the others; then rank 1 prints its error at once.
    """
    second = start_rank_1(INVALID_COMMAND, log, torchrun)
    other = ["distill", "ode", "--set", "optim.lr=x"]
    first = d2g(other, log, environment={**environments(2)[0], **torchrun})
    assert "takes float" in first.error and "'optim.lr' is 'Infinity'" in second.wait().error
    again = {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert d2g(INVALID_COMMAND, log, environment={**environments(2)[0], **torchrun, **again}).code == 2
    second = start_rank_1(INVALID_COMMAND, log / "again", {**torchrun, "TORCHELASTIC_RESTART_COUNT": "2"})
    second.wait_for(lambda: catches_sigterm(second))
    second.send(signal.SIGTERM)
    start = time.monotonic()
    ended = second.wait()
    assert time.monotonic() - start < GRACE.total_seconds() / 2
    assert ended.code == 2 and "'optim.lr' is 'Infinity'" in ended.error


def test_without_the_store_each_rank_prints_its_error(torchrun: dict[str, str], log: Path) -> None:
    for ended in d2g_ranks(INVALID_COMMAND, log):
        assert ended.code == 2 and "'optim.lr' is 'Infinity'" in ended.error
