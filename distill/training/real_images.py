"""Reads captioned images, which serve as real samples for the discriminator.

A source is a folder of images with captions (`d2g.data.captions`), a .parquet file with columns `image`
(bytes) and a caption, or a folder of these. For a class-conditional teacher captions are class numbers, from
the column `label` or from a folder for each class; for an unconditional one there are none.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from d2g.core.config import digest
from d2g.core.errors import SettingError, UserError
from d2g.core.logs import log_once
from d2g.core.machine_errors import raise_machine_error
from d2g.core.shuffle import permuted_batch
from d2g.data.captions import Captions
from d2g.data.columns import caption_column
from d2g.data.folders import TABLE_SUFFIX, FolderListing, few_names, list_folder
from d2g.data.pictures import decode_picture
from d2g.data.tables import (
    check_expansion,
    encoded_image,
    image_column,
    open_table,
    parquet_errors,
    unreadable_table,
)
from d2g.diffusion.conditioning import Conditioner, ConditioningKind

SETTING = "gan.real_column"
DIGEST_SAMPLES = 64
"""About how many of the images a digest reads."""
BLOCK, WINDOW = 512, 8
"""Shuffle settings for parquet: neighboring rows stay close, because a row group is read as a unit."""


@dataclass(frozen=True)
class CaptionKind:
    """Kind of captions that a teacher takes: text, class numbers below `classes`, or none."""

    name: ConditioningKind = "text"
    classes: int = 0

    def column(self, column: str | None) -> str | None:
        """The caption column: `column`, or for classes `label`."""
        return "label" if column is None and self.name == "label" else column

    def checked(self, caption: str, where: str) -> str:
        """A caption of the image `where`, class numbers without leading zeros.

        Raises UserError for a number that is no class of the teacher.
        """
        if self.name != "label":
            return caption
        if not (caption.isascii() and caption.isdecimal() and int(caption) < self.classes):
            raise UserError(f"{where}: class {caption!r}; expected a class number, 0 to {self.classes - 1}")
        return str(int(caption))


TEXT = CaptionKind()


def caption_kind(conditioner: Conditioner) -> CaptionKind:
    """Return the kind of captions that a teacher with this conditioner takes."""
    return CaptionKind(conditioner.kind, conditioner.num_labels)


class RealImages:
    """Captioned images of a source, in an endless random order that depends only on (seed, images seen).

    The constructor raises UserError for a source without images or captions, and for classes that the
    teacher does not have. Reading raises UserError for an unreadable image.
    """

    def __init__(
        self, source: str, size: tuple[int, int], column: str | None = None, kind: CaptionKind = TEXT
    ) -> None:
        """size: (height, width) in pixels of the center crops, which are resized to it.

        column: the caption column (`d2g.data.columns`). kind: what the teacher takes.
        """
        self.source, self.size, self.kind = Path(source), size, kind
        if kind.name == "none" and column is not None:
            raise SettingError(
                f"{SETTING} is {column!r}, but the teacher is unconditional: its images have no captions; "
                "leave it out"
            )
        self._files, self._rows = _list_source(self.source, column, kind)
        self._open_tables()
        self._columns = [
            _table_columns(*pair, column, kind) for pair in zip(self._files, self._tables, strict=True)
        ]
        self._ends = np.cumsum([0, *(table.metadata.num_rows for table in self._tables)])
        if not len(self):
            raise UserError(f"{source} holds no images; expected captioned images, or .parquet")

    def _open_tables(self) -> None:
        self._tables = [open_table(file) for file in self._files]
        self._group = lru_cache(maxsize=16)(self._read_group)

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files, for loader processes that do not start as forks."""
        return {name: value for name, value in vars(self).items() if name not in ("_tables", "_group")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_tables()

    @property
    def shuffle_blocks(self) -> tuple[int, int]:
        """(block, window) of the random order (`d2g.core.shuffle`); zeros shuffle all images."""
        return (BLOCK, WINDOW) if self._tables else (0, 0)

    def __len__(self) -> int:
        return len(self._rows) or int(self._ends[-1])

    def digest(self) -> str:
        """Compute a digest of the images that does not depend on the folder's path.

        It covers names below the source, file sizes and captions of all images, and the bytes of some. Of a
        parquet file it covers name, size, and footer, which holds sizes and statistics.
        """
        tables = [
            [_name_below(self.source, file), file.stat().st_size, _footer_sha256(file, table)]
            for file, table in zip(self._files, self._tables, strict=True)
        ]
        files = [[_name_below(self.source, path), path.stat().st_size, text] for path, text in self._rows]
        some = range(0, len(self._rows), max(1, len(self._rows) // DIGEST_SAMPLES))
        samples = [hashlib.sha256(self._read_file(number)[0]).hexdigest() for number in some]
        return digest([tables, files, samples])

    def batch(self, seed: int, start: int, count: int) -> tuple[Tensor, list[str]]:
        """Read `count` images from position `start` of the random order; returns the same as `read`."""
        return self.read(permuted_batch(seed, len(self), start, count, *self.shuffle_blocks))

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
            raise_machine_error(error)
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
        name = f"{self.source}, row {number}"
        data = encoded_image(images[row].as_py(), name)
        if captions is None:
            return data, "", name
        try:
            caption = captions[row].as_py()
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: its caption is not UTF-8 ({error}); correct or drop the row") from error
        if caption in (None, ""):
            raise UserError(f"{name} has no caption; drop the row")
        if self.kind.name == "text" and not isinstance(caption, str):
            kind = type(caption).__name__
            raise UserError(
                f"{name}: a caption must be text, found {str(caption)[:40]!r} ({kind}); write the column "
                "again"
            )
        return data, self.kind.checked(str(caption), name), name

    def _read_group(self, table: int, group: int) -> tuple[Any, Any]:
        image, caption = self._columns[table]
        columns = [image] if caption is None else [image, caption]
        try:
            rows = self._tables[table].read_row_group(group, columns=columns)
        except parquet_errors() as error:
            raise unreadable_table(self._files[table], error) from error
        return rows[image], None if caption is None else rows[caption]

    def _decode(self, data: bytes, name: str) -> Tensor:
        height, width = self.size
        image = decode_picture(data, name, exact=False).image
        fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def _name_below(source: Path, file: Path) -> str:
    """The path of a file relative to its source; "" for the source itself."""
    return "" if file == source else os.path.relpath(file, source)


def _footer_sha256(file: Path, table: Any) -> str:
    """sha256 of the footer of a parquet file."""
    with open(file, "rb") as stream:
        stream.seek(-8 - table.metadata.serialized_size, os.SEEK_END)
        return hashlib.sha256(stream.read()).hexdigest()


def _list_source(
    source: Path, column: str | None, kind: CaptionKind
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """(parquet files, none) of a source, or (none, (file, caption) of its images, sorted)."""
    if source.suffix.lower() == TABLE_SUFFIX and not source.is_dir():
        return [source], []
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; expected captioned images, or .parquet")
    listing = list_folder(source)
    if listing.tables and not listing.pictures:
        listing.log_left_out(listing.tables)
        return list(listing.tables), []
    if kind.name == "none":
        listing.log_left_out()
        return [], [(picture, "") for picture in listing.pictures]
    labels = kind.name == "label"
    captions = Captions(listing, kind.column(column), SETTING, numbers=labels)
    captions.require_column(column, SETTING)
    if labels and not captions.files:
        return [], _by_class_folder(listing, kind)
    rows = _list_captioned_files(listing, captions)
    return [], [(path, kind.checked(caption, str(path))) for path, caption in rows]


def _by_class_folder(listing: FolderListing, kind: CaptionKind) -> list[tuple[Path, str]]:
    """(file, class number) of the images in a folder for each class (`FolderListing.class_numbers`)."""
    folders, numbers = listing.by_class(), listing.class_numbers()
    listing.log_left_out()
    if all(name.isascii() and name.isdecimal() for name in folders):
        for name in folders:
            kind.checked(name, str(listing.root / name))
    elif len(folders) == kind.classes:
        log_once(f"{listing.root}: classes 0 to {kind.classes - 1} are its folders, {few_names([*folders])}")
    else:
        raise UserError(
            f"{listing.root} has {len(folders)} folders, but the teacher has {kind.classes} classes; name "
            f"the folders by their class numbers, 0 to {kind.classes - 1}"
        )
    return [(picture, str(numbers[name])) for name, pictures in folders.items() for picture in pictures]


def _table_columns(file: Path, table: Any, column: str | None, kind: CaptionKind) -> tuple[str, str | None]:
    """The columns of images and of captions; None for a teacher without captions. Checks class numbers."""
    names = table.schema_arrow.names
    image = image_column(file, names)
    if kind.name == "none":
        check_expansion(file, table, [image])
        return image, None
    caption = caption_column(file, names, kind.column(column), SETTING)
    check_expansion(file, table, [image, caption])
    if kind.name == "label":
        try:
            labels = table.read(columns=[caption])[caption].unique().to_pylist()
        except parquet_errors() as error:
            raise unreadable_table(file, error) from error
        for value in labels:
            kind.checked(str(value), f"{file}, column {caption}")
    return image, caption


def _list_captioned_files(listing: FolderListing, captions: Captions) -> list[tuple[Path, str]]:
    """List (file, caption) of a folder's images, sorted: those that its metadata files list, else all.

    Raises UserError for an image without a caption.
    """
    if not captions.metadata:
        listing.log_left_out(captions.files)
        return [(picture, _text_caption(picture, captions)) for picture in listing.pictures]
    if empty := [path for path, caption in captions.listed if not caption]:
        raise UserError(f"{captions.metadata[0]} gives {empty[0]} no caption; write one, or drop its line")
    listed = {path for path, _ in captions.listed}
    others = [str(path.relative_to(listing.root)) for path in listing.pictures if path not in listed]
    listing.log_left_out([*captions.files, *listed], {"without a line in the metadata": others})
    return sorted(captions.listed)


def _text_caption(picture: Path, captions: Captions) -> str:
    """The caption of an image from the text file beside it."""
    text = picture.with_suffix(".txt")
    if picture not in captions:
        raise UserError(f"{picture} has no caption; write it to {text.name} beside it")
    if not (caption := captions[picture]):
        raise UserError(f"{text} is empty; write the caption of {picture.name} to it")
    return caption
