"""Rows on disk that are costly to compute: shards that are whole or absent, on which ranks share the work.

FOLDER/NAME.json (what they are)  FOLDER/NAME-00000.1f0c….npy (rows, sha256 of the file in its name)
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
from d2g.core.progress import Progress, quiet

ROWS_PER_SHARD = 1024
"""Rows of a shard."""
HASH_DIGITS = 16
"""Of the sha256 in a shard's name."""
MAX_OPEN_SHARDS = 64
"""Shards mapped at a time: each holds a file open, and ImageNet has thousands."""


class CachedRows:
    """[N, …] rows, mapped from disk: only what is asked for is read."""

    def __init__(self, files: Sequence[Path], count: int) -> None:
        self.files, self.count = files, count
        self._map = lru_cache(MAX_OPEN_SHARDS)(lambda shard: np.load(files[shard], mmap_mode="r"))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """The rows asked for, in fp32."""
        picked = [self._map(row // ROWS_PER_SHARD)[row % ROWS_PER_SHARD] for row in rows]
        return torch.from_numpy(np.stack(picked)).float()


def cached_rows(
    folder: Path,
    name: str,
    count: int,
    facts: Mapping[str, Any],
    make: Callable[[range], Tensor],
    progress: Progress = quiet,
    dtype: torch.dtype = torch.float16,
    late: Callable[[], bool] = lambda: False,
) -> CachedRows:
    """`count` rows that `make(range of rows)` gives, computed where they are not on disk yet.

    facts: what decides the rows. Every rank calls it and gets all rows. Raises UserError for a folder that
    holds rows of other facts, naming what differs, and for damaged shards; Interrupted when `late` between
    two shards.
    """
    _claim(folder / f"{name}.json", {"rows": count, "dtype": str(dtype), **facts})
    ranges = [range(start, min(start + ROWS_PER_SHARD, count)) for start in range(0, count, ROWS_PER_SHARD)]
    found = _shards(folder, name)
    todo = [i for i in range(len(ranges)) if i not in found]
    process_group.barrier()  # all have looked before anybody writes
    rows_left = sum(len(ranges[shard]) for shard in todo)
    for start in range(0, len(todo), process_group.world_size()):
        # Ranks meet after each shard: none waits for so long that the process group gives up.
        for shard in todo[start : start + process_group.world_size()][
            process_group.rank() :: process_group.world_size()
        ]:
            rows = make(ranges[shard]).to(dtype).cpu().numpy()
            assert len(rows) == len(ranges[shard]), f"{len(rows)} rows for {len(ranges[shard])}"
            _write(folder, name, shard, rows)
        made = min((start + process_group.world_size()) * ROWS_PER_SHARD, rows_left)
        progress(f"making {name}", made, rows_left)
        if process_group.any_rank(late()) and made < rows_left:
            raise Interrupted(
                f"time is over; safe on disk: {count - rows_left + made} of {count} rows of {name} in "
                f"{folder}; run the same command again to go on"
            )
    process_group.barrier()
    found = _shards(folder, name)
    with ThreadPoolExecutor() as pool:
        checked = pool.map(lambda i: _checked(folder, name, i, found.get(i)), range(len(ranges)))
        return CachedRows(list(checked), count)


def _claim(file: Path, facts: Mapping[str, Any]) -> None:
    facts = json.loads(json.dumps(facts))
    try:
        old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); delete {file.parent} and run again") from error
    if old is not None and (keys := differing(old, facts)):
        raise UserError(
            f"{file.parent} holds rows made in another way: {', '.join(keys)}; "
            "name another folder, or delete it"
        )
    process_group.barrier()
    if old is None and process_group.rank() == 0:
        write_atomically(file, json.dumps(facts, indent=1))


def _shards(folder: Path, name: str) -> dict[int, Path]:
    """The shards that are there, by number."""
    form = re.compile(re.escape(name) + r"-(\d{5,})\.[0-9a-f]+\.npy")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {int(match[1]): file for file in files if (match := form.fullmatch(file.name))}


def _write(folder: Path, name: str, shard: int, rows: np.ndarray[Any, Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    data = buffer.getvalue()
    target = folder / f"{name}-{shard:05d}.{hashlib.sha256(data).hexdigest()[:HASH_DIGITS]}.npy"
    write_atomically(target, data)


def _checked(folder: Path, name: str, shard: int, path: Path | None) -> Path:
    """The shard's file, whose bytes are those that were written."""
    if path is None:
        raise UserError(f"{folder}: shard {shard} of {name} is gone; run again")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest[:HASH_DIGITS] != path.name.split(".")[-2]:
        raise UserError(f"{path} is damaged (its sha256 is not the one in its name); delete it and run again")
    return path
