"""Pair stores without a teacher: `put_store` encodes shards in a few ms, `make_store` uses PairWriter."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2g.core import seeds
from d2g.diffusion.latents import LatentSpace
from pairgen.store.hdf5 import PairBatch, encode_rows
from pairgen.store.spec import StoreSpec, create_store, encode_record, pending, quarantine_path, shard_path
from pairgen.store.writer import PairWriter

FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
"""Mark of tests that fork: Python 3.12 warns about forking a process with threads."""

SPEC = StoreSpec(
    teacher="tiny",
    teacher_sha256="0" * 64,
    prompts_sha256="1" * 64,
    num_pairs=22,
    num_prompts=4,
    per_prompt=3,
    solver="ddim",
    steps=50,
    spacing="leading",
    final_alpha_one=True,
    guidance=8.0,
    seed=5,
    latent_shape=(4, 8, 8),
    latent_space=LatentSpace(channels=4, downscale=8, scale=0.18215),
    shard_size=8,
)
PROMPTS = ["a cat", "ein Bär ☃", "", 'a "sign", red']


def spec_of(**settings: Any) -> StoreSpec:
    """SPEC with other settings; `latent_shape` may have any number of channels."""
    channels = settings.get("latent_shape", SPEC.latent_shape)[0]
    space = LatentSpace(channels=channels, downscale=8, scale=0.18215)
    return replace(SPEC, **{"latent_space": space, **settings})


def condition(spec: StoreSpec, index: int) -> str:
    """The conditioning of pair `index` as text: its prompt, its class number, or nothing."""
    number = spec.prompt_of(index)
    return {"text": PROMPTS[number % 4], "label": str(7 * number), "none": ""}[spec.conditioning]


def rows_of(spec: StoreSpec, index: Sequence[int]) -> PairBatch:
    """The pairs of `index` in the stored dtype: noise from (seed, index), latents computed from the noise."""
    noise = seeds.noise(spec.seed, index, spec.latent_shape, spec.torch_dtype)
    return PairBatch(
        noise=noise,
        latents=(noise.float() * 0.5 + 1).to(spec.torch_dtype),
        prompts=[condition(spec, i) for i in index],
        index=torch.tensor(list(index), dtype=torch.int64),
    )


def put_shard(folder: Path, spec: StoreSpec, shard: int, quarantined: Sequence[int] = ()) -> Path:
    """Write one shard without the pairs `quarantined`, and the record of these pairs."""
    index = [i for i in spec.rows(shard) if i not in quarantined]
    path = shard_path(folder, shard)
    path.unlink(missing_ok=True)  # a reader that has the file open keeps the old one
    path.write_bytes(encode_rows(spec, rows_of(spec, index), quarantined))
    if quarantined:
        record = [{"index": i, "prompt": condition(spec, i), "reason": "not finite"} for i in quarantined]
        quarantine_path(folder, shard).parent.mkdir(exist_ok=True)
        quarantine_path(folder, shard).write_bytes(encode_record(shard, record))
    return path


def put_store(folder: Path, spec: StoreSpec = SPEC, quarantined: Sequence[int] = ()) -> Path:
    """Write a complete store to `folder`, without the pairs `quarantined`."""
    create_store(folder, spec)
    for shard in range(spec.num_shards):
        put_shard(folder, spec, shard, [i for i in quarantined if i in spec.rows(shard)])
    return folder


def same(a: PairBatch, b: PairBatch) -> bool:
    """Whether two batches hold the same values bit for bit; their dtypes may differ."""
    tensors = ((a.noise, b.noise), (a.latents, b.latents), (a.index, b.index))
    return a.prompts == b.prompts and all(torch.equal(x.double(), y.double()) for x, y in tensors)


def flip_bit(path: Path, position: int) -> None:
    """Flip one bit of the byte at `position` of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


def rows(spec: StoreSpec, index: list[int]) -> tuple[Tensor, Tensor, list[str], list[int]]:
    """The arguments of PairWriter.append for these pairs: noise, latents, prompts, index."""
    noise = seeds.noise(spec.seed, index, spec.latent_shape, spec.torch_dtype)
    return noise, noise.float() * 0.5 + 1, [PROMPTS[spec.prompt_of(i)] for i in index], index


def write_shard(folder: Path, spec: StoreSpec, shard: int, batch: int = 3, flush_seconds: float = 60) -> None:
    with PairWriter(folder, spec, shard, flush_seconds=flush_seconds) as writer:
        while writer.missing:
            writer.append(*rows(spec, writer.missing[:batch]))
        writer.commit()


def make_store(folder: Path, spec: StoreSpec = SPEC) -> Path:
    create_store(folder, spec)
    for work in pending(folder, spec):
        write_shard(folder, spec, work.start // spec.shard_size)
    return folder
