"""`d2g pairs repair`, `verify` and `info` on the store of a tiny teacher: bad rows are generated again."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from d2g.core.distributed import process_group
from damaged_stores import S1, load_shard, select_rows, truncate, with_flipped_bit, write_record, write_rows
from forks import environments, on_ranks
from jobs import Running, d2g, make_pairs
from pairgen.generate import regenerate
from pairgen.store.hdf5 import PairBatch
from pairgen.store.spec import prompts_path, quarantined_rows, read_spec, shard_path
from pairgen.verify import verify_store


@pytest.fixture(scope="module")
def job(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts.txt and pairs/ of a tiny teacher, shared by the tests (read-only)."""
    folder = tmp_path_factory.mktemp("job")
    make_pairs(teacher, folder)
    return folder


@pytest.fixture
def pairs(job: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(job / "pairs", tmp_path / "pairs"))


def rows_agree(batch: PairBatch, expected: PairBatch) -> bool:
    """Whether rows are equal, with latents up to the rounding of another batch size."""
    same = torch.equal(batch.noise, expected.noise) and torch.equal(batch.index, expected.index)
    max_diff = (batch.latents - expected.latents).abs().max()
    return same and batch.prompts == expected.prompts and float(max_diff) < 1e-4


def test_repair_needs_only_the_store(job: Path, pairs: Path, tmp_path: Path) -> None:
    path = shard_path(pairs, 1)
    path.write_bytes(with_flipped_bit(path.read_bytes(), 3000, 1))
    plan = d2g(["pairs", "repair", str(pairs), "--dry-run", "--json"], tmp_path / "log")
    assert plan.json["rows_to_make"] == 5 and plan.code == 0 and not (pairs / "quarantine").exists()
    ended = d2g(["pairs", "repair", str(pairs), "--json"], tmp_path / "log")
    assert ended.code == 0 and ended.json == {"quarantined": [S1], "regenerated": 5}, ended.stderr
    assert verify_store(pairs).ok and rows_agree(load_shard(pairs, 1), load_shard(job / "pairs", 1))


def test_repair_retries_quarantined_rows(job: Path, pairs: Path, tmp_path: Path) -> None:
    batch, spec = load_shard(pairs, 1), read_spec(pairs)
    write_rows(pairs, 1, select_rows(batch, [0, 1, 3, 4]), quarantined=(7,))
    write_record(pairs, 1, {"index": 7, "prompt": batch.prompts[2], "reason": "its latent was not finite"})
    verified = d2g(["pairs", "verify", str(pairs), "--json"], tmp_path / "log")
    assert verified.code == 1 and json.loads(verified.stdout)["quarantined"] == [7]
    assert "not ok: 1 pairs without a finite latent; run `d2g pairs repair" in verified.error
    only_moved = d2g(["pairs", "repair", str(pairs), "--no-regenerate", "--json"], tmp_path / "log")
    assert only_moved.json == {"quarantined": [], "regenerated": 0} and only_moved.code == 0
    assert verify_store(pairs).quarantined == [7]
    ended = d2g(["pairs", "repair", str(pairs), "--json"], tmp_path / "log")
    assert ended.code == 0 and ended.json == {"quarantined": [], "regenerated": 1}, ended.stderr
    assert verify_store(pairs).ok and quarantined_rows(pairs, spec) == {}
    assert rows_agree(load_shard(pairs, 1), load_shard(job / "pairs", 1))


def quarantine_a_row_of_each_shard(pairs: Path) -> None:
    """Take the first row of each shard out, as if its latent was not finite."""
    spec = read_spec(pairs)
    for shard in range(spec.num_shards):
        batch = load_shard(pairs, shard)
        number, others = int(batch.index[0]), list(range(1, len(batch.prompts)))
        write_rows(pairs, shard, select_rows(batch, others), quarantined=(number,))
        write_record(pairs, shard, {"index": number, "prompt": batch.prompts[0], "reason": "not finite"})


def test_a_rank_that_starts_late_makes_its_share_of_quarantined_rows(pairs: Path) -> None:
    """The second rank opens its teacher after the first one has made rows."""
    quarantine_a_row_of_each_shard(pairs)
    records = len(list((pairs / "quarantine").iterdir()))
    assert records == 3

    def work(rank: int) -> None:
        end = time.monotonic() + 3

        def wait_for_other_rank(event: str, arguments: tuple[object, ...]) -> None:
            if event == "open" and str(arguments[0]).endswith("unet/config.json"):
                while len(list((pairs / "quarantine").iterdir())) == records and time.monotonic() < end:
                    time.sleep(0.01)

        if rank:
            sys.addaudithook(wait_for_other_rank)
        regenerate(pairs)
        process_group.finish()

    on_ranks(2, work)
    assert quarantined_rows(pairs, read_spec(pairs)) == {} and verify_store(pairs).ok


def test_rank_0_alone_moves_damaged_files(pairs: Path, tmp_path: Path) -> None:
    """Also if another rank starts first."""
    path = shard_path(pairs, 1)
    path.write_bytes(with_flipped_bit(path.read_bytes(), 3000, 1))
    arguments, (first, second) = ["pairs", "repair", str(pairs), "--json"], environments(2)
    other = Running(arguments, tmp_path / "rank1", second)
    end = time.monotonic() + 3
    while not (pairs / "quarantine").exists() and time.monotonic() < end:
        time.sleep(0.01)
    ended = d2g(arguments, tmp_path / "rank0", environment=first)
    assert (ended.code, other.wait().code) == (0, 0), ended.stderr
    assert ended.json == {"quarantined": [S1], "regenerated": 5} and verify_store(pairs).ok


def test_repair_without_a_prompt_list_asks_for_it(job: Path, pairs: Path, tmp_path: Path) -> None:
    prompts_path(pairs).write_text("?")
    shard_path(pairs, 2).unlink()
    words = ["pairs", "repair", str(pairs), "--json"]
    ended = d2g(words, tmp_path / "log")
    assert ended.code == 1 and "has no prompt list to generate them from; give --prompts FILE" in ended.error
    assert "moved 1 files to" in ended.stderr and (pairs / "quarantine" / "prompts.jsonl").exists()
    ended = d2g([*words, "--prompts", str(job / "prompts.txt")], tmp_path / "log")
    assert ended.code == 0 and ended.json["regenerated"] == 2, ended.stderr
    assert verify_store(pairs).ok and verify_store(pairs).prompts_checked


def test_text_output_of_verify_and_info(pairs: Path, tmp_path: Path) -> None:
    truncate(pairs)
    shard_path(pairs, 0).unlink()
    ended = d2g(["pairs", "verify", str(pairs), "--workers", "1"], tmp_path / "log")
    assert ended.code == 1 and "1 damaged files, 1 shards missing; run `d2g pairs repair" in ended.error
    assert "truncated" in ended.stdout and S1 in ended.stdout
    info = d2g(["pairs", "info", str(pairs)], tmp_path / "log")
    assert info.code == 0 and "spec.guidance" in info.stdout and "4, 4, 4" in info.stdout
