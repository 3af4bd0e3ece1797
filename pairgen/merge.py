"""Merge pair stores of one spec that were generated on different machines."""

import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from d2g.core.atomic_files import fsync_path
from d2g.core.errors import UserError
from d2g.core.logs import logger
from d2g.core.progress import Progress, quiet
from pairgen.prompts import PromptList
from pairgen.store.hdf5 import USER_BLOCK_BYTES, load_rows, read_blocks
from pairgen.store.spec import (
    StoreSpec,
    create_store,
    prompts_path,
    quarantine_path,
    read_spec,
    remove_leftovers,
    require_same_or_earlier_spec,
    shard_path,
    shards_present,
    temporary_name,
    write_through_scratch,
    writing,
)
from pairgen.verify import FileCheck, check_file, in_threads, record_fault, store_info, stored_prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """Result of `merge_stores`."""

    pairs: int  # rows of the merged store
    shards: int  # complete shards of the merged store
    copied: int  # shards copied or linked by this call
    differing: list[dict[str, Any]]
    """Shards that several stores hold, which may differ by rounding: {"shard", "kept", "left_out",
    "max_abs_err"}."""


def merge_stores(
    folders: Sequence[Path],
    out: Path,
    progress: Progress = quiet,
    *,
    link: bool = False,
    tolerance: float = 0.02,
    workers: int = 0,
) -> MergeReport:
    """Copy the complete shards of stores with one spec to `out`, with prompts and quarantine records.

    Stores may have grown to different sizes; `out` gets the largest. The last shard of a smaller store is
    left out if the largest store has more rows in it, and the log says so. Every shard is checked as
    `verify_store` does.

    If several stores hold a shard (`out` counts first), the first with the fewest quarantined rows is kept.
    Rows that it shares with the others must have equal noise and prompts, and latents that differ by at most
    `tolerance`, those of the stage before included.

    link: make hard links instead of copies. workers: threads, 0 for the default. Call it again to resume.
    Raises UserError for different specs (naming the keys), conflicting rows (naming both files) and damage.
    """
    if not folders:
        raise UserError("nothing to merge: got no pair folders, expected at least one")
    out, sources = Path(out), [Path(folder) for folder in folders]

    # All stores must have the same spec, apart from their size. `out` may hold shards from an earlier call.
    specs = {folder: read_spec(folder) for folder in sources}
    spec = max(specs.values(), key=lambda spec: (spec.num_pairs, spec.num_prompts))
    for folder, source_spec in specs.items():
        require_same_or_earlier_spec(folder, source_spec, spec)
    create_store(out, spec)
    prompts = _merge_prompts({out: spec, **specs}, out, spec)

    # Merge the shards in threads: they are independent of each other.
    places = _shard_places(specs, spec)
    merge = partial(_merge_shard, out, places, spec, prompts, link, tolerance)
    work, copied, differing = sorted(places), 0, list[dict[str, Any]]()
    for done, (copies, differences) in enumerate(in_threads(merge, work, workers)):
        copied += copies
        differing += differences
        progress("merge", done + 1, len(work))

    # Delete what a killed merge has left in `out`.
    remove_leftovers(out, spec)
    for leftover in (
        path for stem in ("store", "prompts") for path in (out / "partial").glob(f"{stem}.*.tmp")
    ):
        leftover.unlink(missing_ok=True)
    info = store_info(out)
    return MergeReport(pairs=info["pairs"], shards=info["shards"], copied=copied, differing=differing)


def _shard_places(specs: Mapping[Path, StoreSpec], spec: StoreSpec) -> dict[int, list[Path]]:
    """Map each shard to the stores that have it with all rows of `spec`. Logs shards with fewer rows."""
    places: dict[int, list[Path]] = {}
    for folder, source_spec in specs.items():
        for shard in shards_present(folder, source_spec):
            if source_spec.rows(shard) == spec.rows(shard):
                places.setdefault(shard, []).append(folder)
            else:
                logger.info(
                    "%s: left out, because it has %d rows and %d in a store of %d pairs",
                    *(shard_path(folder, shard), len(source_spec.rows(shard)), len(spec.rows(shard))),
                    spec.num_pairs,
                )
    return places


def _merge_prompts(specs: Mapping[Path, StoreSpec], out: Path, spec: StoreSpec) -> PromptList | None:
    """Save the prompt list of `spec` in `out`, from the first store that has it, and return it."""
    merged = None
    for folder, source_spec in specs.items():
        prompts, reason = stored_prompts(folder, source_spec)
        if reason:
            raise _damaged_file(folder, prompts_path(folder), reason)
        if merged is None and source_spec.prompts_sha256 == spec.prompts_sha256:
            merged = prompts
    if merged is not None and not prompts_path(out).exists():
        merged.save(prompts_path(out))
    return merged


