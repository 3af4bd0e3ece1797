"""pairgen.store.hdf5_structure: shards changed by an attacker who updated their checksums. `verify` and the
reader refuse the same files in one line before they read values, and HDF5 never crashes.
"""

import hashlib
import json
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from d2g.core.errors import UserError
from pairgen.store.hdf5 import _user_block
from pairgen.store.reader import PairReader
from pairgen.store.spec import StoreSpec, read_spec, shard_path
from pairgen.verify import verify_store
from stores import SPEC, put_store, spec_of

Tamper = Callable[[Any], None]
SMALL = spec_of(num_pairs=4, shard_size=4, latent_shape=(1, 2, 2))


def update_seal(path: Path) -> None:
    """Write the current length and sha256 of a shard into its first 512 bytes."""
    data = path.read_bytes()
    path.write_bytes(_user_block(len(data), hashlib.sha256(data[512:]).hexdigest()) + data[512:])


def tampered(folder: Path, tamper: Tamper, spec: StoreSpec = SPEC) -> Path:
    """A store whose first shard was changed by `tamper`, with updated checksums."""
    put_store(folder, spec)
    with h5py.File(shard_path(folder, 0), "r+", libver=("v110", "v110")) as file:
        tamper(file)
    update_seal(shard_path(folder, 0))
    return folder


def replaced(name: str, **how: Any) -> Tamper:
    """Write a dataset again, with the same values and other properties."""

    def tamper(file: Any) -> None:
        values, dtype = file[name][:], how.pop("dtype", file[name].dtype)
        del file[name]
        file.create_dataset(name, data=values.astype(dtype), dtype=dtype, **how)

    return tamper


def virtual(target: str) -> Tamper:
    """A virtual dataset; if it refers to its own file, reading it aborts the process."""

    def tamper(file: Any) -> None:
        shape, dtype = file["latent"].shape, file["latent"].dtype
        if target != "other":
            del file["latent"]
        layout = h5py.VirtualLayout(shape, dtype)
        layout[:] = h5py.VirtualSource("/tmp/absent.h5" if target == "file" else ".", "latent", shape)
        if target == "other":
            del file["noise"]
        file.create_virtual_dataset("noise" if target == "other" else "latent", layout)

    return tamper


def link(new: Any) -> Tamper:
    def tamper(file: Any) -> None:
        del file["latent"]
        file["latent"] = new

    return tamper


