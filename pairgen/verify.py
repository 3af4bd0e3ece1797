"""Checking and describing pair stores."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from d2g.core.environment import usable_cores
from d2g.core.errors import UserError
from d2g.core.logs import logger
from d2g.core.machine_errors import raise_machine_error
from d2g.core.progress import Progress, quiet
from pairgen.prompts import PromptList, prompt_list_sha256
from pairgen.store.hdf5 import (
    DamagedShard,
    IntArray,
    PairBatch,
    quarantined_in,
    read_blocks,
    redraw_noise,
    row_count,
)
from pairgen.store.reader import PairReader
from pairgen.store.remote import RemoteShards, is_url
from pairgen.store.spec import (
    StoreSpec,
    local_folder,
    prompts_path,
    quarantine_path,
    quarantined_rows,
    read_record,
    read_spec,
    records_present,
    shard_path,
    shards_present,
)

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """Result of `verify_store`. `ok`: every pair of the spec is present once, and no byte has changed."""

    ok: bool
    checked: int  # pairs in intact shards
    bad_shards: list[dict[str, str]]  # {"shard": path inside the folder, "reason": one line}, other files too
    missing: list[str]  # shards that were not generated yet or are lost
    duplicates: list[int]  # indices of pairs that occur in more than one row
    quarantined: list[int]  # pairs that intact shards lack because their latents were not finite
    prompts_checked: bool  # whether the store has a prompt list to compare each row with


@dataclass(frozen=True, kw_only=True, slots=True)
class FileCheck:
    """Result of checking one file of rows. `reason`: what is wrong with it, "" if nothing."""

    path: Path
    reason: str
    index: IntArray  # pair indices [rows], as far as they could be read
    quarantined: list[int]


def verify_store(folder: Path, progress: Progress = quiet, workers: int = 0) -> VerifyReport:
    """Read every byte of every shard and partial file and check it.

    Checks hashes, headers, finite values and indices; compares noise with (seed, index), prompts with the
    store's list, quarantined rows with their records. Runs `workers` threads (0: `default_workers`) that hold
    16 MiB of latents each. Damage is reported, not raised; raises UserError for an unreadable store.json.
    """
    folder, spec = Path(folder), read_spec(folder)
    # Check every shard, every other file in shards/, and the partial files.
    prompts, reason = stored_prompts(folder, spec)
    bad = [{"shard": prompts_path(folder).name, "reason": reason}] if reason else []
    shards = {shard_path(folder, shard): shard for shard in range(spec.num_shards)}
    parts = [path for path in (folder / "partial").glob("pairs-*.rows-*.h5") if _PART.fullmatch(path.name)]
    files = sorted([*(folder / "shards").glob("*"), *parts])
    checks = in_threads(
        partial(_check_file_or_part, shards=shards, spec=spec, prompts=prompts), files, workers
    )
    # Sort the results: quarantined pairs of intact shards, indices of damaged ones.
    intact, damaged_index = {}, []
    for done, check in enumerate(checks):
        if check is not None and check.reason:
            bad.append({"shard": str(check.path.relative_to(folder)), "reason": check.reason})
        if check is not None and check.path.parent.name == "shards":
            if check.reason:
                damaged_index.append(check.index)
            else:
                intact[shards[check.path]] = check.quarantined
        progress("verify", done + 1, len(files))
    # Checks that need all files: records, missing shards, pairs that occur twice.
    bad += _bad_records(folder, spec, intact, prompts)
    missing = [str(path.relative_to(folder)) for path in sorted(set(shards) - set(files))]
    duplicates = _duplicates(spec, intact, damaged_index)
    quarantined = [pair for shard in sorted(intact) for pair in intact[shard]]
    return VerifyReport(
        ok=not (bad or missing or duplicates or quarantined),
        checked=sum(len(spec.rows(shard)) for shard in intact) - len(quarantined),
        bad_shards=bad,
        missing=missing,
        duplicates=duplicates,
        quarantined=quarantined,
        prompts_checked=prompts is not None,
    )


def in_threads(call: Callable[[S], T], items: Iterable[S], workers: int = 0) -> Iterator[T]:
    """Yield `call(item)` in the order of items, computed by `workers` threads (0: `default_workers`).

    Threads suffice: hashing, drawing noise and reading release the GIL.
    """
    workers = workers or default_workers()
    # A bounded queue: items are read as results are taken, so memory stays constant.
    calls: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                calls.append(pool.submit(call, item))
                if len(calls) > 2 * workers:
                    yield calls.popleft().result()
            while calls:
                yield calls.popleft().result()
        finally:
            # After an error, calls that have not started are dropped.
            for waiting in calls:
                waiting.cancel()


def default_workers() -> int:
    """The CPU cores of this process, at most 8: disks are slower than more threads."""
    return min(8, usable_cores())


def stored_prompts(folder: Path, spec: StoreSpec) -> tuple[PromptList | None, str]:
    """The store's prompt list (None if missing or damaged), and what is wrong with it ("" if nothing)."""
    if not prompts_path(folder).exists():
        return None, ""
    try:
        prompts = PromptList.open(prompts_path(folder))
    except UserError as error:
        raise_machine_error(error, memory=False)
        return None, str(error)
    if len(prompts) != spec.num_prompts or prompt_list_sha256(prompts) != spec.prompts_sha256:
        return None, "not the prompts that store.json names (prompts_sha256 differs)"
    return prompts, ""


