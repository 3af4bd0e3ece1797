"""A store that version 0.1.0 wrote (tests/golden/pairs_0_1) can still be read, bit by bit.

Written with `d2g pairs generate --preset trial --teacher miniature --num-pairs 3 --steps 2 --shard-size 3`;
expected.json holds what 0.1.0's own reader returned.
"""

import hashlib
import json
from pathlib import Path

import torch

from d2g.core import seeds
from pairgen.store.hdf5 import load_rows
from pairgen.store.reader import PairReader
from pairgen.store.spec import read_spec, shard_path
from pairgen.verify import verify_store

STORE = Path(__file__).parents[1] / "golden" / "pairs_0_1"
EXPECTED = json.loads((STORE / "expected.json").read_text(encoding="utf-8"))


def sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def test_the_reader_returns_the_rows_that_0_1_0_read() -> None:
    reader = PairReader(STORE)
    batch = reader.read(range(len(reader)), None)
    assert reader.complete and reader.spec.sha256 == EXPECTED["spec_sha256"]
    assert batch.index.tolist() == EXPECTED["index"] and batch.prompts == EXPECTED["prompts"]
    assert batch.noise.dtype == batch.latents.dtype == torch.float16
    assert sha256(batch.noise) == EXPECTED["noise_sha256"]
    assert sha256(batch.latents) == EXPECTED["latents_sha256"]
    assert batch.noise.flatten(1)[:, :4].tolist() == EXPECTED["noise"]
    assert batch.latents.flatten(1)[:, :4].tolist() == EXPECTED["latents"]


def test_the_shard_passes_every_check() -> None:
    report = verify_store(STORE)
    assert report.ok and report.checked == 3 and report.prompts_checked
    rows = load_rows(shard_path(STORE, 0), read_spec(STORE))
    assert sha256(rows.latents) == EXPECTED["latents_sha256"]


def test_its_noise_follows_from_seed_and_index() -> None:
    spec = read_spec(STORE)
    noise = seeds.noise(spec.seed, range(3), spec.latent_shape, spec.torch_dtype)
    assert sha256(noise) == EXPECTED["noise_sha256"]
