"""Read images and their captions from a folder or from image-parquet files, in parallel and in order."""

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2g.core.environment import usable_cores
from d2g.core.errors import UserError
from d2g.core.logs import log_once
from d2g.data.captions import Captions
from d2g.data.columns import caption_column, find_caption_column
from d2g.data.folders import PICTURE_SUFFIXES, TABLE_SUFFIX, list_folder
from d2g.data.tables import (
    check_expansion,
    encoded_image,
    image_column,
    open_table,
    parquet_errors,
    unreadable_table,
)
from eval.images.decode import Decoded, decode_image
from eval.images.resize import NATIVE, Pixels

Batch = tuple[Tensor, list[str]]
"""uint8 images [B, 3, H, W] and their B captions ("" where there is none)."""


@dataclass(kw_only=True)
class Reading:
    """Facts collected while images are read: how many were converted to 8-bit RGB, how many have one side
    more than twice as long as the other, and each file's sha256."""

    converted: Counter[str] = field(default_factory=Counter)
    elongated: int = 0
    digests: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFiles:
    """Image files (`pictures`) or parquet files (`tables`), in order.

    `captions`: file -> caption. `caption_files`: the files that hold the captions of pictures. `column`: the
    chosen caption column (`d2g.data.columns`).
    """

    name: str
    pictures: Sequence[Path] = ()
    tables: Sequence[Path] = ()
    captions: Mapping[Path, str] = field(default_factory=dict)
    caption_files: Sequence[Path] = ()
    column: str | None = None

    def __len__(self) -> int:
        """Number of images. Reads the footers of parquet files, but no image."""
        return len(self.pictures) or sum(open_table(file).metadata.num_rows for file in self.tables)

    def listing(self) -> list[tuple[str, int, int]]:
        """Name, size in bytes and modification time (ns) of each file, to notice changed files."""
        return _listing([*self.pictures, *self.tables])

    def caption_listing(self) -> list[tuple[str, int, int]]:
        """The same of the files that hold the captions, to notice changed captions."""
        return _listing(self.caption_files)


