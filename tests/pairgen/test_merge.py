"""`merge` combines stores of one spec and refuses conflicting ones."""

import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d2g.core.errors import UserError
from damaged_stores import (
    RECORD,
    SPEC,
    file_contents,
    load_shard,
    make_store,
    rows,
    swap_prompt,
    truncate,
    write_rows,
)
from jobs import Running, d2g
from pairgen.merge import merge_stores
from pairgen.store.spec import create_store, pending, prompts_path, read_spec, shard_path
from pairgen.store.writer import PairWriter
from pairgen.verify import verify_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "pairs")


def test_merge_combines_shards_of_several_stores(tmp_path: Path, store: Path) -> None:
    a = make_store(tmp_path / "a", shards=(0, 2))
    b = make_store(tmp_path / "b", shards=(1, 2))
    before = file_contents(a), file_contents(b)
    for copied in (3, 0):  # merging again is no conflict
        report = merge_stores([a, b], tmp_path / "out")
        assert (report.pairs, report.shards, report.copied, report.differing) == (22, 3, copied, [])
        assert file_contents(tmp_path / "out") == file_contents(store) and verify_store(tmp_path / "out").ok
    assert (file_contents(a), file_contents(b)) == before
    merge_stores([b], a)  # into one of the two stores
    assert file_contents(a) == file_contents(store)
    merge_stores([a, a], a)
    assert file_contents(a) == file_contents(store)


def test_merge_by_links(tmp_path: Path, store: Path) -> None:
    report = merge_stores([store], tmp_path / "out", link=True)
    assert report.copied == 3 and verify_store(tmp_path / "out").ok
    assert shard_path(tmp_path / "out", 1).samefile(shard_path(store, 1))
    assert merge_stores([store], tmp_path / "out", link=True).copied == 0
    assert not list((tmp_path / "out" / "partial").iterdir())


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or os.stat("/dev/shm").st_dev == os.stat("/tmp").st_dev, reason="one disk"
)
def test_links_across_disks_are_refused(store: Path, tmp_path: Path) -> None:
    out = Path("/dev/shm") / f"d2g-{os.getpid()}-{tmp_path.name}"
    try:
        with pytest.raises(UserError, match=r"hard link of .*pairs-0000\d\.h5.*leave out --link"):
            merge_stores([store], out, link=True)
        assert not list((out / "partial").iterdir())
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _other_rounding(folder: Path, by: float) -> Path:
    batch = load_shard(make_store(folder, shards=(1,)), 1)
    batch.latents[3, 2, 1, 0] += by
    write_rows(folder, 1, batch)
    return folder


def test_merge_keeps_the_first_of_shards_that_differ_by_rounding(tmp_path: Path, store: Path) -> None:
    other = _other_rounding(tmp_path / "other", 0.01)
    report = merge_stores([store, other], tmp_path / "out")
    assert [(d["shard"], d["kept"], d["left_out"]) for d in report.differing] == [
        ("pairs-00001.h5", str(shard_path(store, 1)), str(shard_path(other, 1)))
    ]
    assert 0.005 < report.differing[0]["max_abs_err"] < 0.02 and file_contents(
        tmp_path / "out"
    ) == file_contents(store)
    report = merge_stores([other, store], tmp_path / "out")  # existing shards take precedence
    assert (
        report.copied == 0
        and len(report.differing) == 1
        and file_contents(tmp_path / "out") == file_contents(store)
    )
    assert load_shard(merged(tmp_path / "b", other, store), 1).latents.equal(load_shard(other, 1).latents)
    with pytest.raises(
        UserError, match=r"pairs/shards/pairs-00001.*other/shards/pairs-00001.*apart, tolerance 0\.001"
    ):
        merge_stores([store, other], tmp_path / "c", tolerance=0.001)


def merged(out: Path, *folders: Path) -> Path:
    merge_stores(folders, out)
    return out


