"""pairgen.store.dataset: each row once per epoch, for any number of ranks, workers and restarts."""

import os
import re
import resource
import shutil
import signal
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from d2g.core.errors import SettingError, UserError
from d2g.core.shuffle import permuted_batch
from pairgen.store.dataset import PairDataset, PairSampler, pair_loader
from pairgen.store.hdf5 import PairBatch
from pairgen.store.reader import PairReader
from pairgen.store.spec import shard_path
from stores import FORKS, SPEC, flip_bit, put_store, rows_of, same, spec_of

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
BLOCKS: dict[str, Any] = {"block": 3, "window": 2}


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_store(tmp_path_factory.mktemp("dataset") / "pairs", quarantined=[2, 3])


def take_batches(batches: Iterator[PairBatch], count: int) -> list[PairBatch]:
    items = list(islice(batches, count))
    batches.close()  # type: ignore[attr-defined]  # closing the generator ends its workers
    return items


# Order of rows.


@given(
    size=st.integers(1, 40),
    batch=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
    skipped=st.integers(0, 30),
    order=st.sampled_from([{}, BLOCKS, {"block": 1, "window": 50}]),
)
def test_a_sampler_can_start_at_any_point_of_its_stream(
    size: int, batch: int, seed: int, skipped: int, order: dict[str, int]
) -> None:
    stream = list(islice(PairSampler(size, batch, seed, **order), skipped + 5))
    resumed = list(islice(PairSampler(size, batch, seed, skipped * batch, **order), 5))
    assert resumed == stream[skipped:]
    flat = [row for rows in stream for row in rows]
    assert flat == permuted_batch(seed, size, 0, len(flat), order.get("block", 0), order.get("window", 0))
    for start in range(0, len(flat) - size + 1, size):
        assert sorted(flat[start : start + size]) == list(range(size)), "an epoch gives each row once"


@pytest.mark.parametrize("order", [{}, BLOCKS])
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_share_each_global_batch(ranks: int, order: dict[str, int]) -> None:
    single = list(islice(PairSampler(20, 6, 3, 12, **order), 900))  # more rows than are ordered at a time
    parts = [islice(PairSampler(20, 6, 3, 12, rank=r, world_size=ranks, **order), 900) for r in range(ranks)]
    joined = [[row for part in parts for row in part] for parts in zip(*parts, strict=True)]
    assert joined == single


