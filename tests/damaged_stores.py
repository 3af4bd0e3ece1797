"""Pair stores written as a job writes them, and functions that damage them."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

import stores
from d2g.core import seeds
from pairgen.prompts import PromptList, label_list, prompt_list_sha256
from pairgen.store.hdf5 import PairBatch, encode_rows, load_rows
from pairgen.store.spec import (
    StoreSpec,
    create_store,
    encode_record,
    prompts_path,
    quarantine_path,
    read_spec,
    shard_path,
    shards_present,
    write_through_scratch,
)
from pairgen.store.writer import PairWriter
from pairgen.verify import verify_store

LISTS = {
    "text": PromptList.of(["a cat", "ein Bär ☃", 'a "sign", red', "x" * 90]),
    "label": label_list(4),
    "none": PromptList.of([""]),
}


def spec_of(kind: str = "text", noise: str = "stored", **changes: object) -> StoreSpec:
    """The spec of 22 pairs in shards of 8, 8 and 6."""
    lists = {"prompts_sha256": prompt_list_sha256(LISTS[kind]), "num_prompts": len(LISTS[kind])}
    shape = {"latent_shape": (4, 4, 4), "conditioning": kind, "noise": noise}
    return replace(stores.SPEC, **{**lists, **shape, **changes})  # type: ignore[arg-type]


SPEC = spec_of()
Row = tuple[Tensor, Tensor, list[str], list[int]]


def rows(spec: StoreSpec, index: list[int], bad: tuple[int, ...] = ()) -> Row:
    """The arguments of PairWriter.append for these pairs: noise, latents (NaN for `bad`), prompts, index."""
    noise = seeds.noise(spec.seed, index, spec.latent_shape, spec.torch_dtype)
    latent = noise.float() * 0.5 + 1
    latent[[pair in bad for pair in index], 0, 0, 0] = float("nan")
    prompts = LISTS[spec.conditioning]
    return noise, latent, [prompts[spec.prompt_of(i)] for i in index], index


def write_shard(folder: Path, spec: StoreSpec, shard: int, bad: tuple[int, ...] = ()) -> None:
    with PairWriter(folder, spec, shard, retry=shard in shards_present(folder, spec)) as writer:
        if writer.missing:
            writer.append(*rows(spec, writer.missing, bad))
        writer.commit()


def make_store(
    folder: Path, spec: StoreSpec = SPEC, bad: tuple[int, ...] = (), shards: tuple[int, ...] = (0, 1, 2)
) -> Path:
    create_store(folder, spec)
    LISTS[spec.conditioning].save(prompts_path(folder))
    for shard in shards:
        if shard not in shards_present(folder, spec):
            write_shard(folder, spec, shard, bad)
    return folder


def write_rows(folder: Path, shard: int, batch: PairBatch, quarantined: tuple[int, ...] = ()) -> None:
    """Write `batch` as a shard with correct checksums, even if its rows do not belong there."""
    spec = read_spec(folder)
    write_through_scratch(
        encode_rows(spec, batch, quarantined), shard_path(folder, shard), folder / "partial"
    )


def load_shard(folder: Path, shard: int) -> PairBatch:
    return load_rows(shard_path(folder, shard), read_spec(folder))


def select_rows(batch: PairBatch, keep: list[int]) -> PairBatch:
    prompts = [batch.prompts[row] for row in keep]
    return PairBatch(
        noise=batch.noise[keep], latents=batch.latents[keep], prompts=prompts, index=batch.index[keep]
    )


def with_flipped_bit(data: bytes, position: int, bit: int) -> bytes:
    bad = bytearray(data)
    bad[position] ^= 1 << bit
    return bytes(bad)


def bad_files(folder: Path) -> list[str]:
    return [bad["shard"] for bad in verify_store(folder).bad_shards]


def file_contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a store by relative path, except claims."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and "claims" not in p.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def truncate(folder: Path) -> None:
    path = shard_path(folder, 1)
    path.write_bytes(path.read_bytes()[:-1])


def swap_prompt(folder: Path) -> None:
    batch = load_shard(folder, 1)
    prompts = list(LISTS[read_spec(folder).conditioning])
    wrong = prompts[(prompts.index(batch.prompts[4]) + 1) % len(prompts)]
    write_rows(folder, 1, replace(batch, prompts=[*batch.prompts[:4], wrong, *batch.prompts[5:]]))


def write_record(folder: Path, shard: int, *rows: dict[str, object]) -> None:
    quarantine_path(folder, shard).parent.mkdir(exist_ok=True)
    quarantine_path(folder, shard).write_bytes(encode_record(shard, rows))


S0, S1, S2 = (f"shards/pairs-0000{shard}.h5" for shard in range(3))
RECORD = "quarantine/pairs-00001.rows.json"