# A file of rows.

_PART = re.compile(r"pairs-(\d{5,})\.rows-\d+\.h5")


def _check_file_or_part(
    path: Path, shards: dict[Path, int], spec: StoreSpec, prompts: PromptList | None
) -> FileCheck | None:
    """Check one file; None for a partial file that its writer has merged into its shard meanwhile."""
    if part := _PART.fullmatch(path.name):
        check = check_file(path, int(part[1]), spec, prompts, complete=False)
        return check if path.exists() else None
    return check_file(path, shards.get(path), spec, prompts)


def check_file(
    path: Path, shard: int | None, spec: StoreSpec, prompts: PromptList | None, complete: bool = True
) -> FileCheck:
    """Check every byte and every row of a file of shard number `shard` (None: the name belongs to no shard).

    `complete`: the file must hold all rows of its shard except quarantined ones; a partial file holds some.
    """
    # Read every block, and remember the first fault.
    reason, index, quarantined = "", [np.empty(0, np.int64)], list[int]()
    try:
        for block in read_blocks(path, spec):
            index.append(block.index.numpy())
            reason = reason or _wrong_rows(block, spec, prompts)
        quarantined = quarantined_in(path)
    except UserError as error:
        raise_machine_error(error, memory=False)
        reason = error.reason if isinstance(error, DamagedShard) else str(error)
    # A damaged file's index is returned too: `verify_store` looks for duplicates in it.
    pairs = np.concatenate(index)
    if shard is None:
        reason = "not a shard of this store; move it away"
    reason = reason or _wrong_index(pairs, quarantined, spec.rows(shard or 0), complete)
    return FileCheck(path=path, reason=reason, index=pairs, quarantined=quarantined)


def _wrong_rows(block: PairBatch, spec: StoreSpec, prompts: PromptList | None) -> str:
    """The first row whose noise or prompt is wrong, in words; "" if none."""
    numbers = block.index.tolist()
    if spec.noise == "stored":
        differs = (block.noise != redraw_noise(spec, numbers)).flatten(1).any(dim=1)
        if differs.any():
            return f"noise of pair {numbers[int(differs.nonzero()[0])]} is not that of (seed, index)"
    if prompts is not None:
        for number, prompt in zip(numbers, block.prompts, strict=True):
            if prompt != (expected := prompts[spec.prompt_of(number)]):
                return f"pair {number} has prompt {prompt[:40]!r}, the store's list has {expected[:40]!r}"
    return ""


def _wrong_index(index: IntArray, quarantined: Sequence[int], rows: range, complete: bool) -> str:
    if complete and np.array_equal(np.sort(np.concatenate([index, np.array(quarantined, np.int64)])), rows):
        return "" if (np.diff(index) > 0).all() else "its pairs are not in order"
    if not complete and len(index) and set(index.tolist()) <= set(rows) and (np.diff(index) > 0).all():
        return ""
    present = f"{index.min()} to {index.max()} ({len(index)} rows)" if len(index) else "no rows"
    without = f" and quarantines {len(quarantined)}" if quarantined else ""
    return f"holds pairs {present}{without}, its name says {rows.start} to {rows.stop - 1}"


