"""Checking, mending, joining and describing whole pair stores. All HDF5 work is the store's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError
from core.progress import Progress, quiet
from pairgen.layout import (
    StoreSpec,
    create_store,
    publish,
    read_spec,
    refuse_other,
    shard_path,
    shards_present,
    writing,
)
from pairgen.store import load_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What `verify_store` found. `ok`: every pair of the spec is there once, and every byte is as written."""

    ok: bool
    checked: int  # pairs in sound shards
    bad_shards: list[dict[str, str]]  # {"shard": path inside the folder, "reason": one line}
    missing: list[str]  # shards not made yet, or lost
    duplicates: list[int]  # pair indices that stand in more than one row


def verify_store(folder: Path, progress: Progress = quiet) -> VerifyReport:
    """Read every byte of every shard and of every partial file; compare hashes, headers, values and indices.

    Damage is reported, never raised; a folder without a readable store.json raises UserError.
    """
    folder, spec = Path(folder), read_spec(folder)
    names = {shard_path(folder, shard): shard for shard in range(spec.num_shards)}
    files = sorted([*(folder / "shards").glob("*"), *(folder / "partial").glob("*.h5")])
    bad, indices, checked = [], [np.empty(0, np.int64)], 0
    for done, path in enumerate(files):
        try:
            index = load_rows(path, spec).index.numpy()
            if path.parent.name == "shards":
                indices.append(index)
                _check_index(path, index, names, spec)
                checked += len(index)
        except UserError as error:
            bad.append({"shard": str(path.relative_to(folder)), "reason": str(error)})
        progress("verify", done + 1, len(files))
    values, counts = np.unique(np.concatenate(indices), return_counts=True)
    duplicates = values[counts > 1].tolist()
    missing = [str(path.relative_to(folder)) for path in names if not path.exists()]
    ok = not (bad or missing or duplicates)
    return VerifyReport(ok=ok, checked=checked, bad_shards=bad, missing=missing, duplicates=duplicates)


def _check_index(path: Path, index: np.ndarray, names: dict[Path, int], spec: StoreSpec) -> None:
    if path not in names:
        raise UserError(f"{path}: no shard of this store; move it away")
    rows = spec.rows(names[path])
    if not np.array_equal(index, np.arange(rows.start, rows.stop)):
        got = f"{index.min()} to {index.max()} ({len(index)} rows)" if len(index) else "no rows"
        raise UserError(f"{path}: holds pairs {got}, its name says {rows.start} to {rows.stop - 1}")


def repair_store(folder: Path, progress: Progress = quiet) -> list[str]:
    """Move every bad file to DIR/quarantine, so that generating again makes its rows anew. Deletes nothing.

    Returns the paths inside `folder` that were moved.
    """
    folder = Path(folder)
    names = [bad["shard"] for bad in verify_store(folder, progress).bad_shards]
    with writing(folder, "no shard was deleted"):
        for name in names:
            (folder / "quarantine").mkdir(exist_ok=True)
            (folder / name).rename(_free_name(folder / "quarantine" / Path(name).name))
    return names


def _free_name(path: Path) -> Path:
    number = 0
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


def merge_stores(folders: Sequence[Path], out: Path, progress: Progress = quiet) -> int:
    """Copy the whole shards of stores of one spec into `out`; every shard is checked on its way.

    A shard that stands in two places must be the same byte for byte. Returns the number of pairs in `out`.
    Raises UserError for differing specs (naming the keys), clashes and damage; run again to resume.
    """
    if not folders:
        raise UserError("nothing to merge: got no pair folders, expected at least one")
    spec, out = read_spec(folders[0]), Path(out)
    for folder in folders:
        refuse_other(Path(folder), read_spec(folder), spec)
    create_store(out, spec)
    work = [(Path(f), shard) for f in folders for shard in shards_present(f, spec)]
    for done, (folder, shard) in enumerate(work):
        _copy_shard(shard_path(folder, shard), shard_path(out, shard), shard, spec)
        progress("merge", done + 1, len(work))
    return sum(len(spec.rows(shard)) for shard in shards_present(out, spec))


def _copy_shard(source: Path, target: Path, shard: int, spec: StoreSpec) -> None:
    _check_index(source, load_rows(source, spec).index.numpy(), {source: shard}, spec)
    data = source.read_bytes()
    if not target.exists():
        with writing(target.parent.parent, "the stores merged from are untouched"):
            publish(data, target, target.parent.parent / "partial")
    elif target.read_bytes() != data:
        raise UserError(
            f"{source} and {target} hold different bytes for the same pairs; merge only one of them"
        )


def store_info(folder: Path) -> dict[str, Any]:
    """`pairs` and `shards` there, the `spec`, whether it is `complete`, and its size `gib`."""
    spec = read_spec(folder)
    shards = shards_present(folder, spec)
    pairs = sum(len(spec.rows(shard)) for shard in shards)
    size = sum(shard_path(folder, shard).stat().st_size for shard in shards)
    return {
        "pairs": pairs,
        "shards": len(shards),
        "spec": spec.as_json(),
        "complete": pairs == spec.num_pairs,
        "gib": size / 2**30,
    }
