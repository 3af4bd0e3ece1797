"""Reads captioned images, which serve as additional real samples for the discriminator.

A source is a folder of images with captions (in `metadata.jsonl` with keys file_name and caption, or in
NAME.txt beside NAME.jpg), a .parquet file with columns `image` (bytes) and `caption`, or a folder of these.
"""

import io
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from d2g.core.errors import UserError
from d2g.core.shuffle import permuted_batch

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTIONS = ("caption", "text", "prompt")
"""Accepted names of the caption field, in order of preference."""
BLOCK, WINDOW = 512, 8
"""Shuffle settings for parquet: neighboring rows stay close, because a row group is read as a unit."""


class RealImages:
    """Captioned images of a source, in an endless random order that depends only on (seed, images seen).

    The constructor raises UserError for a source without images or captions, and for missing files.
    Reading raises UserError for an unreadable image.
    """

    def __init__(self, source: str, size: tuple[int, int]) -> None:
        """size: (height, width) in pixels of the center crops, which are resized to it."""
        self.source, self.size = Path(source), size
        self._tables = _open_parquet_files(self.source)
        self._captions = [_caption_column(table, self.source) for table in self._tables]
        self._rows = [] if self._tables else _list_captioned_files(self.source)
        self._ends = np.cumsum([0, *(table.metadata.num_rows for table in self._tables)])
        if not len(self):
            raise UserError(f"{source} holds no images; expected captioned images, or .parquet")
        self._group = lru_cache(maxsize=16)(self._read_group)

    def __len__(self) -> int:
        return len(self._rows) or int(self._ends[-1])

    def batch(self, seed: int, start: int, count: int) -> tuple[Tensor, list[str]]:
        """Read `count` images from position `start` of the random order; returns the same as `read`."""
        block = (BLOCK, WINDOW) if self._tables else (0, 0)
        return self.read(permuted_batch(seed, len(self), start, count, *block))

    def read(self, numbers: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Read the images with these numbers: (pixels [B, 3, H, W] fp32 in [-1, 1], B captions)."""
        samples = [self._read_table_row(n) if self._tables else self._read_file(n) for n in numbers]
        pixels = [self._decode(data, name) for data, _, name in samples]
        return torch.stack(pixels), [caption for _, caption, _ in samples]

    def _read_file(self, number: int) -> tuple[bytes, str, str]:
        path, caption = self._rows[number]
        try:
            return path.read_bytes(), caption, str(path)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error.strerror}; restore it or drop its caption"
            ) from error

    def _read_table_row(self, number: int) -> tuple[bytes, str, str]:
        # Find the table, then the row group that holds this row.
        table = int(np.searchsorted(self._ends, number, side="right")) - 1
        row, group, meta = number - int(self._ends[table]), 0, self._tables[table].metadata
        while row >= meta.row_group(group).num_rows:
            row, group = row - meta.row_group(group).num_rows, group + 1
        images, captions = self._group(table, group)
        image = images[row].as_py()
        data = image["bytes"] if isinstance(image, dict) else image
        caption = captions[row].as_py()
        name = f"{self.source}, row {number}"
        if not data or not caption:
            raise UserError(f"{name} has no {'caption' if data else 'image bytes'}; drop the row")
        return data, caption, name

    def _read_group(self, table: int, group: int) -> tuple[Any, Any]:
        caption = self._captions[table]
        rows = self._tables[table].read_row_group(group, columns=["image", caption])
        return rows["image"], rows[caption]

    def _decode(self, data: bytes, name: str) -> Tensor:
        try:
            with Image.open(io.BytesIO(data)) as image:
                height, width = self.size
                fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{name} is no image that can be read ({error}); drop it") from error
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def _open_parquet_files(source: Path) -> list[Any]:
    files = [source] if source.suffix == ".parquet" else sorted(source.glob("*.parquet"))
    if not files:
        return []
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        return [pq.ParquetFile(file) for file in files]
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{source} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _caption_column(table: Any, source: Path) -> str:
    names = table.schema_arrow.names
    caption = next((name for name in CAPTIONS if name in names), None)
    if caption is None or "image" not in names:
        raise UserError(f"{source} has columns {', '.join(names)}; expected image and caption")
    return caption


def _list_captioned_files(folder: Path) -> list[tuple[Path, str]]:
    """List (file, caption) of a folder's images, sorted."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected captioned images, or .parquet")
    if (folder / "metadata.jsonl").is_file():
        return sorted(_read_metadata(folder))
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    return [(file, _read_caption_file(file)) for file in files]


def _read_caption_file(file: Path) -> str:
    """Read the caption of an image from the text file beside it."""
    text = file.with_suffix(".txt")
    if not text.is_file():
        raise UserError(f"{file} has no caption; write it to {text.name} beside it")
    if not (caption := _read_utf8(text).strip()):
        raise UserError(f"{text} is empty; write the caption of {file.name} to it")
    return caption


def _read_utf8(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: byte offset {error.start}; convert it") from error


def _read_metadata(folder: Path) -> list[tuple[Path, str]]:
    """Read (file, caption) from `metadata.jsonl`. Raises UserError for a bad line or a missing file."""
    rows, metadata = [], folder / "metadata.jsonl"
    # One JSON object per line.
    for number, line in enumerate(_read_utf8(metadata).splitlines(), start=1):
        try:
            row = json.loads(line)
            caption = next(row[name] for name in CAPTIONS if name in row)
            if not isinstance(caption, str) or not caption.strip():
                raise ValueError("no caption")
            rows.append((folder / row["file_name"], caption))
        except (ValueError, KeyError, StopIteration, TypeError) as error:
            raise UserError(
                f"{metadata}, line {number}: expected file_name and caption, got {line[:50]!r}"
            ) from error
    # List each folder once instead of testing every file.
    parents = {path.parent for path, _ in rows}
    listing = {parent: set(os.listdir(parent)) if parent.is_dir() else set() for parent in parents}
    if missing := [path for path, _ in rows if path.name not in listing[path.parent]]:
        raise UserError(
            f"{metadata} names {len(missing)} files that are not there, the first is {missing[0]}; "
            "restore them, or drop their lines"
        )
    return rows