def _damaged_file(folder: Path, path: Path, reason: str) -> UserError:
    return UserError(f"{path}: {reason}; run `d2g pairs repair {folder}`, then merge again")


def _merge_shard(
    out: Path,
    places: Mapping[int, Sequence[Path]],
    spec: StoreSpec,
    prompts: PromptList | None,
    link: bool,
    tolerance: float,
    shard: int,
) -> tuple[int, list[dict[str, Any]]]:
    """Copy the best file of a shard to `out`, from one of the stores in `places[shard]`.

    Returns (1 if the shard was copied, 0 if `out` had it, comparisons of the best file with the others).
    """
    # Check every distinct file of the shard.
    checks: list[FileCheck] = []
    for path in (shard_path(folder, shard) for folder in (out, *places[shard])):
        if path.exists() and not any(_same_content(path, other.path) for other in checks):
            check = check_file(path, shard, spec, prompts)
            if check.reason:
                raise _damaged_file(path.parents[1], path, check.reason)
            checks.append(check)

    # Choose the best file, and compare the others with it in all common rows.
    best = min(checks, key=lambda check: len(check.quarantined))  # the first, if several are best
    differing = [
        _compare_files(best.path, other.path, spec, tolerance) for other in checks if other is not best
    ]

    # Copy it, with its quarantine record.
    source = best.path.parents[1]
    record, target = quarantine_path(out, shard), shard_path(out, shard)
    with writing(out, "the stores merged from are untouched, and what was merged stays"):
        # Write the record first: a shard never lacks rows without one.
        if best.quarantined:
            fault = record_fault(source, spec, shard, best.quarantined, prompts)
            if fault:
                raise _damaged_file(source, quarantine_path(source, shard), fault)
            if source != out:
                record.parent.mkdir(exist_ok=True)
                write_through_scratch(quarantine_path(source, shard).read_bytes(), record, out / "partial")
        if source != out:
            (_link if link else _copy)(best.path, target, out / "partial")
        if not best.quarantined:
            record.unlink(missing_ok=True)  # the shard lacks no rows any more
    return int(source != out), differing


def _same_content(a: Path, b: Path) -> bool:
    """Whether two paths are the same file, or have equal lengths and the same sha256 in their first bytes."""
    if a.samefile(b):
        return True
    with a.open("rb") as file_a, b.open("rb") as file_b:
        return a.stat().st_size == b.stat().st_size and file_a.read(USER_BLOCK_BYTES) == file_b.read(
            USER_BLOCK_BYTES
        )


def _compare_files(best: Path, other: Path, spec: StoreSpec, tolerance: float) -> dict[str, Any]:
    """Compare the common rows of two intact files of a shard. Raises UserError beyond `tolerance`."""
    rows, max_error, same_inputs = load_rows(best, spec), 0.0, True
    # A file may lack quarantined rows, so compare by pair index.
    position = {number: row for row, number in enumerate(rows.index.tolist())}
    for block in read_blocks(other, spec):
        in_other = [row for row, number in enumerate(block.index.tolist()) if number in position]
        in_best = [position[number] for number in block.index[in_other].tolist()]
        if in_other:
            same_inputs &= torch.equal(rows.noise[in_best], block.noise[in_other])
            same_inputs &= [rows.prompts[row] for row in in_best] == [block.prompts[row] for row in in_other]
            for ours, theirs in ((rows.latents, block.latents), (rows.condition, block.condition)):
                if ours is not None and theirs is not None:
                    difference = ours[in_best].float() - theirs[in_other].float()
                    max_error = max(max_error, float(difference.abs().max()))

    # Latents, also of the stage before, may differ by rounding between machines. Other noise or prompts come
    # from another job.
    if not same_inputs or max_error > tolerance:
        apart = f"latents up to {max_error:.3g} apart, tolerance {tolerance}"
        difference_text = apart if same_inputs else "other noise or prompts"
        raise UserError(
            f"{best} and {other} hold different rows for the same pairs ({difference_text}); merge only one "
            "of them" + (", or raise --tolerance" if same_inputs else "")
        )
    return {"shard": best.name, "kept": str(best), "left_out": str(other), "max_abs_err": max_error}


def _copy(source: Path, target: Path, scratch: Path) -> None:
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        with memoryview(mapped) as data:
            write_through_scratch(data, target, scratch)


def _link(source: Path, target: Path, scratch: Path) -> None:
    temporary = temporary_name(target, scratch)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), temporary)
    except OSError as error:
        text = f"cannot make a hard link of {source} in {scratch} ({error.strerror})"
        raise UserError(f"{text}; leave out --link to copy") from error
    temporary.replace(target)
    fsync_path(target.parent)
