"""Rows on disk that are costly to compute: shards that are whole or absent, on which ranks share the work.

FOLDER/NAME.json (what they are)  FOLDER/NAME-00000.1f0c….npy (rows, sha256 of the file in its name)
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core import dist
from core.checkpoint import write_atomically
from core.config import differing
from core.errors import UserError
from core.progress import Progress, quiet

SHARD = 1024
"""Rows of a shard."""
DIGITS = 16
"""Of the sha256 in a shard's name."""


class Rows:
    """[N, …] rows, mapped from disk: only what is asked for is read."""

    def __init__(self, parts: Sequence[np.ndarray[Any, Any]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """The rows asked for, in fp32."""
        picked = [self.parts[row // SHARD][row % SHARD] for row in rows]
        return torch.from_numpy(np.stack(picked)).float()


def cached(
    folder: Path,
    name: str,
    count: int,
    facts: Mapping[str, Any],
    make: Callable[[range], Tensor],
    progress: Progress = quiet,
    dtype: torch.dtype = torch.float16,
) -> Rows:
    """`count` rows that `make(range of rows)` gives, computed where they are not on disk yet.

    facts: what decides the rows. Every rank calls it and gets all rows. Raises UserError for a folder that
    holds rows of other facts, naming what differs, and for damaged shards.
    """
    _claim(folder / f"{name}.json", {"rows": count, "dtype": str(dtype), **facts})
    ranges = [range(start, min(start + SHARD, count)) for start in range(0, count, SHARD)]
    todo = [i for i in range(len(ranges)) if not _find(folder, name, i)]
    dist.barrier()  # all have looked before anybody writes
    rows_left = sum(len(ranges[shard]) for shard in todo)
    for done, shard in enumerate(todo[dist.rank() :: dist.world_size()]):
        rows = make(ranges[shard]).to(dtype).cpu().numpy()
        assert len(rows) == len(ranges[shard]), f"{len(rows)} rows for {len(ranges[shard])}"
        _write(folder, name, shard, rows)
        progress(f"making {name}", min((done + 1) * dist.world_size() * SHARD, rows_left), rows_left)
    dist.barrier()
    with ThreadPoolExecutor() as pool:
        return Rows(list(pool.map(lambda i: _open(folder, name, i, len(ranges[i])), range(len(ranges)))))


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
    dist.barrier()
    if old is None and dist.rank() == 0:
        write_atomically(file, json.dumps(facts, indent=1))


def _find(folder: Path, name: str, shard: int) -> Path | None:
    return next(iter(sorted(folder.glob(f"{name}-{shard:05d}.*.npy"))), None)


def _write(folder: Path, name: str, shard: int, rows: np.ndarray[Any, Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    data = buffer.getvalue()
    target = folder / f"{name}-{shard:05d}.{hashlib.sha256(data).hexdigest()[:DIGITS]}.npy"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {target}: {error.strerror}; free space, then run again") from error


def _open(folder: Path, name: str, shard: int, count: int) -> np.ndarray[Any, Any]:
    path = _find(folder, name, shard)
    if path is None:
        raise UserError(f"{folder}: shard {shard} of {name} is gone; run again")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest[:DIGITS] != path.name.split(".")[-2]:
        raise UserError(f"{path} is damaged (its sha256 is not the one in its name); delete it and run again")
    rows: np.ndarray[Any, Any] = np.load(path, mmap_mode="r")
    assert len(rows) == count, f"{path} holds {len(rows)} rows, expected {count}"
    return rows
