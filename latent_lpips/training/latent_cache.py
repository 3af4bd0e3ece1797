"""A disk cache of rows that are expensive to compute, in shards that ranks compute in parallel.

FOLDER/NAME.json describes the rows. FOLDER/NAME-00000.1f0c….npy is a shard with its sha256 in its name; it is
either complete or absent.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.config import differing
from d2g.core.distributed import process_group
from d2g.core.errors import Interrupted, UserError
from d2g.core.json_files import read_json_object
from d2g.core.progress import Progress, quiet
from d2g.vision.weights import file_sha256

ROWS_PER_SHARD = 1024
"""Rows per shard."""
HASH_DIGITS = 16
"""Hexadecimal digits of the sha256 in a shard's name."""
MAX_OPEN_SHARDS = 64
"""Shards that are mapped at a time: each keeps a file open, and ImageNet has thousands."""


class CachedRows:
    """Rows [N, …] that are memory-mapped: only the requested rows are read."""

    def __init__(self, files: Sequence[Path], count: int) -> None:
        self.files, self.count = files, count
        self._map = lru_cache(MAX_OPEN_SHARDS)(lambda shard: np.load(files[shard], mmap_mode="r"))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """Return the requested rows in fp32."""
        selected = [self._map(row // ROWS_PER_SHARD)[row % ROWS_PER_SHARD] for row in rows]
        return torch.from_numpy(np.stack(selected)).float()


def cached_rows(
    folder: Path,
    name: str,
    count: int,
    facts: Mapping[str, Any],
    compute: Callable[[range], Tensor],
    progress: Progress = quiet,
    dtype: torch.dtype = torch.float16,
    time_over: Callable[[], bool] = lambda: False,
) -> CachedRows:
    """Return `count` rows computed by `compute(range of rows)`; rows that are on disk are not computed again.

    `facts` is everything the rows depend on. Every rank calls this function and gets all rows. Raises
    UserError for a folder with rows of other facts, naming the differences, and for damaged shards, and
    Interrupted if `time_over()` is true between two shards.
    """
    # Find the shards that are missing.
    _check_facts(folder / f"{name}.json", {"rows": count, "dtype": str(dtype), **facts})
    ranges = [range(start, min(start + ROWS_PER_SHARD, count)) for start in range(0, count, ROWS_PER_SHARD)]
    shards = _list_shards(folder, name)
    missing = [i for i in range(len(ranges)) if i not in shards]
    process_group.barrier()  # every rank lists the shards before any rank writes
    rows_left = sum(len(ranges[shard]) for shard in missing)
    for start in range(0, len(missing), process_group.world_size()):
        # Ranks synchronize after each shard, so that no collective times out.
        for shard in missing[start : start + process_group.world_size()][
            process_group.rank() :: process_group.world_size()
        ]:
            rows = compute(ranges[shard]).to(dtype).cpu().numpy()
            assert len(rows) == len(ranges[shard]), f"{len(rows)} rows for {len(ranges[shard])}"
            _write_shard(folder, name, shard, rows)
        done = min((start + process_group.world_size()) * ROWS_PER_SHARD, rows_left)
        progress(f"computing {name}", done, rows_left)
        if process_group.any_rank(time_over()) and done < rows_left:
            raise Interrupted(
                f"time is over; safe on disk: {count - rows_left + done} of {count} rows of {name} in "
                f"{folder}; run the same command again to go on"
            )
    # Check every shard that was computed by any rank.
    process_group.barrier()
    shards = _list_shards(folder, name)
    with ThreadPoolExecutor() as pool:
        paths = pool.map(lambda i: _verify_shard(folder, name, i, shards.get(i)), range(len(ranges)))
        return CachedRows(list(paths), count)


def _check_facts(file: Path, facts: Mapping[str, Any]) -> None:
    facts = json.loads(json.dumps(facts))
    old = read_json_object(file, f"delete {file.parent} and run again") if file.is_file() else None
    if old is not None and (keys := differing(old, facts)):
        raise UserError(
            f"{file.parent} holds rows computed from other inputs: {', '.join(keys)}; "
            "give another folder, or delete it"
        )
    process_group.barrier()
    if old is None and process_group.rank() == 0:
        write_atomically(file, json.dumps(facts, indent=1))


def _list_shards(folder: Path, name: str) -> dict[int, Path]:
    """Return the shards on disk by number."""
    pattern = re.compile(re.escape(name) + r"-(\d{5,})\.[0-9a-f]+\.npy")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {int(match[1]): file for file in files if (match := pattern.fullmatch(file.name))}


def _write_shard(folder: Path, name: str, shard: int, rows: np.ndarray[Any, Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    data = buffer.getvalue()
    target = folder / f"{name}-{shard:05d}.{hashlib.sha256(data).hexdigest()[:HASH_DIGITS]}.npy"
    write_atomically(target, data)


def _verify_shard(folder: Path, name: str, shard: int, path: Path | None) -> Path:
    """Return the shard's file after checking its sha256."""
    if path is None:
        raise UserError(f"{folder}: shard {shard} of {name} is missing; run again")
    if file_sha256(path)[:HASH_DIGITS] != path.name.split(".")[-2]:
        raise UserError(f"{path} is damaged (its sha256 is not the one in its name); delete it and run again")
    return path
