"""The pair store: round trips, specs, damage, and the documented format."""

import hashlib
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from d2g.core.errors import SettingError, UserError
from d2g.diffusion.latents import LatentSpace
from pairgen.store.hdf5 import PairBatch, create_store, pending, read_spec
from pairgen.store.reader import PairReader
from pairgen.store.writer import PairWriter
from pairgen.verify import store_info, verify_store
from stores import FORKS, PROMPTS, SPEC, make_store, rows, same, write_shard

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("shared") / "deep" / "pairs")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "pairs")


# Round trips.


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("noise", ["stored", "seeded"])
def test_round_trip(tmp_path: Path, dtype: str, noise: str) -> None:
    spec = replace(SPEC, dtype=dtype, noise=noise)
    reader = PairReader(make_store(tmp_path, spec), expect=spec)
    assert len(reader) == 22 and reader.complete and reader.spec == spec and read_spec(tmp_path) == spec
    order = [21, 0, 8, 7, 0, 15]
    batch, (expected_noise, latent, prompts, _) = reader.read(order), rows(spec, order)
    assert batch.noise.dtype == batch.latents.dtype == torch.float32 and batch.index.tolist() == order
    assert torch.equal(batch.noise, expected_noise.float()) and batch.prompts == prompts
    assert torch.equal(batch.latents, latent.to(spec.torch_dtype).float())
    assert reader.prompts() == PROMPTS
    with h5py.File(tmp_path / "shards" / "pairs-00000.h5", locking=False) as file:
        assert ("noise" in file) == (noise == "stored")
        assert all(file[name].fletcher32 for name in file)


def test_rows_do_not_depend_on_batches_flushes_or_order(tmp_path: Path, shared_store: Path) -> None:
    create_store(tmp_path, SPEC)
    for shard in (2, 0, 1):
        with PairWriter(tmp_path, SPEC, shard, flush_seconds=0) as writer:
            for index in reversed(writer.missing):
                writer.append(*rows(SPEC, [index]))
            writer.commit()
    every = list(range(22))
    assert same(PairReader(tmp_path).read(every), PairReader(shared_store).read(every))
    assert not list((tmp_path / "partial").iterdir())


def test_pending_rows_of_an_incomplete_store(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    assert pending(tmp_path, SPEC) == [range(0, 8), range(8, 16), range(16, 22)]
    assert len(PairReader(tmp_path)) == 0 and PairReader(tmp_path).prompts() == []
    for shard in (2, 0):
        write_shard(tmp_path, SPEC, shard)
    reader = PairReader(tmp_path)
    assert pending(tmp_path, SPEC) == [range(8, 16)] and not reader.complete and len(reader) == 14
    assert reader.read(range(14)).index.tolist() == [*range(8), *range(16, 22)]
    info = store_info(tmp_path)
    assert (info["pairs"], info["shards"], info["complete"]) == (14, 2, False)
    assert info["spec"] == SPEC.as_json() and info["gib"] > 0
    report = verify_store(tmp_path)
    assert not report.ok and report.missing == ["shards/pairs-00001.h5"] and report.checked == 14
    with pytest.raises(IndexError, match="14 of 14"):
        reader.read([14])


def test_a_complete_shard_cannot_be_written_again(store: Path) -> None:
    with pytest.raises(UserError, match="already complete"), PairWriter(store, SPEC, 0):
        pass


def test_prompt_of_wraps_around() -> None:
    assert [SPEC.prompt_of(i) for i in (0, 2, 3, 11, 12, 21)] == [0, 0, 1, 3, 0, 3]


def test_digest_does_not_depend_on_the_spelling_of_numbers(tmp_path: Path) -> None:
    spec = replace(SPEC, guidance=8, latent_space=LatentSpace(channels=4, downscale=8, scale=1, shift=0))
    create_store(tmp_path, spec)
    assert read_spec(tmp_path).sha256 == spec.sha256 != SPEC.sha256


@pytest.mark.parametrize(
    "settings",
    [{"num_pairs": 0}, {"seed": -1}, {"dtype": "int8"}, {"noise": "none"}, {"latent_shape": (3, 8, 8)}],
)
def test_invalid_specs_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        replace(SPEC, **settings)  # type: ignore[arg-type]


# Several processes.


class Rows(torch.utils.data.Dataset[int]):
    def __init__(self, reader: PairReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, str, Tensor]:
        batch = self.reader.read([row])
        return batch.noise[0], batch.latents[0], batch.prompts[0], batch.index[0]


@FORKS
def test_a_reader_can_be_used_after_a_fork(shared_store: Path) -> None:
    reader = PairReader(shared_store)
    before = reader.read(range(22))  # opens all files
    for _ in range(2):
        loader = DataLoader(Rows(reader), batch_size=5, num_workers=2, multiprocessing_context="fork")
        parts = list(loader)
        prompts = [prompt for part in parts for prompt in part[2]]
        noise, latent, index = (torch.cat([part[i] for part in parts]) for i in (0, 1, 3))
        assert same(PairBatch(noise=noise, latents=latent, prompts=prompts, index=index), before)
        assert same(reader.read(range(22)), before)


def test_a_reader_can_be_pickled(shared_store: Path) -> None:
    reader = PairReader(shared_store)
    before = reader.read([3, 20])
    assert same(pickle.loads(pickle.dumps(reader)).read([3, 20]), before)


# Other specs.


def test_another_spec_is_refused_with_the_changed_keys(store: Path) -> None:
    other = replace(SPEC, guidance=3.0, latent_space=LatentSpace(channels=4, downscale=8, scale=0.13025))
    says = r"differing: guidance \(8\.0 -> 3\.0\), latent_space\.scale \(0\.18215 -> 0\.13025\)"
    with pytest.raises(UserError, match=says):
        create_store(store, other)
    with pytest.raises(UserError, match=says):
        PairReader(store, expect=other)
    create_store(store, SPEC)
    assert pending(store, SPEC) == []


def test_a_shard_of_another_store_is_refused(store: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", replace(SPEC, steps=20))
    name = "shards/pairs-00001.h5"
    (store / name).write_bytes((other / name).read_bytes())
    with pytest.raises(UserError, match=r"pairs-00001\.h5: made with another spec: steps \(50 -> 20\)"):
        PairReader(store).read([8])
    assert [bad["shard"] for bad in verify_store(store).bad_shards] == [name]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[1]",
        b'{"schema": 2, "sha256": "", "spec": []}',
        b'{"schema": 2, "sha256": "", "spec": {}}',
    ],
)
def test_damaged_store_json(store: Path, content: bytes) -> None:
    (store / "store.json").write_bytes(content)
    with pytest.raises(UserError, match=r"store\.json is damaged"):
        PairReader(store)