def _listing(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    stats = [(file, file.stat()) for file in files]
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def expect_numbered_order(files: ImageFiles) -> None:
    """Raise UserError if pictures that are numbered are not in the order of their numbers, in which they are
    matched with prompts and with other images."""
    for before, picture in pairwise(files.pictures):
        first, second = (re.fullmatch(r"(.*?)(\d+)", str(path.with_suffix(""))) for path in (before, picture))
        if first and second and first[1] == second[1] and int(first[2]) > int(second[2]):
            raise UserError(
                f"{files.name}: in the order of the file names {before.name} comes before {picture.name}; "
                "write the numbers with leading zeros"
            )


def open_images(source: str | Path, column: str | None = None) -> ImageFiles:
    """List a folder with its captions (`d2g.data.captions`), or a .parquet file.

    What a folder holds beside them is left out, and the log says so. `column`: the caption column. Raises
    UserError when there is no image.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; expected a folder of images or a .parquet file")
    if source.is_file():
        if source.suffix.lower() != TABLE_SUFFIX:
            raise UserError(f"{source} is neither a folder of images nor a .parquet file; give one of these")
        return ImageFiles(name=str(source), tables=[source], column=column)
    # Image files take precedence over parquet files in the same folder.
    listing = list_folder(source)
    if listing.pictures:
        captions = Captions(listing, column)
        captions.require_column(column)
        listing.log_left_out(captions.files)
        captions.log_several()
        return ImageFiles(
            name=str(source),
            pictures=listing.pictures,
            captions=captions,
            caption_files=captions.files,
            column=column,
        )
    listing.log_left_out(listing.tables)
    if listing.tables:
        return ImageFiles(name=str(source), tables=listing.tables, column=column)
    raise UserError(
        f"{source} holds no images; expected {', '.join(sorted(PICTURE_SUFFIXES))} or .parquet files"
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """An image that is not decoded yet. `caption`: None where the image file itself may hold one."""

    name: str
    read: Callable[[], bytes]
    caption: str | None


def read_images(
    source: str | Path | ImageFiles,
    *,
    limit: int | None = None,
    start: int = 0,
    spread: bool = False,
    resize: str = NATIVE,
    batch_size: int = 64,
    workers: int = 0,
    reading: Reading | None = None,
    exact: bool = True,
) -> Iterator[Batch]:
    """Read at most `limit` images from number `start` on, in batches, in sorted order of their files.
    `spread`: they are evenly spread over all (`spread_numbers`), instead of the first ones.

    `source`: a folder or .parquet files. Captions come from the folder's metadata file or NAME.txt
    (`d2g.data.captions`), else from a PNG's own `prompt` text; in parquet from a caption column of text or
    whole numbers.
    `resize`: a preprocessing of `eval.images.resize`; "native" needs images of one size. `workers` threads
    decode ahead (0: two more than cores); the order does not change. `exact`: as in `decode_picture`, False
    for training. Raises UserError for a missing or empty source, an image that cannot be read, mixed sizes.
    """
    images: list[Pixels] = []
    captions: list[str] = []
    first_size: tuple[int, ...] | None = None
    reading = reading or Reading()
    workers = workers or usable_cores() + 2
    files = source if isinstance(source, ImageFiles) else open_images(source)
    if spread and limit is not None and limit < len(files):
        numbers = set(spread_numbers(len(files), limit))
        entries: Iterable[Entry] = (
            entry for number, entry in enumerate(_entries(files, 0, None)) if number in numbers
        )
    else:
        entries = _entries(files, start, start + limit if limit is not None else None)
    for entry, decoded in _decode_ahead(
        entries, lambda entry: decode_image(entry.read, entry.name, resize, exact=exact), workers, batch_size
    ):
        images.append(decoded.image)
        captions.append(decoded.caption if entry.caption is None else entry.caption)
        reading.converted.update(decoded.converted)
        reading.elongated += max(decoded.size) > 2 * min(decoded.size)
        reading.digests.append(decoded.sha256)
        # Images of several sizes cannot be stacked.
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
    # The last batch may be smaller.
    if images:
        yield torch.from_numpy(np.stack(images)), captions


def spread_numbers(total: int, count: int) -> Sequence[int]:
    """At most `count` numbers below `total`, evenly spread, so that every class keeps its share."""
    return range(total) if total <= count else [row * total // count for row in range(count)]


def read_image(file: Path) -> Tensor:
    """One image file -> uint8 [3, H, W]. Raises UserError where it is missing or unreadable."""
    if not file.is_file():
        raise UserError(f"{file}: no such image file")
    return torch.from_numpy(decode_image(file.read_bytes, str(file)).image)


def load_all(batches: Iterable[Batch]) -> Batch:
    """Join all batches, for sets that fit in memory. Raises UserError when there are none."""
    parts = list(batches)
    if not parts:
        raise UserError("got no images at all; expected at least one")
    return torch.cat([images for images, _ in parts]), [caption for _, texts in parts for caption in texts]


def _decode_ahead(
    entries: Iterable[Entry], function: Callable[[Entry], Decoded], workers: int, depth: int
) -> Iterator[tuple[Entry, Decoded]]:
    """Each entry with its decoded image, in order; threads work on up to `depth` images ahead."""
    pending: deque[tuple[Entry, Future[Decoded]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for entry in entries:
            pending.append((entry, pool.submit(function, entry)))
            if len(pending) > depth + workers:
                done, future = pending.popleft()
                yield done, future.result()
        # The entries are read: the remaining images in order.
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _entries(files: ImageFiles, start: int, stop: int | None) -> Iterator[Entry]:
    """The entries from `start` up to `stop` (None: the last), in order."""
    for file in files.pictures[start:stop]:
        yield Entry(str(file), file.read_bytes, files.captions.get(file))
    for file in files.tables:
        rows = open_table(file).metadata.num_rows
        yield from _parquet_entries(
            file, max(start, 0), rows if stop is None else min(stop, rows), files.column
        )
        start, stop = start - rows, None if stop is None else stop - rows


def _parquet_entries(file: Path, start: int, stop: int, caption: str | None) -> Iterator[Entry]:
    """The rows from `start` up to `stop`; row groups before them are not read. `caption`: its column."""
    table = open_table(file)
    names = table.schema_arrow.names
    column = image_column(file, names)
    key = find_caption_column(names) if caption is None else caption_column(file, names, caption)
    # Read only the row groups that overlap the wanted rows.
    sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    groups = [g for g in range(len(sizes)) if sum(sizes[: g + 1]) > start and sum(sizes[:g]) < stop]
    row = sum(sizes[: groups[0]]) if groups else 0
    check_expansion(file, table, [column, *([key] if key else [])], groups)
    try:
        for batch in table.iter_batches(64, row_groups=groups, columns=[column, *([key] if key else [])]):
            for entry in batch.to_pylist():
                if start <= row < stop:
                    data = encoded_image(entry[column], f"{file} row {row}")
                    text = _cell_text(file, row, key, entry[key], caption is not None) if key else None
                    yield Entry(f"{file} row {row}", lambda data=data: data, text)  # type: ignore[misc]
                row += 1
    except parquet_errors() as error:
        raise unreadable_table(file, error) from error


def _cell_text(file: Path, row: int, column: str, cell: object, wanted: bool) -> str | None:
    """A cell of the caption column as text: class numbers in decimal, None for an empty cell.

    wanted: the user chose the column. Raises UserError if it then holds something else.
    """
    if type(cell) is int:
        return str(cell)
    if cell is None or isinstance(cell, str):
        return cell
    if wanted:
        raise UserError(
            f"{file} row {row}: column {column} holds {str(cell)[:40]!r}; expected text or whole numbers, "
            "give another column"
        )
    log_once(f"{file}: column {column} holds no text, so its images have no captions")
    return None
