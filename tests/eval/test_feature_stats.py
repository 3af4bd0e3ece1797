"""eval.metrics.feature_stats: closed forms, batches, saved tensors, and one to three processes."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.seeds import generator
from eval.metrics.feature_stats import UPDATE_ROWS, FeatureStats, Origin
from eval.metrics.frechet import frechet_distance
from forks import on_ranks

ORIGIN = Origin(features="test", features_sha256="0" * 64, resize="native", source="rows")


def rows(count: int, dim: int, seed: int = 0) -> Tensor:
    mix = torch.randn(dim, dim, generator=generator(seed, 1))
    return torch.randn(count, dim, generator=generator(seed)) @ mix + 100


def stats_of(features: Tensor, batch: int = 64) -> FeatureStats:
    stats = FeatureStats(features.shape[1], ORIGIN)
    for start in range(0, len(features), batch):
        stats.update(features[start : start + batch])
    return stats


def test_mean_and_covariance_equal_those_of_torch() -> None:
    features = rows(150, 7)
    stats = stats_of(features)
    assert (stats.count, stats.dim) == (150, 7)
    torch.testing.assert_close(stats.mean, features.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.covariance, features.double().T.cov(), rtol=1e-9, atol=1e-9)


def test_batches_and_merging_do_not_change_the_statistics() -> None:
    features = rows(2 * UPDATE_ROWS + 77, 7)
    one_batch = stats_of(features, batch=len(features))
    parts = stats_of(features[:40], batch=3)
    parts.merge(stats_of(features[40:], batch=50))
    torch.testing.assert_close(parts.mean, one_batch.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.covariance, one_batch.covariance, rtol=1e-9, atol=1e-9)
    for batch in (
        1,
        16,
        UPDATE_ROWS,
        UPDATE_ROWS + 1,
    ):  # sums run over blocks of UPDATE_ROWS, so equal bit for bit
        other = stats_of(features, batch)
        assert torch.equal(other.mean, one_batch.mean) and torch.equal(other.covariance, one_batch.covariance)
    assert parts.count == len(features) and torch.equal(parts.rows, features)


def test_rows_are_ordered_by_their_indices() -> None:
    features, order = rows(30, 3), torch.randperm(30, generator=generator(4))
    stats = FeatureStats(3, ORIGIN)
    for part in order.split(7):
        stats.update(features[part], part)
    assert torch.equal(stats.rows, features)
    assert torch.equal(stats.sample(9, seed=1), stats_of(features).sample(9, seed=1))
    with pytest.raises(AssertionError, match="indices or none"):
        stats.update(features)


def gathered(ranks: int, features: Tensor, folder: Path) -> list[dict[str, Tensor]]:
    """The gathered statistics on each of `ranks` processes, which share the batches."""

    def work(rank: int) -> None:
        process_group.init()
        stats = FeatureStats(features.shape[1], ORIGIN)
        for indices in torch.arange(len(features)).split(8)[rank::ranks]:
            stats.update(features[indices], indices)
        merged = stats.gather()
        tensors = {"mean": merged.mean, "covariance": merged.covariance, "rows": merged.rows}
        save_file({**tensors, "count": torch.tensor(merged.count)}, folder / f"{rank}.safetensors")
        process_group.barrier()
        process_group.finish()

    on_ranks(ranks, work)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(ranks)]


@pytest.mark.parametrize("count", [53, 5])
def test_one_two_and_three_processes_agree(count: int, tmp_path: Path) -> None:
    """With 5 rows in batches of 8, only one process has rows."""
    features = rows(count, 6)
    single, real = stats_of(features, 8), stats_of(rows(80, 6, seed=3))
    assert single.gather() is single
    expected = frechet_distance(single.mean, single.covariance, real.mean, real.covariance)
    for ranks in (2, 3):
        for got in gathered(ranks, features, tmp_path):
            assert int(got["count"]) == count and torch.equal(got["rows"], features)
            torch.testing.assert_close(got["mean"], single.mean, rtol=1e-12, atol=0)
            torch.testing.assert_close(got["covariance"], single.covariance, rtol=1e-9, atol=1e-9)
            distance = frechet_distance(got["mean"], got["covariance"], real.mean, real.covariance)
            assert distance == pytest.approx(expected, rel=1e-9)


def test_statistics_are_restored_from_their_tensors() -> None:
    stats = stats_of(rows(60, 4))
    all_rows, sampled = (FeatureStats.restored(ORIGIN, 60, stats.tensors(keep)) for keep in (0, 10))
    assert all_rows.origin == ORIGIN and all_rows.count == sampled.count == 60
    torch.testing.assert_close(all_rows.covariance, stats.covariance, rtol=1e-12, atol=0)
    assert torch.equal(all_rows.mean, stats.mean) and torch.equal(all_rows.rows, stats.rows)
    assert torch.equal(sampled.rows, stats.sample(10)) and len(sampled.rows) == 10
    with pytest.raises(ValueError, match="different widths"):
        FeatureStats.restored(ORIGIN, 60, {**stats.tensors(), "rows": torch.zeros(3, 5)})


def test_one_row_and_non_finite_rows_are_refused() -> None:
    with pytest.raises(UserError, match="needs at least 2"):
        _ = stats_of(rows(1, 3)).covariance
    with pytest.raises(UserError, match="not finite"):
        stats_of(torch.tensor([[1.0, math.nan]]))