def external(file: Any) -> None:
    shape, dtype = file["latent"].shape, file["latent"].dtype
    del file["latent"]
    file.create_dataset("latent", shape, dtype, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def sparse(name: str, rows: int) -> Tamper:
    """A dataset with a shape of `rows` rows but no stored data."""

    def tamper(file: Any) -> None:
        shape, dtype = (rows, *file[name].shape[1:]), file[name].dtype
        del file[name]
        file.create_dataset(name, shape, dtype, chunks=True, fletcher32=True)
        file.attrs["rows"] = rows

    return tamper


def bomb(file: Any) -> None:
    """Sixteen stored bytes that claim to expand to eight million."""
    count, wide = len(file["prompt"]), h5py.string_dtype("utf-8", 1 << 20)
    del file["prompt"]
    dataset = file.create_dataset("prompt", (count,), wide, chunks=True, fletcher32=True, compression="gzip")
    for row in range(0, count, dataset.chunks[0]):
        dataset.id.write_direct_chunk((row,), b"0123456789abcdef")


def forged_chunk(file: Any) -> None:
    """A chunk whose stored bytes expand to far more than the chunk size."""
    dataset, bad = file["prompt"], zlib.compress(b"\0" * (1 << 26), 9)
    dataset.id.write_direct_chunk((0,), bad + b"\0\0\0\0")


def huge_attribute(file: Any) -> None:
    del file.attrs["rows"]
    file.attrs.create("rows", np.zeros(8000, np.int64))


def extra(file: Any) -> None:
    file["note"] = 3


def attribute(name: str, value: Any) -> Tamper:
    def tamper(file: Any) -> None:
        file.attrs[name] = value

    return tamper


LZF: dict[str, Any] = {"chunks": True, "fletcher32": True, "compression": "lzf"}
CASES: dict[str, tuple[Tamper, str]] = {
    "virtual": (virtual("file"), "no checksums, or its data lies elsewhere"),
    "virtual, its own file": (virtual("self"), "no checksums, or its data lies elsewhere"),
    "virtual, other dataset": (virtual("other"), "no checksums, or its data lies elsewhere"),
    "soft link": (link(h5py.SoftLink("/noise")), "latent is not in the file itself"),
    "soft link to itself": (link(h5py.SoftLink("/latent")), "latent is not in the file itself"),
    "external link": (link(h5py.ExternalLink("/etc/passwd", "/x")), "latent is not in the file itself"),
    "external storage": (external, "no checksums, or its data lies elsewhere"),
    "group": (lambda file: (file.move("latent", "old"), file.create_group("latent")), "is not a dataset"),
    "no checksum": (replaced("latent", chunks=True), "latent has no checksums"),
    "contiguous": (replaced("index"), "index has no checksums"),
    "lzf": (replaced("latent", **LZF), "latent needs filter 32000"),
    "scale-offset": (replaced("index", chunks=True, scaleoffset=0), "index has no checksums"),
    "strings of any length": (replaced("prompt", dtype=h5py.string_dtype(), chunks=True), "fixed length"),
    "float index": (replaced("index", dtype="f4", chunks=True, fletcher32=True), "whole numbers"),
    "double latents": (replaced("latent", dtype="f8", chunks=True, fletcher32=True), "latent is float64"),
    "sparse": (sparse("latent", 8), "latent lacks a part of its rows"),
    "10^12 rows": (sparse("latent", 10**12), "1000000000000 rows, expected at most 8"),
    "bomb": (bomb, "does not have the size that its chunks say"),
    "forged chunk": (forged_chunk, "does not have the size that its chunks say"),
    "attribute of many values": (huge_attribute, "rows is no single value"),
    "another column": (extra, "holds 'note', which is no column of this store"),
    "negative rows": (attribute("rows", -1), "-1 rows, expected at most 8"),
    "deep JSON": (attribute("quarantined", "[" * 20000), "unreadable"),
    "infinite pair": (attribute("quarantined", "[1e999]"), "unreadable"),
    "spec is a list": (attribute("spec", "[]"), ""),
    "rows is an object": (attribute("rows", h5py.Empty("f")), "rows is no single value"),
}


@pytest.mark.parametrize("case", CASES)
def test_verify_and_the_reader_refuse_the_same(case: str, tmp_path: Path) -> None:
    tamper, reason = CASES[case]
    tampered(tmp_path, tamper)
    if case == "spec is a list":  # the spec is read only if its digest differs too
        with h5py.File(shard_path(tmp_path, 0), "r+") as file:
            file.attrs["spec_sha256"] = "0"
        update_seal(shard_path(tmp_path, 0))
    (bad,) = verify_store(tmp_path, workers=1).bad_shards
    assert bad["shard"] == "shards/pairs-00000.h5" and reason in bad["reason"], bad
    with pytest.raises(UserError) as caught:
        PairReader(tmp_path).read([0])
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    reader = PairReader(tmp_path, skip_bad=True)
    assert reader.read([0]).index.tolist() == [8]


@pytest.mark.parametrize("size", [0, 2**64 - 8, 2**64 - 16, 2**32, 4096])
def test_a_damaged_heap_of_texts_does_not_hang(size: int, tmp_path: Path) -> None:
    """HDF5 would loop over a collection whose objects have no size, or one that wraps around."""
    put_store(tmp_path)
    path = shard_path(tmp_path, 0)
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL")
    data[heap + 24 : heap + 32] = size.to_bytes(8, "little")
    path.write_bytes(data)
    update_seal(path)
    (bad,) = verify_store(tmp_path, workers=1).bad_shards
    if size not in (0, 4096):  # with these the objects still fill the heap, or the text is another one
        assert "the heap of its attributes is damaged" in bad["reason"]
    with pytest.raises(UserError):
        PairReader(tmp_path).read([0])


@pytest.mark.parametrize("how", [{"compression": "gzip"}, {"compression": "gzip", "shuffle": True}, {}])
def test_allowed_filters_and_chunks_can_be_read(how: dict[str, Any], tmp_path: Path) -> None:
    """Other writers may use any chunk size and the filters of every HDF5 build."""
    tampered(tmp_path, replaced("latent", chunks=(3, 4, 8, 8), fletcher32=True, **how))
    report = verify_store(tmp_path, workers=1)
    assert report.bad_shards == [] and report.checked == 22
    assert PairReader(tmp_path).read([0]).index.tolist() == [0]


def test_a_pipe_in_place_of_a_file_is_refused_without_blocking(tmp_path: Path) -> None:
    put_store(tmp_path)
    shard_path(tmp_path, 1).unlink()
    os.mkfifo(shard_path(tmp_path, 1))
    (bad,) = verify_store(tmp_path, workers=1).bad_shards
    assert "not a regular file" in bad["reason"]
    with pytest.raises(UserError, match="not a regular file"):
        PairReader(tmp_path)
    assert PairReader(tmp_path, skip_bad=True).read([8]).index.tolist() == [16]
    (tmp_path / "store.json").unlink()
    os.mkfifo(tmp_path / "store.json")
    with pytest.raises(UserError, match="not a regular file"):
        read_spec(tmp_path)


def test_a_store_of_a_billion_shards_is_refused(tmp_path: Path) -> None:
    put_store(tmp_path, SMALL)
    facts = json.loads((tmp_path / "store.json").read_text())
    facts["spec"] |= {"num_pairs": 10**9, "shard_size": 1}
    (tmp_path / "store.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="shard_size is 1, expected at least 1000 for 1000000000 pairs"):
        read_spec(tmp_path)


def fuzz(folder: Path, seed: int, rounds: int) -> int:
    """Change a few bytes of a sealed shard `rounds` times. Returns how often the change was noticed."""
    put_store(folder, SMALL)
    path, rng, noticed = shard_path(folder, 0), random.Random(seed), 0
    original = path.read_bytes()
    for _ in range(rounds):
        data = bytearray(original)
        # The superblock and the object headers hold most of the structure.
        for _ in range(rng.choice([1, 1, 2, 4, 16])):
            data[rng.randrange(512, len(data))] = rng.choice([0, 1, 255, rng.randrange(256)])
        if rng.random() < 0.1:
            del data[rng.randrange(512, len(data)) :]
        path.write_bytes(data)
        update_seal(path)
        report = verify_store(folder, workers=1)
        try:
            PairReader(folder).read([0, 1, 2, 3])
        except UserError as error:
            assert "\n" not in str(error)
            assert not report.ok, "training refuses what verify passes"
        noticed += not report.ok
    return noticed


def test_changed_bytes_never_crash(tmp_path: Path) -> None:
    assert fuzz(tmp_path, seed=0, rounds=120) > 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "rounds"), [(1, 400), *(pytest.param(seed, 1000, marks=pytest.mark.long) for seed in (1, 2))]
)
def test_many_changed_bytes_never_crash(seed: int, rounds: int, tmp_path: Path) -> None:
    assert fuzz(tmp_path, seed, rounds) > 0.48 * rounds
