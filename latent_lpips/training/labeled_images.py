"""Labeled pictures: a folder with a subfolder for each class (ImageNet's layout), or image-parquet."""

import hashlib
import io
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

HELD_OUT_NAMES = ("val", "validation", "test")
"""Folders, or beginnings of parquet files' names, that are never trained on."""
PIL_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True, kw_only=True, slots=True)
class LabeledImages:
    """Encoded pictures in a fixed order. `labels` [N]: numbers of `classes`; none where nobody asked."""

    name: str
    names: Sequence[str]
    """For messages."""
    readers: Sequence[Callable[[], bytes]]
    labels: Tensor
    classes: Sequence[str]
    in_memory: bool = False
    """Cells of a table; else files, which `names` are the paths of."""

    def __len__(self) -> int:
        return len(self.readers)

    def open(self, row: int) -> Image.Image:
        """Picture `row` as RGB. Raises UserError where it cannot be read."""
        return decode_rgb(self.readers[row], self.names[row])

    def rows(self, rows: Sequence[int]) -> "LabeledImages":
        """Some of them, in that order."""
        return LabeledImages(
            name=self.name,
            names=[self.names[row] for row in rows],
            readers=[self.readers[row] for row in rows],
            labels=self.labels[list(rows)] if len(self.labels) else self.labels,
            classes=self.classes,
            in_memory=self.in_memory,
        )

    def digest(self) -> str:
        """Changes when a picture, a label or their order does: sha256 of cells and labels; of a file its path
        below the source, size and time of change stand for its bytes."""
        told: Sequence[Any]
        if self.in_memory:
            told = [hashlib.sha256(read()).hexdigest() for read in self.readers]
        else:
            told = file_fingerprints(self.name, map(Path, self.names))
        return digest([told, self.labels.tolist()])


def file_fingerprints(root: str | Path, files: Iterable[Path]) -> list[list[Any]]:
    """What tells that a file below `root` is another now: its place, size and time of change."""
    marks = []
    for file in files:
        known = file.stat()
        marks.append([os.path.relpath(file, root), file.name, known.st_size, known.st_mtime_ns])
    return marks


def decode_rgb(read: Callable[[], bytes], name: str) -> Image.Image:
    """Decode to 8-bit RGB, whatever it was. Raises UserError, with `name`, for what is no whole picture."""
    try:
        with Image.open(io.BytesIO(read())) as opened:
            return opened.convert("RGB")
    except Exception as error:  # on damaged bytes Pillow's readers raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is no readable image ({reason}); remove it or make it again") from error


def open_labeled(data: str, val: str = "") -> tuple[LabeledImages, LabeledImages | None]:
    """Training pictures of `data`, and those to score on: `val`, else data's own val/ or validation files,
    else None. What HELD names is not trained on, whichever of it is scored on.

    Raises UserError for a missing source, one class alone, and val classes that train lacks.
    """
    train = _labeled(Path(data), "train")
    if len(train.classes) < 2:
        raise UserError(
            f"{data}: all {len(train)} pictures are of one class ({train.classes[0]}), expected two or more; "
            "expected a subfolder for each class, or a `label` column with several values"
        )
    held = _labeled(Path(val), "val") if val else _validation(Path(data))
    return train, None if held is None else _renumbered(held, train.classes)


def open_unlabeled(data: str) -> LabeledImages:
    """All pictures of a file, a folder or image-parquet, in order of name, without labels."""
    root = _existing(Path(data))
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    if found := [f for f in files if f.suffix.lower() in PIL_SUFFIXES and f.is_file()]:
        return _of_files(data, found, [], [])
    if tables := [f for f in files if f.suffix == ".parquet"]:
        return _of_tables(data, tables, labeled=False)
    raise UserError(f"{data} holds no images; expected {', '.join(sorted(PIL_SUFFIXES))} or .parquet files")


def _existing(root: Path) -> Path:
    if not root.exists():
        raise UserError(f"{root}: no such file or folder; expected a folder of images or a .parquet file")
    return root