def test_edited_newer_or_absent_store_json(store: Path) -> None:
    content = json.loads((store / "store.json").read_text())
    content["spec"]["guidance"] = 7.5
    (store / "store.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="sha256 does not match"):
        read_spec(store)
    for schema, todo in ((3, "upgrade"), (1, "read it with the version that wrote it")):
        (store / "store.json").write_text(json.dumps({**content, "schema": schema}))
        with pytest.raises(UserError, match=f"reads schema 2; {todo}"):
            read_spec(store)
    with pytest.raises(UserError, match="is not a pair store"):
        PairReader(store / "shards")


# Damage.


def test_every_flipped_bit_is_found(store: Path) -> None:
    """Verification finds every flipped bit; reading never returns changed rows and never crashes."""
    path = store / "shards" / "pairs-00002.h5"
    good, truth = path.read_bytes(), PairReader(store).read(range(22))
    refused = 0
    positions = sorted({*range(0, 512, 37), *range(512, len(good), 211), len(good) - 1})
    for number, position in enumerate(positions):
        bad = bytearray(good)
        bad[position] ^= 1 << number % 8
        path.write_bytes(bad)
        report = verify_store(store)
        assert [b["shard"] for b in report.bad_shards] == ["shards/pairs-00002.h5"], position
        try:
            batch = PairReader(store).read(range(22))
        except UserError as error:
            assert "pairs-00002.h5" in str(error)
            refused += 1
        else:
            assert same(batch, truth), position
    path.write_bytes(good)
    assert verify_store(store).ok and refused > len(positions) // 4


def test_a_flip_in_each_dataset_is_refused_when_read(store: Path) -> None:
    path = store / "shards" / "pairs-00000.h5"
    good = path.read_bytes()
    with h5py.File(path) as file:
        places = {name: file[name].id.get_chunk_info(0) for name in file}
    assert sorted(places) == ["index", "latent", "noise", "prompt"]
    for chunk in places.values():
        for offset in (0, chunk.size // 2, chunk.size - 1):
            bad = bytearray(good)
            bad[chunk.byte_offset + offset] ^= 16
            path.write_bytes(bad)
            with pytest.raises(UserError, match=r"pairs-00000\.h5: unreadable"):
                PairReader(store).read([0])


# The documented format.


def test_the_documented_example_reads_a_store(
    shared_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "pair-format.md").read_text()
    monkeypatch.chdir(shared_store)
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 22 and lines[3].startswith("3 ein Bär ☃ ")
    assert all(f"`{key}`" in text for key in SPEC.as_json() if key != "schema")
    with h5py.File(shared_store / "shards" / "pairs-00000.h5") as file:
        assert all(f"`{name}`" in text for name in [*file, *file.attrs])


def test_the_documented_seal_and_digest(shared_store: Path) -> None:
    data = (shared_store / "shards" / "pairs-00000.h5").read_bytes()
    head = json.loads(data[:512])
    assert head["bytes"] == len(data) and head["sha256"] == hashlib.sha256(data[512:]).hexdigest()
    content = json.loads((shared_store / "store.json").read_text())
    compact = json.dumps(content["spec"], sort_keys=True, separators=(",", ":"))
    assert content["sha256"] == hashlib.sha256(compact.encode()).hexdigest()
    with h5py.File(shared_store / "shards" / "pairs-00000.h5") as file:
        assert file.attrs["noise_sha256"] == hashlib.sha256(np.asarray(file["noise"]).tobytes()).hexdigest()
        assert file.attrs["spec_sha256"] == content["sha256"] and file.attrs["rows"] == 8
