"""pairgen.other_formats: what other readers find in a copy of a store equals the store."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from d2g.core.errors import SettingError, UserError
from d2g_cli import main as cli
from jobs import make_pairs
from pairgen.merge import merge_stores
from pairgen.other_formats import export_store
from pairgen.store.reader import PairReader
from pairgen.store.spec import quarantine_path
from pairgen.verify import verify_store
from stores import SPEC, put_shard, put_store


@pytest.fixture(scope="module")
def pairs(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(
        teacher, tmp_path_factory.mktemp("pairs"), steps=1, shard_size=8, dtype="float16", noise="seeded"
    )


def test_parquet_holds_the_rows(pairs: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["pairs", "export", str(pairs), "--out", str(tmp_path), "--json"])
    assert json.loads(result.stdout.splitlines()[-1]) == {
        **{"out": str(tmp_path), "format": "parquet"},
        **{"pairs": 12, "files": 2, "written": 2},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("pairs-00000.parquet", "pairs-00001.parquet", "store.json")
    ]
    rows = PairReader(pairs).read(range(12), dtype=None)
    table = pq.read_table(tmp_path / "pairs-00001.parquet")
    shape = json.loads(table.schema.metadata[b"shapes"])["noise"]
    assert table["index"].to_pylist() == list(range(8, 12))
    assert table["prompt"].to_pylist() == rows.prompts[8:]
    for name, values in (("noise", rows.noise), ("latent", rows.latents)):
        copied = table[name].combine_chunks().flatten().to_numpy().reshape(-1, *shape)
        assert copied.dtype == np.float16 and np.array_equal(copied, values[8:].numpy())


def test_tar_files_hold_the_rows(pairs: Path, tmp_path: Path) -> None:
    export_store(pairs, tmp_path, "webdataset")
    rows = PairReader(pairs).read(range(12), dtype=None)
    with tarfile.open(tmp_path / "pairs-00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert [name for name in members if name.startswith("000000003.")] == [
        *("000000003.noise.npy", "000000003.latent.npy", "000000003.txt")
    ]
    assert len(members) == 3 * 8 and members["000000003.txt"].decode() == rows.prompts[3]
    assert np.array_equal(np.load(io.BytesIO(members["000000003.noise.npy"])), rows.noise[3].numpy())
    assert np.array_equal(np.load(io.BytesIO(members["000000003.latent.npy"])), rows.latents[3].numpy())


def test_a_copy_resumes_and_equals_an_unbroken_one(pairs: Path, tmp_path: Path) -> None:
    for folder in ("once", "twice"):
        export_store(pairs, tmp_path / folder, "webdataset")
    (tmp_path / "twice" / "pairs-00001.tar").unlink()
    assert export_store(pairs, tmp_path / "twice", "webdataset")["written"] == 1
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_a_shard_that_was_filled_after_the_copy_is_copied_again(tmp_path: Path, format: str) -> None:
    """Shard 1 has no rows at first."""
    store = put_store(tmp_path / "pairs", quarantined=[2, *range(8, 16)])
    assert export_store(store, tmp_path / "copy", format)["pairs"] == 22 - 9
    for shard in (0, 1):
        quarantine_path(store, shard).unlink()
        put_shard(store, SPEC, shard)
    again = export_store(store, tmp_path / "copy", format)
    assert (again["pairs"], again["written"]) == (22, 2)
    export_store(store, tmp_path / "once", format)
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_a_filled_shard_that_is_older_than_the_copy_is_copied_again(tmp_path: Path, format: str) -> None:
    """A merge with hard links, `cp -p` and rsync keep the time of a file that another machine has made."""
    filled, store = put_store(tmp_path / "filled"), put_store(tmp_path / "pairs", quarantined=[2])
    assert export_store(store, tmp_path / "copy", format)["pairs"] == 21
    merge_stores([filled], store, link=True)
    again = export_store(store, tmp_path / "copy", format)
    assert (again["pairs"], again["written"]) == (22, 1)
    export_store(store, tmp_path / "once", format)
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()


def test_what_cannot_be_copied_is_refused(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="format is 'zip'; expected parquet or webdataset"):
        export_store(pairs, tmp_path / "out", "zip")
    export_store(pairs, tmp_path / "out", "parquet")
    other = make_pairs(teacher, tmp_path, steps=2, shard_size=8, dtype="float16", noise="seeded")
    with pytest.raises(UserError, match="holds pairs of another spec; differing: steps"):
        export_store(other, tmp_path / "out", "parquet")
    assert verify_store(pairs).ok


def test_a_copy_beside_the_shards_of_a_store_is_refused(tmp_path: Path) -> None:
    store, twin = put_store(tmp_path / "pairs"), put_store(tmp_path / "twin")
    (tmp_path / "link").symlink_to(store)
    files = sorted(tmp_path.rglob("*"))
    for folder, out in ((store, store), (tmp_path / "link", store), (store, store / "shards"), (store, twin)):
        for more in ([], ["--dry-run"]):
            words = ["pairs", "export", str(folder), "--out", str(out), *more]
            refused = CliRunner().invoke(cli.app, words).exception
            assert isinstance(refused, SettingError) and "; choose another folder" in str(refused), words
    assert sorted(tmp_path.rglob("*")) == files
