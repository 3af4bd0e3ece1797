"""distill.training.data: batches depend on (seed, images so far) only, not on ranks, workers or restarts."""

import json
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tiny
from d2g.core.config import with_values
from d2g.core.errors import SettingError, UserError
from d2g.core.shuffle import permuted_batch
from d2g.diffusion import pretrained
from d2g_cli import main as cli
from distill.config.run import DataConfig, DistillConfig
from distill.training.data import open_pairs, pair_batches, require_enough_pairs
from distill.training.train import train
from jobs import distill_config, make_pairs
from pairgen.store.reader import PairReader
from stores import SPEC, put_store


@pytest.fixture(scope="module")
def pairs(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(teacher, tmp_path_factory.mktemp("data"))


def batches(reader: PairReader, count: int, start: int = 0, workers: int = 0) -> list[list[int]]:
    stream = pair_batches(reader, 4, 7, start, workers)
    indices = [batch.index.tolist() for batch in islice(stream, count)]
    stream.close()  # type: ignore[attr-defined]  # closing the generator ends its workers
    return indices


def test_every_epoch_is_a_fresh_permutation(pairs: Path) -> None:
    rows = batches(PairReader(pairs), 9)
    epochs = [[row for batch in rows[i : i + 3] for row in batch] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_resumed_stream_continues_where_it_stopped(pairs: Path) -> None:
    reader = PairReader(pairs)
    assert batches(reader, 5, start=16) == batches(reader, 9)[4:]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns about fork with threads
def test_workers_do_not_change_the_order(pairs: Path) -> None:
    reader = PairReader(pairs)
    assert batches(reader, 5, workers=1) == batches(reader, 5)


def test_ranks_share_each_global_batch(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks come from torchrun's environment; their union is the batch of one process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(batches(PairReader(pairs), 3, start=8))
    assert all(len(part) == 2 for rank in parts for part in rank)
    joined = [a + b for a, b in zip(*parts, strict=True)]
    assert joined == [permuted_batch(7, 12, start, 4) for start in (8, 12, 16)]


def test_block_shuffling_follows_block_and_window(pairs: Path) -> None:
    stream = pair_batches(PairReader(pairs), 4, 7, 8, 0, DataConfig(block=3, window=2))
    indices = [batch.index.tolist() for batch in islice(stream, 6)]
    assert (
        indices
        == [permuted_batch(7, 12, 8 + 4 * i, 4, 3, 2) for i in range(6)]
        != batches(PairReader(pairs), 6, 8)
    )


def test_batches_keep_the_stored_dtype(teacher: Path, tmp_path: Path) -> None:
    pairs = make_pairs(teacher, tmp_path, dtype="float16")
    (batch,) = islice(pair_batches(PairReader(pairs), 4, 7, 0, 0), 1)
    assert batch.noise.dtype == batch.latents.dtype == torch.float16
    assert torch.equal(batch.latents.float(), PairReader(pairs).read(batch.index.tolist()).latents)


def test_a_complete_store_of_the_teacher_is_accepted(pairs: Path, teacher: Path) -> None:
    reader = open_pairs(str(pairs), pretrained.teacher_digests(str(teacher)))
    assert len(reader) == 12 and reader.read([3]).noise.dtype == torch.float32


def test_an_unfinished_store_is_refused(teacher: Path, tmp_path: Path) -> None:
    pairs = make_pairs(teacher, tmp_path)
    (pairs / "shards" / "pairs-00001.h5").unlink()
    with pytest.raises(UserError, match=r"holds 7 of 12 pairs; run the same `d2g pairs generate` again"):
        open_pairs(str(pairs), pretrained.teacher_digests(str(teacher)))


def test_pairs_of_another_teacher_are_refused(pairs: Path, tmp_path: Path) -> None:
    tiny.save_teacher(tmp_path / "other", seed=1)
    other = pretrained.teacher_digests(str(tmp_path / "other"))
    with pytest.raises(UserError, match=rf"was made by teacher .* --teacher has sha256 {other.weights[:12]}"):
        open_pairs(str(pairs), other)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_bit_is_reported_with_the_shard(teacher: Path, tmp_path: Path, workers: int) -> None:
    pairs = make_pairs(teacher, tmp_path)
    shard = pairs / "shards" / "pairs-00002.h5"
    data = bytearray(shard.read_bytes())
    latent = PairReader(pairs).read([11]).latents.numpy().tobytes()
    data[bytes(data).index(latent)] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"pairs-00002\.h5: unreadable .*d2g pairs repair") as caught:
        batches(PairReader(pairs), 3, workers=workers)
    assert "\n" not in str(caught.value)


def test_skip_bad_replaces_damaged_rows(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = make_pairs(teacher, tmp_path)
    (pairs / "shards" / "pairs-00001.h5").write_bytes(b"damage")
    digests = pretrained.teacher_digests(str(teacher))
    with pytest.raises(UserError, match=r"pairs-00001\.h5: truncated"):
        open_pairs(str(pairs), digests)
    reader = open_pairs(str(pairs), digests, DataConfig(skip_bad=True))
    loaded = batches(reader, 3)
    (message,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert re.search(r"pairs-00001\.h5: truncated.*next intact shard", message)
    rows = [row for batch in loaded for row in batch]
    assert sorted(rows) == sorted(
        [0, 1, 2, 3, 4, 10, 11, 10, 11, 10, 10, 11]
    )  # the 5 damaged rows are replaced by the 2 rows of the next shard


def test_training_on_pairs_at_a_url(pairs: Path, teacher: Path, tmp_path: Path) -> None:
    config = DataConfig(cache=str(tmp_path / "cache"), cache_gib=0.5)
    reader = open_pairs(f"file://{pairs}", pretrained.teacher_digests(str(teacher)), config)
    assert batches(reader, 4) == batches(PairReader(pairs), 4)
    assert len(list((tmp_path / "cache").glob("*/pairs-*.h5"))) == 3
    small = {"cache": str(tmp_path / "small"), "cache_gib": 0.9 * reader.gib}
    with pytest.raises(SettingError, match=r"copied again and again; set data\.block=5"):
        open_pairs(f"file://{pairs}", reader.spec.teacher_digests, DataConfig(**small))
    for folder, config in (
        (f"file://{pairs}", DataConfig(**small, block=5, window=1)),
        (str(pairs), DataConfig(**small)),
    ):
        assert len(open_pairs(folder, reader.spec.teacher_digests, config)) == 12


def test_the_command_line_keeps_a_pairs_url() -> None:
    words = [
        "distill",
        "ode",
        "--pairs",
        "s3://bucket/pairs",
        "--set",
        "data.skip_bad=true",
        "--dry-run",
        "--json",
    ]
    ended = CliRunner().invoke(cli.app, words)
    config = json.loads(ended.stdout.splitlines()[-1])["config"]
    assert config["pairs"] == "s3://bucket/pairs" and config["data"]["skip_bad"] is True


def test_a_store_of_quarantined_rows_only_is_refused(teacher: Path, tmp_path: Path) -> None:
    store = put_store(
        tmp_path, replace(SPEC, teacher_sha256=pretrained.weights_sha256(str(teacher))), range(22)
    )
    with pytest.raises(UserError, match="all 22 pairs are quarantined"):
        open_pairs(str(store), pretrained.teacher_digests(str(teacher)))


@pytest.mark.parametrize(
    "settings", [{"block": 3}, {"window": 3}, {"block": -1, "window": 2}, {"cache_gib": -1.0}]
)
def test_invalid_data_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=r"^data\.(block|window|cache_gib) is "):
        with_values(DistillConfig(), {f"data.{name}": value for name, value in settings.items()})


def test_a_batch_larger_than_the_pairs_is_refused(pairs: Path) -> None:
    reader = PairReader(pairs)
    pair_batches(reader, 12, 7, 0, 0).close()  # type: ignore[attr-defined]  # a generator
    with pytest.raises(
        UserError, match=r"^train\.batch_size is 13, but there are 12 pairs to train on; make"
    ):
        pair_batches(reader, 13, 7, 0, 0)
    pair_batches(reader, 8, 7, 0, 0, held_out=4).close()  # type: ignore[attr-defined]
    left_out = r"\(12 less 4 that data\.max_pairs or train\.validate_pairs leaves out\)"
    with pytest.raises(UserError, match=rf"9, but there are 8 pairs to train on {left_out}; make more pairs"):
        pair_batches(reader, 9, 7, 0, 0, held_out=4)
    require_enough_pairs(12, 12)


def test_a_part_of_the_pairs_trains_like_a_store_of_that_part(
    teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    part = make_pairs(teacher, tmp_path, num_pairs=8)
    whole = train(distill_config(teacher, pairs, "data.max_pairs=8"), tmp_path / "whole")
    assert whole.loss == train(distill_config(teacher, part), tmp_path / "part").loss
    config = distill_config(
        teacher, pairs, "data.max_pairs=9", "train.validate_pairs=4", "train.validate_images=8"
    )
    with pytest.raises(SettingError, match=r"data\.max_pairs is 9, but there are 12 pairs.*at most 8"):
        train(config, tmp_path / "refused")
