"""The cache of latents: number of open files, unusual names, and time limits."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from d2g.core.errors import Interrupted
from latent_lpips.training.latent_cache import MAX_OPEN_SHARDS, ROWS_PER_SHARD, cached_rows


def make(rows: range) -> torch.Tensor:
    return torch.tensor(rows)[:, None].float()


def test_a_large_cache_keeps_few_files_open(tmp_path: Path) -> None:
    shards = MAX_OPEN_SHARDS + 20
    before = len(os.listdir("/proc/self/fd"))
    rows = cached_rows(tmp_path, "train", shards * ROWS_PER_SHARD, {}, make, dtype=torch.float32)
    everywhere = torch.arange(0, shards * ROWS_PER_SHARD, ROWS_PER_SHARD // 2)
    for _ in range(2):
        assert torch.equal(rows[everywhere.tolist()][:, 0], everywhere.float())
    assert (
        len(os.listdir("/proc/self/fd")) - before <= MAX_OPEN_SHARDS and len(rows) == shards * ROWS_PER_SHARD
    )


def test_file_names_with_brackets(tmp_path: Path) -> None:
    computed: list[range] = []

    def watched(rows: range) -> torch.Tensor:
        computed.append(rows)
        return make(rows)

    for name in ("noise[1]", "noise1", "noise*"):
        for _ in range(2):
            assert cached_rows(tmp_path, name, 5, {}, watched)[[4]].item() == 4
    assert len(computed) == 3


def test_the_time_limit_is_checked_between_shards_and_each_run_completes_one(tmp_path: Path) -> None:
    starts = 0
    while True:
        starts += 1
        try:
            rows = cached_rows(
                tmp_path,
                "train",
                3 * ROWS_PER_SHARD - 5,
                {},
                make,
                time_over=lambda: True,
                dtype=torch.float32,
            )
            break
        except Interrupted as left:
            assert f"{starts * ROWS_PER_SHARD} of {3 * ROWS_PER_SHARD - 5} rows of train" in str(left)
    assert starts == 3 and rows[[3 * ROWS_PER_SHARD - 6]].item() == 3 * ROWS_PER_SHARD - 6


def test_the_time_limit_starts_with_the_first_shard(tmp_path: Path) -> None:
    """Reaching the limit at the last shard is no interruption, since all rows are done."""
    ticks: Iterator[bool] = iter([False, True])
    cached_rows(tmp_path, "train", 2 * ROWS_PER_SHARD, {}, make, time_over=lambda: next(ticks))
    assert next(ticks, None) is None