def _validation(root: Path) -> LabeledImages | None:
    for name in HELD_OUT_NAMES:
        if (root / name).is_dir() or (root.is_dir() and list(root.glob(f"{name}*.parquet"))):
            return _labeled(root, name)
    return None


def _labeled(root: Path, part: str) -> LabeledImages:
    """What `root` holds for `part`: its subfolder or parquet files of that name, else all of it, which for
    training is all but HELD."""
    _existing(root)
    own = root.is_dir() and (root / part).is_dir()
    root = root / part if own else root
    held = HELD_OUT_NAMES if part == "train" and not own and root.is_dir() else ()
    tables = [root] if root.suffix == ".parquet" else sorted(root.glob("*.parquet"))
    if left := [table for table in tables if not table.name.startswith(held)]:
        named = [table for table in left if table.name.startswith(part)]
        return _of_tables(str(root), named or left, labeled=True)
    homes = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    homes = [component_dir for component_dir in homes if component_dir.name not in held]
    found = {
        component_dir.name: [
            f for f in sorted(component_dir.rglob("*")) if f.suffix.lower() in PIL_SUFFIXES and f.is_file()
        ]
        for component_dir in homes
    }
    classes = [name for name, files in found.items() if files]
    if not classes:
        raise UserError(
            f"{root} holds no labeled images; expected a subfolder of images for each class, "
            "or .parquet files with a `label` column"
        )
    files = [file for name in classes for file in found[name]]
    labels = [number for number, name in enumerate(classes) for _ in found[name]]
    return _of_files(str(root), files, labels, classes)


def _of_files(
    name: str, files: Sequence[Path], labels: Sequence[int], classes: Sequence[str]
) -> LabeledImages:
    return LabeledImages(
        name=name,
        names=[str(file) for file in files],
        readers=[file.read_bytes for file in files],
        labels=torch.tensor(labels, dtype=torch.int64),
        classes=classes,
    )


def _of_tables(name: str, files: Sequence[Path], labeled: bool) -> LabeledImages:
    """The encoded pictures stay in memory, for rows of parquet cannot be read one by one."""
    names: list[str] = []
    cells: list[bytes] = []
    labels: list[Any] = []
    for file in files:
        images, found = _columns(file, labeled)
        names += [f"{file} row {row}" for row in range(len(images))]
        cells += images
        labels += found
    classes = sorted(set(labels))
    number = {label: i for i, label in enumerate(classes)}
    return LabeledImages(
        name=name,
        names=names,
        readers=[partial(_same, cell) for cell in cells],
        labels=torch.tensor([number[label] for label in labels], dtype=torch.int64),
        classes=[str(label) for label in classes],
        in_memory=True,
    )


def _same(cell: bytes) -> bytes:
    return cell


def _columns(file: Path, labeled: bool) -> tuple[list[bytes], list[Any]]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
    from pyarrow.lib import ArrowException  # type: ignore[import-untyped]

    try:
        names = pq.read_schema(file).names
        column = next((key for key in ("image", "img") if key in names), None)
        if column is None or (labeled and "label" not in names):
            wanted = "`image` and `label`" if labeled else "`image`"
            raise UserError(f"{file} has columns {', '.join(names)}; expected {wanted}")
        table = pq.read_table(file, columns=[column, "label"] if labeled else [column])
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} is no readable parquet file ({error}); fetch it again") from error
    cells: list[Any] = [
        cell.get("bytes") if isinstance(cell, dict) else cell for cell in table[column].to_pylist()
    ]
    if bad := [row for row, cell in enumerate(cells) if not isinstance(cell, bytes)]:
        raise UserError(f"{file} row {bad[0]}: `image` holds no bytes; expected encoded images inside")
    labels = table["label"].to_pylist() if labeled else []
    if bad := [row for row, label in enumerate(labels) if label is None]:
        raise UserError(f"{file} row {bad[0]} has no label; drop that row")
    return cells, labels


def _renumbered(pictures: LabeledImages, classes: Sequence[str]) -> LabeledImages:
    """The same with another set's class numbers."""
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
