"""Labeled images from a folder with one subfolder per class (ImageNet's layout) or from image-parquet."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from d2g.core.config import digest
from d2g.core.errors import UserError
from d2g.core.machine_errors import raise_machine_error
from d2g.data.folders import PICTURE_SUFFIXES, TABLE_SUFFIX, list_folder
from d2g.data.pictures import decode_picture
from d2g.data.tables import (
    check_expansion,
    encoded_image,
    image_column,
    open_table,
    parquet_errors,
    unreadable_table,
)

HELD_OUT_NAMES = ("val", "validation", "test")
"""Names of folders, or prefixes of parquet files, that are never used for training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabeledImages:
    """Encoded images in a fixed order. `labels` [N] index `classes`; empty for unlabeled images."""

    name: str
    names: Sequence[str]
    """Names for messages; for files their paths."""
    readers: Sequence[Callable[[], bytes]]
    labels: Tensor
    classes: Sequence[str]
    in_memory: bool = False
    """Whether the images are cells of a table instead of files."""

    def __len__(self) -> int:
        return len(self.readers)

    def open(self, row: int) -> Image.Image:
        """Decode image `row` to RGB. Raises UserError if it cannot be read."""
        return decode_rgb(self.readers[row], self.names[row])

    def rows(self, rows: Sequence[int]) -> "LabeledImages":
        """Select `rows`, in that order."""
        return LabeledImages(
            name=self.name,
            names=[self.names[row] for row in rows],
            readers=[self.readers[row] for row in rows],
            labels=self.labels[list(rows)] if len(self.labels) else self.labels,
            classes=self.classes,
            in_memory=self.in_memory,
        )

    def digest(self) -> str:
        """Return a digest that changes when an image, a label or their order changes.

        Cells of a table are hashed; files are represented by relative path, size and modification time.
        """
        identities: Sequence[Any]
        if self.in_memory:
            identities = [hashlib.sha256(read()).hexdigest() for read in self.readers]
        else:
            identities = file_fingerprints(self.name, map(Path, self.names))
        return digest([identities, self.labels.tolist()])


def file_fingerprints(root: str | Path, files: Iterable[Path]) -> list[list[Any]]:
    """Return the relative path, name, size and modification time of each file below `root`."""
    fingerprints = []
    for file in files:
        stat = file.stat()
        fingerprints.append([os.path.relpath(file, root), file.name, stat.st_size, stat.st_mtime_ns])
    return fingerprints


def decode_rgb(read: Callable[[], bytes], name: str) -> Image.Image:
    """Decode an image of any kind to 8-bit RGB. Raises UserError, naming `name`, if it is damaged."""
    try:
        data = read()
    except OSError as error:
        raise_machine_error(error, name)
        raise UserError(f"{name} cannot be read: {error.strerror or error}; restore it") from error
    return decode_picture(data, name, exact=False).image


def open_labeled(data: str, val: str = "") -> tuple[LabeledImages, LabeledImages | None]:
    """Open the training images of `data` and the validation images.

    Validation images come from `val`, else from data's own val/ folder or validation files, else they are
    None. Names in HELD_OUT_NAMES are never trained on. Raises UserError for a missing source, for a single
    class, and for validation classes that are not in training.
    """
    train = _open_part(Path(data), "train")
    if len(train.classes) < 2:
        raise UserError(
            f"{data}: all {len(train)} pictures are of one class ({train.classes[0]}), expected two or more; "
            "expected a subfolder for each class, or a `label` column with several values"
        )
    held_out = _open_part(Path(val), "val") if val else _validation_part(Path(data))
    return train, None if held_out is None else _with_classes(held_out, train.classes)


def open_unlabeled(data: str) -> LabeledImages:
    """Open all images of a file, a folder or image-parquet, sorted by name, without labels."""
    root = _require_existing(Path(data))
    if root.is_file():
        pictures = [root] if root.suffix.lower() in PICTURE_SUFFIXES else []
        tables = [root] if root.suffix.lower() == TABLE_SUFFIX else []
    else:
        listing = list_folder(root)
        pictures = list(listing.pictures)
        tables = [] if pictures else list(listing.tables)
        listing.log_left_out([*tables, *listing.caption_files])
    if pictures:
        return _from_files(data, pictures, [], [])
    if tables:
        return _from_tables(data, tables, labeled=False)
    raise UserError(
        f"{data} holds no images; expected {', '.join(sorted(PICTURE_SUFFIXES))} or .parquet files"
    )


def _require_existing(root: Path) -> Path:
    if not root.exists():
        raise UserError(f"{root}: no such file or folder; expected a folder of images or a .parquet file")
    return root


