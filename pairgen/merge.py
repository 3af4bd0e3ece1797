"""Joining pair stores of one spec that were made apart."""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from d2g.core.atomic_files import fsync_path
from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from pairgen.prompts import PromptList
from pairgen.store.hdf5 import SEAL, load_rows, read_blocks
from pairgen.store.spec import (
    StoreSpec,
    create_store,
    prompts_path,
    quarantine_path,
    read_spec,
    require_same_spec,
    shard_path,
    shards_present,
    temporary_name,
    write_through_scratch,
    writing,
)
from pairgen.verify import FileCheck, check_file, in_threads, record_fault, store_info, stored_prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What `merge_stores` did. `pairs` and `shards` stand in the merged store now."""

    pairs: int
    shards: int
    copied: int  # shards brought there by this call
    differing: list[dict[str, Any]]
    """Shards that were made twice with other rounding: {"shard", "kept", "left_out", "max_abs_err"}."""


def merge_stores(
    folders: Sequence[Path],
    out: Path,
    progress: Progress = quiet,
    *,
    link: bool = False,
    tolerance: float = 0.02,
    workers: int = 0,
) -> MergeReport:
    """Bring the whole shards of stores of one spec into `out`, with prompts and quarantine records.

    Every shard is checked on its way, as `verify_store` does. Of a shard that stands in several places, the
    first with the fewest quarantined rows is kept, counting `out` first; the rows that it shares with the
    others must have equal noise and prompts, and latents no further apart than `tolerance`. Crash-safe:
    run again to resume. `link`: hard links, no copies. Raises UserError for differing specs (naming the
    keys), clashes (naming both files) and damage.
    """
    if not folders:
        raise UserError("nothing to merge: got no pair folders, expected at least one")
    out, sources = Path(out), [Path(folder) for folder in folders]
    spec = read_spec(sources[0])
    for folder in sources:
        require_same_spec(folder, read_spec(folder), spec)
    create_store(out, spec)
    prompts = _merge_prompts([out, *sources], out, spec)
    work = sorted({shard for folder in sources for shard in shards_present(folder, spec)})
    merge = partial(_merge_shard, [out, *sources], spec, prompts, link, tolerance)
    copied, differing = 0, []
    for done, (new, others) in enumerate(in_threads(merge, work, workers)):
        copied += new
        differing += others
        progress("merge", done + 1, len(work))
    there = store_info(out)
    return MergeReport(pairs=there["pairs"], shards=there["shards"], copied=copied, differing=differing)


def _merge_prompts(folders: Sequence[Path], out: Path, spec: StoreSpec) -> PromptList | None:
    kept = None
    for folder in folders:
        prompts, reason = stored_prompts(folder, spec)
        if reason:
            raise _not_sound(folder, prompts_path(folder), reason)
        kept = prompts if kept is None else kept
    if kept is not None and not prompts_path(out).exists():
        kept.save(prompts_path(out))
    return kept


def _not_sound(folder: Path, path: Path, reason: str) -> UserError:
    return UserError(f"{path}: {reason}; run `d2g pairs repair {folder}`, then merge again")


def _merge_shard(
    folders: Sequence[Path],
    spec: StoreSpec,
    prompts: PromptList | None,
    link: bool,
    tolerance: float,
    shard: int,
) -> tuple[int, list[dict[str, Any]]]:
    """Bring the best of the stores' files of a shard into the first of `folders`. Returns 1 if it was not
    there, and what `_compared` says of files that differ from it."""
    found: list[FileCheck] = []
    for path in (shard_path(folder, shard) for folder in folders):
        if path.exists() and not any(_same(path, other.path) for other in found):
            finding = check_file(path, shard, spec, prompts)
            if finding.reason:
                raise _not_sound(path.parents[1], path, finding.reason)
            found.append(finding)
    kept = min(found, key=lambda finding: len(finding.quarantined))  # the first of equals
    differing = [_compared(kept.path, other.path, spec, tolerance) for other in found if other is not kept]
    out, source = folders[0], kept.path.parents[1]
    record, target = quarantine_path(out, shard), shard_path(out, shard)
    with writing(out, "the stores merged from are untouched, and what was merged stays"):
        # A shard that lacks rows never stands without their record.
        if kept.quarantined:
            fault = record_fault(source, spec, shard, kept.quarantined, prompts)
            if fault:
                raise _not_sound(source, quarantine_path(source, shard), fault)
            if source != out:
                record.parent.mkdir(exist_ok=True)
                write_through_scratch(quarantine_path(source, shard).read_bytes(), record, out / "partial")
        if source != out:
            (_link if link else _copy)(kept.path, target, out / "partial")
        if not kept.quarantined:
            record.unlink(missing_ok=True)  # its rows are there now
    return int(source != out), differing


def _same(a: Path, b: Path) -> bool:
    """Whether two files are one, or hold the same bytes by length and by the sha256 in their first bytes."""
    if a.samefile(b):
        return True
    with a.open("rb") as first, b.open("rb") as second:
        return a.stat().st_size == b.stat().st_size and first.read(SEAL) == second.read(SEAL)


def _compared(kept: Path, other: Path, spec: StoreSpec, tolerance: float) -> dict[str, Any]:
    """How far apart the common rows of two sound files of a shard are. UserError beyond `tolerance`."""
    rows, worst, same = load_rows(kept, spec), 0.0, True
    position = {number: row for row, number in enumerate(rows.index.tolist())}
    for block in read_blocks(other, spec):
        there = [row for row, number in enumerate(block.index.tolist()) if number in position]
        here = [position[number] for number in block.index[there].tolist()]
        if there:
            same &= torch.equal(rows.noise[here], block.noise[there])
            same &= [rows.prompts[row] for row in here] == [block.prompts[row] for row in there]
            apart = rows.latents[here].float() - block.latents[there].float()
            worst = max(worst, float(apart.abs().max()))
    if not same or worst > tolerance:
        what = f"latents up to {worst:.3g} apart, tolerance {tolerance}" if same else "other noise or prompts"
        raise UserError(
            f"{kept} and {other} hold different rows for the same pairs ({what}); merge only one of them"
            + (", or raise --tolerance" if same else "")
        )
    return {"shard": kept.name, "kept": str(kept), "left_out": str(other), "max_abs_err": worst}


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
