"""Captions of the pictures in a folder: metadata.jsonl or metadata.csv (imagefolder convention), or NAME.txt.

A metadata file has a column `file_name`, relative to the file's own folder, and a caption column
(`d2g.data.columns`).
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from d2g.core.errors import SettingError, UserError
from d2g.core.logs import log_once
from d2g.core.machine_errors import raise_machine_error
from d2g.data.columns import CAPTION_COLUMNS, caption_column, find_caption_column
from d2g.data.folders import METADATA_FILES, FolderListing, few_names, normalized
from d2g.data.pictures import picture_prompt, png_text
from d2g.data.text_files import csv_rows, json_rows, read_text

FILE_NAME = "file_name"
CLASS_TEMPLATE = "a photo of a {}"
"""Caption of a picture whose class name is all that is known."""


def check_template(template: str) -> None:
    """Raise SettingError for a caption_template that cannot take the name of a class."""
    try:
        fields = [(name, spec or "") for _, name, spec, _ in Formatter().parse(template) if name is not None]
        # No attributes, and no width that fills the memory.
        usable = all(name in ("", "0") and not re.search(r"\d{4}|[{]", spec) for name, spec in fields)
        if usable:
            template.format("class").encode()  # a lone surrogate is a ValueError
    except (ValueError, IndexError, KeyError):
        usable = False
    if not usable:
        raise SettingError(
            f"caption_template is {template!r}; expected text with {{}} in place of the name of a class, as "
            f"in {CLASS_TEMPLATE!r}"
        )


def class_captions(root: Path, pictures: Sequence[Path], template: str = CLASS_TEMPLATE) -> dict[Path, str]:
    """A caption with the name of its class folder for each picture without captions of their own.

    Empty unless all pictures lie in subfolders of `root`; the first folder below `root` names the class.
    """
    parts = [picture.relative_to(root).parts for picture in pictures]
    if not parts or any(len(names) == 1 for names in parts):
        return {}
    captions = {
        picture: template.format(names[0].replace("_", " "))
        for picture, names in zip(pictures, parts, strict=True)
        if picture.suffix.lower() != ".png" or not picture_prompt(png_text(picture))
    }
    if captions:
        texts = sorted(set(captions.values()))
        log_once(f"{root}: captions are made of the names of its folders: {few_names(texts)}")
    return captions


class Captions(Mapping[Path, str]):
    """Picture -> caption: from a metadata file, else from the text file beside it, which is read on demand.

    The log says in one line which listed files are missing; they are left out.
    `metadata`: the metadata files that are used. `listed`: the pictures that they list with their captions.
    `texts`: picture -> the text file beside it. `missing`: files that are listed and not there.
    """

    def __init__(
        self,
        listing: FolderListing,
        column: str | None = None,
        setting: str = "column",
        numbers: bool = False,
    ) -> None:
        """`column`, `setting`: as in `caption_column`; `numbers`: as in `read_metadata`. Raises UserError for
        a damaged metadata file."""
        self.root = listing.root
        self.listed: list[tuple[Path, str]] = []
        self.missing: list[Path] = []
        # Match the names in the metadata files with the pictures.
        self.metadata = [file for file in _metadata_files(listing) if _is_metadata(listing, file, column)]
        pictures = {normalized(os.path.abspath(picture)): picture for picture in listing.pictures}
        for file in self.metadata:
            for name, caption in read_metadata(file, column, setting, numbers):
                path = pictures.get(normalized(os.path.abspath(file.parent / name.replace("\\", "/"))))
                if path is None and (file.parent / name).is_file():
                    path = file.parent / name  # outside the folder, or of another ending
                if path is None:
                    self.missing.append(file.parent / name)
                else:
                    self.listed.append((path, caption))
        # Other pictures have a text file beside them.
        self.texts = _text_files(listing)
        self._rows = dict(self.listed)
        if self.missing:
            names = few_names([str(path) for path in self.missing])
            log_once(
                f"{listing.root}: left out {len(self.missing)} files that captions name and that are missing "
                f"({names})"
            )

    def require_column(self, column: str | None, setting: str = "column") -> None:
        """Raise SettingError for a column that somebody has named and that no metadata file has."""
        if column is not None and not self.metadata:
            raise SettingError(
                f"{setting} is {column!r}, but no metadata file of {self.root} has such a column beside "
                f"{FILE_NAME}; correct it, or leave it out"
            )

    def log_several(self) -> None:
        """Log how many pictures the metadata files list several times, where one caption of each is used."""
        times = Counter(picture for picture, _ in self.listed)
        if several := sum(count > 1 for count in times.values()):
            log_once(f"{self.root}: {several} pictures have several captions; the last one of each is used")

    @property
    def files(self) -> list[Path]:
        """The files that captions come from."""
        return [*self.metadata, *self.texts.values()]

    def __getitem__(self, picture: Path) -> str:
        if picture in self._rows:
            return self._rows[picture]
        return read_text(self.texts[picture]).strip()

    def __iter__(self) -> Iterator[Path]:
        yield from self._rows
        yield from (picture for picture in self.texts if picture not in self._rows)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _metadata_files(listing: FolderListing) -> list[Path]:
    """The metadata files below a folder, one of each folder."""
    by_folder: dict[Path, Path] = {}
    for name in METADATA_FILES:
        for file in listing.others:
            if file.name == name:
                by_folder.setdefault(file.parent, file)
    return sorted(by_folder.values())


def _is_metadata(listing: FolderListing, file: Path, column: str | None) -> bool:
    """Whether a file is used: metadata.jsonl of the folder itself always, others if they have the columns."""
    if file == listing.root / METADATA_FILES[0]:
        return True
    _, row = next(_objects(file, column), (0, {}))
    return FILE_NAME in row and find_caption_column(row, column) is not None


def _text_files(listing: FolderListing) -> dict[Path, Path]:
    """Picture -> the .txt file of the same name beside it."""
    texts = {
        normalized(file.with_suffix("")): file for file in listing.others if file.suffix.lower() == ".txt"
    }
    captioned = ((picture, texts.get(normalized(picture.with_suffix("")))) for picture in listing.pictures)
    return {picture: text for picture, text in captioned if text is not None}


def read_metadata(
    file: Path, column: str | None = None, setting: str = "column", numbers: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield (file name, caption) of a metadata.jsonl or metadata.csv. A null caption is "".

    numbers: captions may be whole numbers, which are given in decimal.

    Raises UserError for a row without file_name or caption column, and for a caption that is no text.
    """
    try:
        for number, row in _objects(file, column):
            where = f"{file} line {number}"
            name = row.get(FILE_NAME)
            if not isinstance(name, str) or not name or "\0" in name:
                raise UserError(
                    f"{where} lacks {FILE_NAME}, found {', '.join(row) or 'nothing'}; correct that line"
                )
            caption = row[caption_column(where, row, column, setting)]
            if numbers and type(caption) is int:
                caption = str(caption)
            if not isinstance(caption, str | None):
                raise UserError(
                    f"{where}: a caption must be text, found {str(caption)[:40]!r}; correct that line"
                )
            yield name, (caption or "").strip()
    except OSError as error:
        raise_machine_error(error)
        raise UserError(f"{file} cannot be read: {error.strerror or error}; restore it") from error


def _objects(file: Path, column: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a metadata file by name of their column, with their line numbers."""
    if file.suffix != ".csv":
        yield from json_rows(file)
        return
    wanted: Sequence[str] = (FILE_NAME, *CAPTION_COLUMNS, *([column] if column else []))
    names, rows = csv_rows(file, wanted)
    for number, cells in rows:
        if any(cells):
            yield number, dict(zip(names, cells, strict=False))