def _validation_part(root: Path) -> LabeledImages | None:
    for name in HELD_OUT_NAMES:
        if (root / name).is_dir() or (root.is_dir() and list(root.glob(f"{name}*.parquet"))):
            return _open_part(root, name)
    return None


def _open_part(root: Path, part: str) -> LabeledImages:
    """Open the subfolder or parquet files of `root` that are named `part`, else everything in `root`.

    For training, everything excludes HELD_OUT_NAMES.
    """
    _require_existing(root)
    has_part = root.is_dir() and (root / part).is_dir()
    root = root / part if has_part else root
    excluded = HELD_OUT_NAMES if part == "train" and not has_part and root.is_dir() else ()
    # Parquet files, those named after the part first.
    tables = [root] if root.suffix == ".parquet" else sorted(root.glob("*.parquet"))
    if tables := [table for table in tables if not table.name.startswith((*excluded, "."))]:
        part_tables = [table for table in tables if table.name.startswith(part)]
        return _from_tables(str(root), part_tables or tables, labeled=True)
    by_class = _pictures_by_class(root, excluded) if root.is_dir() else {}
    if not by_class:
        raise UserError(
            f"{root} holds no labeled images; expected a subfolder of images for each class, "
            "or .parquet files with a `label` column"
        )
    files = [file for pictures in by_class.values() for file in pictures]
    labels = [number for number, pictures in enumerate(by_class.values()) for _ in pictures]
    return _from_files(str(root), files, labels, list(by_class))


def _pictures_by_class(root: Path, excluded: Sequence[str]) -> dict[str, list[Path]]:
    """The pictures of each subfolder, except `excluded` ones; what else lies there is left out."""
    listing = list_folder(root)
    by_class = listing.by_class()
    beside = [file.name for file in by_class.pop("", [])]
    listing.log_left_out(listing.caption_files, {"beside the class folders": beside})
    return {name: pictures for name, pictures in by_class.items() if name not in excluded}


def _from_files(
    name: str, files: Sequence[Path], labels: Sequence[int], classes: Sequence[str]
) -> LabeledImages:
    return LabeledImages(
        name=name,
        names=[str(file) for file in files],
        readers=[file.read_bytes for file in files],
        labels=torch.tensor(labels, dtype=torch.int64),
        classes=classes,
    )


def _from_tables(name: str, files: Sequence[Path], labeled: bool) -> LabeledImages:
    """Keep the encoded images in memory, because single rows of parquet cannot be read."""
    names: list[str] = []
    cells: list[bytes] = []
    labels: list[Any] = []
    # Read all tables, and name each image by its file and row.
    for file in files:
        images, image_labels = _read_table(file, labeled)
        names += [f"{file} row {row}" for row in range(len(images))]
        cells += images
        labels += image_labels
    # Labels may be numbers or texts; classes are their sorted distinct values.
    classes = sorted(set(labels))
    number = {label: i for i, label in enumerate(classes)}
    return LabeledImages(
        name=name,
        names=names,
        readers=[partial(_identity, cell) for cell in cells],
        labels=torch.tensor([number[label] for label in labels], dtype=torch.int64),
        classes=[str(label) for label in classes],
        in_memory=True,
    )


def _identity(cell: bytes) -> bytes:
    return cell


def _read_table(file: Path, labeled: bool) -> tuple[list[bytes], list[Any]]:
    try:
        source = open_table(file)
        column = image_column(file, source.schema_arrow.names, *(["label"] if labeled else []))
        columns = [column, "label"] if labeled else [column]
        check_expansion(file, source, columns)
        table = source.read(columns=columns)
    except parquet_errors() as error:
        raise unreadable_table(file, error) from error
    cells = [encoded_image(cell, f"{file} row {row}") for row, cell in enumerate(table[column].to_pylist())]
    labels = table["label"].to_pylist() if labeled else []
    if bad := [row for row, label in enumerate(labels) if label is None]:
        raise UserError(f"{file} row {bad[0]} has no label; drop that row")
    return cells, labels


def _with_classes(pictures: LabeledImages, classes: Sequence[str]) -> LabeledImages:
    """Renumber the labels to the indices of `classes`. Raises UserError for a class that is not in it."""
    if missing := [name for name in pictures.classes if name not in classes]:
        raise UserError(
            f"{pictures.name}: class {missing[0]} is not among the {len(classes)} training classes; "
            "expected the same class names in both"
        )
    order = torch.tensor([list(classes).index(name) for name in pictures.classes])
    return LabeledImages(
        name=pictures.name,
        names=pictures.names,
        readers=pictures.readers,
        labels=order[pictures.labels],
        classes=classes,
        in_memory=pictures.in_memory,
    )
