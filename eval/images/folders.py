"""Read images and their captions from a folder or from image-parquet files, in parallel and in order."""

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2g.core.errors import UserError
from eval.images.decode import Decoded, decode_image
from eval.images.resize import NATIVE, Pixels

Batch = tuple[Tensor, list[str]]
"""uint8 images [B, 3, H, W] and their B captions ("" where there is none)."""


IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
CAPTION_KEYS = ("caption", "text", "prompt")
IMAGE_KEYS = ("image", "img")  # Hugging Face's image-parquet; its CIFAR10 says img


@dataclass(kw_only=True)
class Reading:
    """What was learnt while images were read: how many were not 8-bit RGB, and each file's sha256."""

    converted: Counter[str] = field(default_factory=Counter)
    digests: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFiles:
    """Picture files in order, or parquet files; one of them is empty. `captions`: file -> caption."""

    name: str
    pictures: Sequence[Path] = ()
    tables: Sequence[Path] = ()
    captions: Mapping[Path, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many images there are. Opens parquet files' footers, and no picture."""
        return len(self.pictures) or sum(_parquet_file(file).metadata.num_rows for file in self.tables)

    def listing(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of change of each file: with other files, another listing."""
        facts = [(file, file.stat()) for file in (*self.pictures, *self.tables)]
        return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in facts]


def open_images(source: str | Path) -> ImageFiles:
    """List a folder, with its metadata.jsonl, or a .parquet file. Raises UserError where no image is."""
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; expected a folder of images or a .parquet file")
    if source.is_file() and source.suffix != ".parquet":
        raise UserError(f"{source} is neither a folder of images nor a .parquet file; give one of these")
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    tables = [file for file in files if file.suffix == ".parquet"]
    if pictures:
        captions = {source / name: text for name, text in _metadata(source / "metadata.jsonl").items()}
        return ImageFiles(name=str(source), pictures=pictures, captions=captions)
    if tables:
        return ImageFiles(name=str(source), tables=tables)
    raise UserError(
        f"{source} holds no images; expected {', '.join(sorted(IMAGE_SUFFIXES))} or .parquet files"
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture, not yet decoded. `name`: for messages; `caption`: None where the file may hold one."""

    name: str
    read: Callable[[], bytes]
    caption: str | None


def read_images(
    source: str | Path | ImageFiles,
    *,
    limit: int | None = None,
    start: int = 0,
    resize: str = NATIVE,
    batch_size: int = 64,
    workers: int = 0,
    reading: Reading | None = None,
) -> Iterator[Batch]:
    """Batches of the images of a folder (with or without metadata.jsonl) or of .parquet files, in sorted
    order, from image `start` on, at most `limit`.

    Captions come from metadata.jsonl (`file_name` and `caption`, `text` or `prompt`), else from a PNG's own
    `prompt` text; in parquet from such a column. `resize` as in `eval.images.resize`; "native" wants images of one
    size. `workers` threads decode ahead (0: two more than cores): Pillow lets go of Python's lock, and the
    order stays. Raises UserError for a missing or empty source, an image that cannot be taken, mixed sizes.
    """
    images: list[Pixels] = []
    captions: list[str] = []
    first_size: tuple[int, ...] | None = None
    reading = reading or Reading()
    workers = workers or len(os.sched_getaffinity(0)) + 2
    files = source if isinstance(source, ImageFiles) else open_images(source)
    entries = _entries(files, start, start + limit if limit is not None else None)
    for entry, decoded in _ahead(
        entries, lambda entry: decode_image(entry.read, entry.name, resize), workers, batch_size
    ):
        images.append(decoded.image)
        captions.append(decoded.caption if entry.caption is None else entry.caption)
        reading.converted.update(decoded.converted)
        reading.digests.append(decoded.sha256)
        size = (decoded.image.shape[2], decoded.image.shape[1])
        first_size = first_size or size
        if size != first_size:
            raise UserError(
                f"{entry.name} has {size} pixels, the images before it {first_size}; "
                "make them one size or choose a protocol that resizes"
            )
        if len(images) == batch_size:
            yield torch.from_numpy(np.stack(images)), captions
            images, captions = [], []
    if images:
        yield torch.from_numpy(np.stack(images)), captions


def read_image(file: Path) -> Tensor:
    """One image file -> uint8 [3, H, W]. Raises UserError where it is missing or unreadable."""
    if not file.is_file():
        raise UserError(f"{file}: no such image file")
    return torch.from_numpy(decode_image(file.read_bytes, str(file)).image)


def load_all(batches: Iterable[Batch]) -> Batch:
    """All batches as one: for sets that fit in memory. Raises UserError when there are none."""
    parts = list(batches)
    if not parts:
        raise UserError("got no images at all; expected at least one")
    return torch.cat([images for images, _ in parts]), [caption for _, texts in parts for caption in texts]


def _ahead(
    entries: Iterable[Entry], function: Callable[[Entry], Decoded], workers: int, depth: int
) -> Iterator[tuple[Entry, Decoded]]:
    """Each entry with its picture, in order, `depth` of them under way in threads."""
    pending: deque[tuple[Entry, Future[Decoded]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for entry in entries:
            pending.append((entry, pool.submit(function, entry)))
            if len(pending) > depth + workers:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# Sources


def _entries(files: ImageFiles, start: int, stop: int | None) -> Iterator[Entry]:
    """Entries start … stop, in order."""
    for file in files.pictures[start:stop]:
        yield Entry(str(file), file.read_bytes, files.captions.get(file))
    for file in files.tables:
        rows = _parquet_file(file).metadata.num_rows
        yield from _parquet(file, max(start, 0), rows if stop is None else min(stop, rows))
        start, stop = start - rows, None if stop is None else stop - rows


def _metadata(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    captions = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            captions[row["file_name"]] = str(next(row[key] for key in CAPTION_KEYS if key in row))
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise UserError(
                f"{file} line {number} lacks file_name or one of {', '.join(CAPTION_KEYS)}; mend that line"
            ) from error
    return captions


def _parquet_file(file: Path) -> Any:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
    from pyarrow.lib import ArrowException  # type: ignore[import-untyped]

    try:
        return pq.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} is no readable parquet file ({error}); fetch it again") from error


def _parquet(file: Path, start: int, stop: int) -> Iterator[Entry]:
    """Rows start … stop; row groups before them are not read."""
    from pyarrow.lib import ArrowException

    table = _parquet_file(file)
    names = table.schema_arrow.names
    column = next((key for key in IMAGE_KEYS if key in names), None)
    if column is None:
        raise UserError(f"{file} has columns {', '.join(names)}; expected `image` with `bytes` inside")
    key = next((key for key in CAPTION_KEYS if key in names), None)
    sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    groups = [g for g in range(len(sizes)) if sum(sizes[: g + 1]) > start and sum(sizes[:g]) < stop]
    row = sum(sizes[: groups[0]]) if groups else 0
    try:
        for batch in table.iter_batches(64, row_groups=groups, columns=[column, *([key] if key else [])]):
            for entry in batch.to_pylist():
                if start <= row < stop:
                    data = _cell(entry[column], file, row)
                    yield Entry(f"{file} row {row}", lambda data=data: data, entry[key] if key else None)  # type: ignore[misc]
                row += 1
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} is no readable parquet file ({error}); fetch it again") from error


def _cell(image: Any, file: Path, row: int) -> bytes:
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise UserError(f"{file} row {row}: `image` holds no bytes; expected encoded images in `image.bytes`")
    return data
