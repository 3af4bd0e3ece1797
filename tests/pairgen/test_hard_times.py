"""Failures of a pair job: kills, full disks, concurrent jobs, NaN teachers. Processes and disks are real."""

import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny
from d2g.diffusion.pretrained import load_conditioner, save_component
from distill.training.data import open_pairs
from jobs import Running, d2g, succeed
from pairgen.store.reader import PairReader
from pairgen.store.spec import quarantined_rows, read_spec
from pairgen.verify import verify_store

PAIRS = 240
TORUS = 3  # index of the only caption with a torus


def command(teacher: Path, prompts: str, out: Path, *sets: str) -> list[str]:
    chosen = [f"num_pairs={PAIRS}", "steps=8", "guidance=3", "shard_size=16", "batch_size=2", *sets]
    options = ["--teacher", str(teacher), "--prompts", prompts, "--out", str(out), "--json"]
    return ["pairs", "generate", *options, *(part for s in chosen for part in ("--set", s))]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


@pytest.fixture(scope="module")
def unbroken(teacher: Path, prompts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store generated without interruption, in larger batches."""
    folder = tmp_path_factory.mktemp("unbroken")
    succeed(d2g(command(teacher, prompts, folder / "pairs", "batch_size=32"), folder / "log"))
    return folder / "pairs"


def assert_equal_stores(store: Path, expected: Path) -> None:
    """Noise is bit-identical; latents agree up to fp16 rounding, since fp32 sums depend on the batch size."""
    a, b = (PairReader(folder).read(range(PAIRS)) for folder in (store, expected))
    assert torch.equal(a.noise, b.noise) and torch.equal(a.index, b.index) and a.prompts == b.prompts
    torch.testing.assert_close(a.latents, b.latents, rtol=2e-3, atol=2e-3)
    assert verify_store(store).ok


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("kills", [7, 20])
def test_kills_in_a_row(kills: int, teacher: Path, prompts: str, tmp_path: Path) -> None:
    out, moments = tmp_path / "pairs", random.Random(20)
    arguments = command(teacher, prompts, out, "batch_size=1", "steps=30")
    for _ in range(kills):
        running = Running(arguments, tmp_path / "log")
        time.sleep(moments.uniform(0.05, 0.9))
        running.send(signal.SIGKILL)
        assert running.wait().code == -signal.SIGKILL, "the job finished before the kill"
    succeed(d2g(command(teacher, prompts, out, "batch_size=16", "steps=30"), tmp_path / "log"))
    unbroken = tmp_path / "unbroken"
    assert d2g(command(teacher, prompts, unbroken, "batch_size=32", "steps=30"), tmp_path / "log").code == 0
    assert_equal_stores(out, unbroken)
    assert not list((out / "partial").iterdir()) and not list((out / "claims").glob("*.json"))


@pytest.mark.slow
def test_two_jobs_on_one_folder_share_the_work(
    teacher: Path, prompts: str, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pairs"
    jobs = [Running(command(teacher, prompts, out), tmp_path / f"log{number}") for number in range(2)]
    ended = [job.wait() for job in jobs]
    new = [job.json["new_pairs"] for job in ended]
    assert sum(new) == PAIRS and min(new) > 0, "every row once, and both had some"
    assert_equal_stores(out, unbroken)


@pytest.mark.slow
def test_a_shard_of_a_killed_job_is_taken_over(
    teacher: Path, prompts: str, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pairs"
    victim = Running(command(teacher, prompts, out), tmp_path / "victim")
    victim.wait_for(lambda: len(list(out.glob("shards/*.h5"))) >= 1)
    heir = Running(command(teacher, prompts, out), tmp_path / "heir")
    heir.wait_for(lambda: len(list(out.glob("claims/*.json"))) >= 2)
    victim.send(signal.SIGKILL)
    victim.wait()
    ended = heir.wait()
    assert ended.json["complete"], ended
    assert_equal_stores(out, unbroken)


def test_a_second_ctrl_c_exits_immediately_and_keeps_complete_shards(
    teacher: Path, prompts: str, tmp_path: Path
) -> None:
    out = tmp_path / "pairs"
    running = Running(command(teacher, prompts, out, "batch_size=64", "steps=200"), tmp_path / "log")
    running.wait_for(lambda: bool(list(out.glob("claims/*.json"))))
    running.send(signal.SIGINT)
    time.sleep(0.1)
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130 and "same command again" in ended.error
    assert verify_store(out).bad_shards == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_read_only_folder(teacher: Path, prompts: str, small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ended = d2g(command(teacher, prompts, small_disk / "pairs"), tmp_path / "log")
    assert ended.code == 1 and "Read-only file system" in ended.error and not list(small_disk.iterdir())


@pytest.fixture(scope="module")
def nan_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose embedding of the token "torus" is NaN."""
    folder = Path(tiny.save_teacher(tmp_path_factory.mktemp("teachers") / "nan"))
    text = load_conditioner(str(folder))
    torus, others = (
        set(text.tokenizers["tokenizer"](words).input_ids)
        for words in (tiny.CAPTIONS[TORUS], " ".join(c for i, c in enumerate(tiny.CAPTIONS) if i != TORUS))
    )
    with torch.no_grad():
        text.models["text_encoder"].get_input_embeddings().weight[sorted(torus - others)] = float("nan")
    save_component(text.models["text_encoder"], folder / "text_encoder")
    return folder


def test_nan_prompts_are_reported_and_the_job_continues(
    nan_teacher: Path, prompts: str, tmp_path: Path
) -> None:
    out = tmp_path / "pairs"
    ended = d2g(command(nan_teacher, prompts, out, "num_pairs=48"), tmp_path / "log")
    bad = list(range(TORUS, 48, 6))
    assert ended.code == 1 and "8 of 48 pairs have no finite latent: 3, 9, 15" in ended.error
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["pairs"] == 40 and result["quarantined"] == bad and result["complete"]
    records = [row for rows in quarantined_rows(out, read_spec(out)).values() for row in rows]
    assert [row["index"] for row in records] == bad
    assert {row["prompt"] for row in records} == {tiny.CAPTIONS[TORUS]}

    report = verify_store(out)
    assert not report.ok and report.quarantined == bad and not report.bad_shards and not report.missing
    reader = PairReader(out)
    assert len(reader) == 40 and reader.read(range(40)).latents.isfinite().all()
    assert not set(reader.read(range(40)).index.tolist()) & set(bad)
    assert len(open_pairs(str(out), reader.spec.teacher_digests)) == 40, "the other pairs can be used"
    second = d2g(command(nan_teacher, prompts, out, "num_pairs=48"), tmp_path / "log")
    assert second.code == 1 and json.loads(second.stdout.splitlines()[-1])["new_pairs"] == 0
    assert d2g(["pairs", "repair", str(out)], tmp_path / "log").code == 1, "retrying gives NaN again"
    assert verify_store(out).quarantined == bad


def test_a_teacher_with_mostly_nan_latents_stops_the_job(nan_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a yellow torus\na torus, pink background\na red cube\n")
    prompts, sets = str(tmp_path / "prompts.txt"), ("num_pairs=3000", "batch_size=64", "steps=1")
    ended = d2g(command(nan_teacher, prompts, tmp_path / "pairs", *sets), tmp_path / "log")
    assert ended.code == 1 and "latents are not finite" in ended.error and "max_bad" in ended.error
    assert len(list((tmp_path / "pairs").glob("shards/*"))) < 40, "it stopped early"
    assert list((tmp_path / "pairs").glob("partial/*.rows-*.h5")), "the finished rows of the last shard"