def test_merge_refuses_conflicts_damage_and_other_specs(tmp_path: Path, store: Path) -> None:
    other = make_store(tmp_path / "other", replace(SPEC, seed=6))
    with pytest.raises(UserError, match=r"seed \(6 -> 5\)"):
        merge_stores([store, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="nothing to merge"):
        merge_stores([], tmp_path / "out")
    clash = _other_rounding(tmp_path / "clash", 1.0)
    with pytest.raises(
        UserError, match=r"pairs-00001\.h5 and .*clash.* hold different rows.*latents up to 1 apart"
    ):
        merge_stores([store, clash], tmp_path / "out")
    truncate(store)
    with pytest.raises(UserError, match=r"pairs-00001\.h5: truncated.*d2g pairs repair .*pairs`, then merge"):
        merge_stores([store], tmp_path / "out2")
    prompts_path(clash).write_bytes(b'"a"\n')
    with pytest.raises(UserError, match=r"clash/prompts\.jsonl: not the prompts.*d2g pairs repair"):
        merge_stores([clash], tmp_path / "out3")


def test_merge_compares_the_latents_of_the_stage_before(tmp_path: Path) -> None:
    spec = replace(SPEC, condition_shape=(2, 4, 4), condition_sha256="0" * 64, condition_teacher="1" * 64)

    def conditioned(name: str, value: float) -> Path:
        """A store of stage B whose second shard has this value in one condition."""
        folder = tmp_path / name
        create_store(folder, spec)
        noise, latents, prompts, index = rows(spec, list(spec.rows(1)))
        condition = torch.zeros(len(index), 2, 4, 4, dtype=spec.torch_dtype)
        condition[3, 1, 0, 2] = value
        with PairWriter(folder, spec, 1) as writer:
            writer.append(noise, latents, prompts, index, condition)
            writer.commit()
        return folder

    first, rounded, other = (conditioned(f"of{value}", value) for value in (0.0, 0.01, 1.0))
    report = merge_stores([first, rounded], tmp_path / "out")
    assert 0.005 < report.differing[0]["max_abs_err"] < 0.02
    with pytest.raises(UserError, match=r"hold different rows for the same pairs \(latents up to 1 apart"):
        merge_stores([first, other], tmp_path / "other")


def test_merge_of_stores_without_prompt_lists_compares_the_prompts_of_rows(
    tmp_path: Path, store: Path
) -> None:
    other = make_store(tmp_path / "other")
    for folder in (store, other):
        prompts_path(folder).unlink()
    merge_stores([store, other], tmp_path / "out")
    assert not prompts_path(tmp_path / "out").exists()
    swap_prompt(other)
    with pytest.raises(UserError, match=r"hold different rows for the same pairs \(other noise or prompts\)"):
        merge_stores([store, other], tmp_path / "out")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_merge_keeps_the_shard_with_the_most_rows(
    tmp_path: Path, store: Path, order: tuple[int, int]
) -> None:
    few = make_store(tmp_path / "few", bad=(9, 10, 17))
    folders = [[store, few][number] for number in order]
    assert file_contents(merged(tmp_path / "out", *folders)) == file_contents(store)
    fewer = make_store(tmp_path / "fewer", bad=(9, 17))
    report = merge_stores([few, fewer], tmp_path / "both")
    assert report.pairs == 20 and file_contents(tmp_path / "both") == file_contents(fewer)
    report = merge_stores([store], tmp_path / "both")  # merge the missing rows later
    assert report.pairs == 22 and report.copied == 2
    assert file_contents(tmp_path / "both") == file_contents(store) and verify_store(tmp_path / "both").ok


def test_merge_refuses_a_shard_without_its_quarantine_record(tmp_path: Path) -> None:
    few = make_store(tmp_path / "few", bad=(9,))
    (few / RECORD).unlink()
    with pytest.raises(UserError, match=r"rows\.json.*d2g pairs repair .*few"):
        merge_stores([few], tmp_path / "out")


def test_a_killed_merge_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(SPEC, num_pairs=96)
    unmerged = make_store(tmp_path / "all", spec, bad=(3, 70), shards=tuple(range(12)))
    few = make_store(tmp_path / "few", spec, bad=(3, 50, 70), shards=(0, 3, 6, 8, 9))
    words = ["pairs", "merge", str(few), str(unmerged), "--out", str(tmp_path / "out"), "--json"]
    moments, replace_file, calls = random.Random(4), os.replace, 0

    def die_before_the_fifth(*arguments: Any, **settings: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        replace_file(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die_before_the_fifth)
        assert d2g(words, tmp_path / "log").code == -signal.SIGKILL
    assert 0 < len(list((tmp_path / "out" / "shards").iterdir())) < 12
    # The same at any time; a quick merge may have ended before.
    for _ in range(5):
        running = Running(words, tmp_path / "log")
        time.sleep(moments.uniform(0.02, 0.15))
        running.send(signal.SIGKILL)
        running.wait()
        assert verify_store(tmp_path / "out").bad_shards == []
    ended = d2g(words, tmp_path / "log")
    assert ended.code == 0 and ended.json["pairs"] == 94, ended.stderr
    scratch = {name for name in file_contents(tmp_path / "out") if name.startswith("partial")}
    assert {n: d for n, d in file_contents(tmp_path / "out").items() if n not in scratch} == file_contents(
        unmerged
    )


def test_merge_on_the_command_line(store: Path, tmp_path: Path) -> None:
    words = ["pairs", "merge", str(store), "--out", str(tmp_path / "out")]
    plan = d2g([*words, "--dry-run", "--json"], tmp_path / "log")
    assert plan.json["shards"] == {str(store): 3} and not (tmp_path / "out").exists()
    ended = d2g([*words, "--link", "--json"], tmp_path / "log")
    assert ended.json["pairs"] == 22 and ended.json["copied"] == 3, ended.stderr
    assert verify_store(tmp_path / "out").ok and pending(tmp_path / "out", read_spec(store)) == []