def test_a_batch_may_be_larger_than_the_ordering_buffer() -> None:
    first, second = islice(PairSampler(7, 5000, 1), 2)
    assert first + second == permuted_batch(1, 7, 0, 10_000)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_size": 5, "world_size": 2}, "batches of 5 from 20 pairs for 2 processes"),
        ({"batch_size": 0}, "batches of 0"),
        ({"size": 0}, "from 0 pairs"),
        ({"start": -1}, "start -1"),
        ({"block": 4}, "block 4, window 0"),
        ({"window": 4}, "block 0, window 4"),
    ],
)
def test_invalid_block_settings_are_refused(settings: dict[str, int], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        PairSampler(**{"size": 20, "batch_size": 4, "seed": 0, **settings})


# The data set in a plain DataLoader.


def test_indexing_by_one_or_many_positions(shared_store: Path) -> None:
    dataset = PairDataset(PairReader(shared_store), dtype=None)
    assert len(dataset) == 20 and dataset[2].noise.dtype == torch.float16
    assert same(dataset[2], rows_of(SPEC, [4])) and same(dataset[[19, 2]], rows_of(SPEC, [21, 4]))


def test_a_position_may_be_an_integer_of_numpy_or_torch(shared_store: Path) -> None:
    """As of `numpy.random.permutation` or `torch.randperm`."""
    dataset: Any = PairDataset(PairReader(shared_store), dtype=None)
    for one, several in ((np.int64(2), np.array([19, 2])), (torch.tensor(2), torch.tensor([19, 2]))):
        assert same(dataset[one], rows_of(SPEC, [4])) and same(dataset[several], rows_of(SPEC, [21, 4]))
    assert len(dataset[[]].index) == 0
    with pytest.raises(IndexError, match="positions 20 to 20 of 20 pairs"):
        dataset[20]


def test_an_endless_sampler(shared_store: Path) -> None:
    dataset = PairDataset(PairReader(shared_store))
    loader = DataLoader(dataset, sampler=PairSampler(len(dataset), 5, 0), batch_size=None)
    loaded = list(islice(loader, 7))
    assert sorted(i for batch in loaded[:4] for i in batch.index.tolist()) == [
        i for i in range(22) if i not in (2, 3)
    ]
    assert all(same(batch, rows_of(SPEC, batch.index.tolist())) for batch in loaded)


@FORKS
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_persistent_workers(shared_store: Path, start: str) -> None:
    dataset = PairDataset(PairReader(shared_store))
    dataset[range(20)]  # open all files before the fork
    batches: Any = list(islice(PairSampler(len(dataset), 5, 0), 6))
    loader = DataLoader(
        dataset,
        sampler=batches,
        batch_size=None,
        num_workers=2 if start == "fork" else 1,
        persistent_workers=True,
        multiprocessing_context=start,
    )
    for _ in range(2):
        assert all(same(batch, dataset[rows]) for batch, rows in zip(loader, batches, strict=True))


# The loader.


@FORKS
@pytest.mark.parametrize("order", [{}, BLOCKS])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_those_of_the_sampler(shared_store: Path, workers: int, order: dict[str, int]) -> None:
    reader = PairReader(shared_store)
    expected = [reader.read(rows).index.tolist() for rows in islice(PairSampler(20, 4, 7, 8, **order), 12)]
    loaded = take_batches(pair_loader(reader, PairSampler(20, 4, 7, 8, **order), workers=workers), 12)
    assert [batch.index.tolist() for batch in loaded] == expected
    assert all(same(batch, rows_of(SPEC, batch.index.tolist())) for batch in loaded)
    assert loaded[0].noise.dtype == torch.float32


@FORKS
def test_dtype_none_keeps_the_stored_dtype(shared_store: Path) -> None:
    for workers in (0, 1):
        (batch,) = take_batches(
            pair_loader(PairReader(shared_store), PairSampler(20, 4, 0), workers=workers, dtype=None), 1
        )
        assert batch.noise.dtype == batch.latents.dtype == torch.float16
        assert same(batch, rows_of(SPEC, batch.index.tolist()))


def test_batches_of_labels(tmp_path: Path) -> None:
    spec = spec_of(conditioning="label", noise="seeded")
    reader = PairReader(put_store(tmp_path, spec))
    for batch in take_batches(pair_loader(reader, PairSampler(22, 4, 0)), 6):
        assert same(batch, rows_of(spec, batch.index.tolist()))
        assert batch.labels.tolist() == [7 * spec.prompt_of(i) for i in batch.index.tolist()]


@pytest.mark.gpu
def test_pinned_batches_have_the_same_contents(shared_store: Path) -> None:
    batch = PairReader(shared_store).read([3, 1])
    pinned = batch.pin_memory()
    assert pinned.noise.is_pinned() and pinned.latents.is_pinned() and same(pinned, batch)
    loader = pair_loader(PairReader(shared_store), PairSampler(20, 4, 0), pin_memory=True)
    (loaded,) = take_batches(loader, 1)
    assert loaded.noise.is_pinned() and same(loaded, rows_of(SPEC, loaded.index.tolist()))


# Damage.


@pytest.fixture
def damaged_store(shared_store: Path, tmp_path: Path) -> Path:
    store = Path(shutil.copytree(shared_store, tmp_path / "pairs"))
    path = shard_path(store, 1)
    latent = rows_of(SPEC, [12]).latents.numpy().tobytes()
    flip_bit(path, path.read_bytes().index(latent) + 9)
    return store


@FORKS
@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_a_one_line_error(damaged_store: Path, workers: int) -> None:
    batches = pair_loader(PairReader(damaged_store), PairSampler(20, 4, 0), workers=workers)
    with pytest.raises(UserError, match=r"pairs-00001\.h5: unreadable .*d2g pairs repair") as caught:
        take_batches(batches, 5)
    assert "\n" not in str(caught.value)


@FORKS
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_files_are_reported_once(damaged_store: Path, workers: int) -> None:
    messages: list[str] = []
    reader = PairReader(damaged_store, skip_bad=True)
    loaded = take_batches(
        pair_loader(reader, PairSampler(20, 4, 0), workers=workers, on_skip=messages.append), 10
    )
    assert len(messages) == 1 and messages[0].startswith(
        f"{shard_path(damaged_store, 1)}: unreadable (latent of row 4 does not"
    )
    expected = [i if not 8 <= i < 16 else 16 + (i - 8) % 6 for i in range(22) if i not in (2, 3)]
    rows = islice(PairSampler(20, 4, 0), 10)
    assert [batch.index.tolist() for batch in loaded] == [[expected[i] for i in row] for row in rows]
    assert all(same(batch, rows_of(SPEC, batch.index.tolist())) for batch in loaded)


def test_skipped_files_are_logged_by_default(damaged_store: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = PairReader(damaged_store, skip_bad=True)
    take_batches(pair_loader(reader, PairSampler(20, 4, 0)), 10)
    assert len(caplog.messages) == 1 and caplog.records[0].levelname == "WARNING"
    assert re.search(r"pairs-00001\.h5: .* replaced by those of the next", caplog.messages[0])


def test_the_documented_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the code of docs/pair-format.md; stop its endless loop at the second batch."""
    text = (Path(__file__).parents[2] / "docs" / "pair-format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from pairgen import.*?)```", text, re.DOTALL)
    put_store(tmp_path / "pairs", spec_of(num_pairs=80, shard_size=40))
    monkeypatch.chdir(tmp_path)
    batches: list[PairBatch] = []
    namespace = {"batches": batches}
    code = (
        code.replace("workers=4", "workers=0")
        + "    batches.append(batch)\n    if len(batches) == 2:\n        break\n"
    )
    exec(code, namespace)
    assert [row for batch in batches for row in batch.index.tolist()] == permuted_batch(0, 80, 12_800, 128)


class LimitedFileSize(PairReader):
    """A reader that limits file sizes of its process to 16 bytes after each batch."""

    limit = resource.RLIMIT_FSIZE

    def read(self, rows: Sequence[int], dtype: torch.dtype | None = torch.float32) -> PairBatch:
        batch = super().read(rows, dtype)
        resource.setrlimit(self.limit, (16, 16))
        return batch


class LimitedOpenFiles(LimitedFileSize):
    limit = resource.RLIMIT_NOFILE


class Killed(LimitedFileSize):
    """A reader whose process is killed, as the system does if memory runs out."""

    def read(self, rows: Sequence[int], dtype: torch.dtype | None = torch.float32) -> PairBatch:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@FORKS
@pytest.mark.parametrize("kind", [LimitedFileSize, LimitedOpenFiles, Killed])
def test_a_loader_process_that_fails_ends_the_run(kind: type[PairReader], tmp_path: Path) -> None:
    """Under these limits the queue thread of the worker cannot send a batch; the trainer must not wait."""
    reader = kind(put_store(tmp_path))
    with pytest.raises(
        UserError, match=r"a loader process (cannot pass its batch|ended).*train\.loader_workers=0"
    ):
        for _ in zip(range(40), pair_loader(reader, PairSampler(22, 4, 0), workers=1), strict=False):
            pass