def _duplicates(
    spec: StoreSpec, intact: dict[int, list[int]], damaged_index: Sequence[IntArray]
) -> list[int]:
    """Pairs that occur twice in damaged files, or in a damaged file and in an intact shard.

    intact: shard -> its quarantined pairs; it contains each of its other pairs once. damaged_index: the pair
    indices of each damaged file.
    """
    # Every repeated pair occurs in a damaged file at least once, so their indices are enough.
    values, counts = np.unique(np.concatenate([np.empty(0, np.int64), *damaged_index]), return_counts=True)
    owners = (values // spec.shard_size).tolist()
    again = [
        count > 1 or (owner in intact and value not in intact[owner])
        for value, count, owner in zip(values.tolist(), counts.tolist(), owners, strict=True)
    ]
    return [int(value) for value in values[np.array(again, bool)]]


# Quarantine records.


def _bad_records(
    folder: Path, spec: StoreSpec, intact: dict[int, list[int]], prompts: PromptList | None
) -> list[dict[str, str]]:
    """Records that are damaged, or that differ from the header of their shard.

    intact: shard -> the quarantined pairs in its header, for intact shards.
    """
    present = records_present(folder)
    reasons = {shard: record_fault(folder, spec, shard, intact.get(shard), prompts) for shard in present}
    for shard in sorted(set(intact) - set(present)):
        if intact[shard]:
            reasons[shard] = f"is missing; its shard quarantines {len(intact[shard])} pairs"
    names = {shard: str(quarantine_path(folder, shard).relative_to(folder)) for shard in reasons}
    return [{"shard": names[shard], "reason": reasons[shard]} for shard in sorted(reasons) if reasons[shard]]


def record_fault(
    folder: Path, spec: StoreSpec, shard: int, quarantined: Sequence[int] | None, prompts: PromptList | None
) -> str:
    """Check a shard's quarantine record: describe what is wrong with it, or return "".

    quarantined: the quarantined pairs in the shard's header; None if the shard is not present.
    """
    # The record must be intact, agree with its shard's header, and name pairs of that shard.
    try:
        rows = read_record(folder, shard)
        pairs = [int(row["index"]) for row in rows]
        texts = [str(row["prompt"]) for row in rows]
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise_machine_error(error, memory=False)
        return str(error) if isinstance(error, UserError) else f"is damaged ({error!r})"
    if quarantined is not None and pairs != list(quarantined):
        return f"names pairs {_few(pairs)}, its shard quarantines {_few(quarantined)}"
    if shard >= spec.num_shards or not set(pairs) <= set(spec.rows(shard)):
        return f"names pairs {_few(pairs)}, which its shard does not hold"
    if prompts is not None and texts != [prompts[spec.prompt_of(pair)] for pair in pairs]:
        return "has other prompts than the store's list"
    return ""


def _few(pairs: Sequence[int]) -> str:
    return (", ".join(map(str, pairs[:5])) or "none") + (" ..." if len(pairs) > 5 else "")


# Describing.


def store_info(folder: Path | str) -> dict[str, Any]:
    """Describe a store in a folder or at a URL (no shard is downloaded).

    Keys: `pairs` and `shards` present, `complete` (every pair is present or quarantined), number of
    `quarantined` rows, `unfinished_pairs` (in partial files of shards that are not present, which no reader
    sees; None at a URL with such files), size in `gib`, `prompts_held` (whether the store has its prompt
    list), and its `spec`. Logs partial files that are damaged.
    """
    if is_url(folder):
        return _remote_info(str(folder))
    folder = local_folder(folder)
    spec = read_spec(folder)
    shards = shards_present(folder, spec)
    # Shards lack their quarantined rows.
    records = quarantined_rows(folder, spec)
    quarantined = sum(len(records.get(shard, [])) for shard in shards)
    pairs = sum(len(spec.rows(shard)) for shard in shards) - quarantined
    size = sum(shard_path(folder, shard).stat().st_size for shard in shards)
    return {
        "pairs": pairs,
        "shards": len(shards),
        "complete": pairs + quarantined == spec.num_pairs,
        "quarantined": quarantined,
        "unfinished_pairs": _unfinished_pairs(folder, shards),
        "gib": size / 2**30,
        "prompts_held": prompts_path(folder).exists(),
        "spec": spec.as_json(),
    }


def _unfinished_pairs(folder: Path, shards: Sequence[int]) -> int:
    """Pairs in the partial files of a folder, without those of `shards`, which are present."""
    pairs = 0
    for path in _parts_without(shards, (folder / "partial").glob("pairs-*.rows-*.h5")):
        try:
            pairs += row_count(path)
        except DamagedShard as error:
            # A writer may have merged the file into its shard meanwhile.
            if path.exists():
                logger.warning("%s", error)
    return pairs


def _parts_without(shards: Sequence[int], paths: Iterable[Path]) -> list[Path]:
    """The partial files among `paths`, without those of `shards`."""
    present, matches = set(shards), ((path, _PART.fullmatch(path.name)) for path in sorted(paths))
    return [path for path, match in matches if match and int(match[1]) not in present]


def _remote_info(url: str) -> dict[str, Any]:
    reader, remote = PairReader(url), RemoteShards(url)
    return {
        "pairs": len(reader),
        "shards": reader.shards,
        "complete": reader.complete,
        "quarantined": len(reader.quarantined),
        # Only the files themselves tell how many rows they hold.
        "unfinished_pairs": None if _parts_without(remote.shards, remote.parts()) else 0,
        "gib": reader.gib,
        "prompts_held": remote.holds(prompts_path(Path()).name),
        "spec": reader.spec.as_json(),
    }
