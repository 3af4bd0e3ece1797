"""What lies in a folder of pictures.

Hidden files are skipped, links are followed once, and the log says in one line what is left out and why.
"""

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from d2g.core.errors import UserError
from d2g.core.logs import log_once
from d2g.data.pictures import png_text

PICTURE_SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .avif .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm "
    ".jp2 .j2k .jpx .tga .qoi".split()
)
"""Endings of picture files, in lower case."""
UNREADABLE_SUFFIXES = frozenset(
    ".heic .heif .hif .svg .svgz .eps .ps .wmf .emf .pdf .psd .ai .dng .cr2 .cr3 .nef .arw .raf .rw2".split()
)
"""Endings of picture files that the reader refuses: no decoder, no pixels, or a program."""
TABLE_SUFFIX = ".parquet"
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
"""Names of files with captions of the pictures beside them, in order of preference."""
_SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"})
"""Folders that operating systems leave beside pictures; some hold thumbnails."""
_SHOWN = 3  # names of each kind in the line about what is left out


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderListing:
    """The files below `root`, sorted by path. `left_out`: why -> names relative to `root`."""

    root: Path
    pictures: Sequence[Path]
    tables: Sequence[Path]
    others: Sequence[Path]
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def caption_files(self) -> list[Path]:
        """The files that may hold captions of the pictures (`d2g.data.captions`)."""
        return [file for file in self.others if file.suffix.lower() == ".txt" or file.name in METADATA_FILES]

    def by_class(self) -> dict[str, list[Path]]:
        """The pictures by the folder directly below `root`, sorted; "" has those beside the folders."""
        classes: dict[str, list[Path]] = {}
        for picture in self.pictures:
            parts = picture.relative_to(self.root).parts
            classes.setdefault(parts[0] if len(parts) > 1 else "", []).append(picture)
        return classes

    def class_numbers(self) -> dict[str, int]:
        """Class number of each folder of `by_class`: its name in decimal if all are, else their sorted order,
        as torchvision's ImageFolder numbers them.

        Raises UserError for pictures beside the folders.
        """
        folders = self.by_class()
        if (beside := folders.get("")) is not None:
            raise UserError(
                f"{beside[0]} has no class; write it to the column label of metadata.jsonl, or move each "
                "image to a folder of its class"
            )
        if all(name.isascii() and name.isdecimal() for name in folders):
            return {name: int(name) for name in folders}
        return {name: number for number, name in enumerate(folders)}

    def log_left_out(
        self, used: Iterable[Path] = (), more: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """Log in one line what is left out and why.

        `used`: the tables and other files that are read. `more`: what the caller leaves out, by reason.
        """
        read = set(used)
        unread = [file for file in (*self.tables, *self.others) if file not in read]
        unreadable = [file for file in unread if file.suffix.lower() in UNREADABLE_SUFFIXES]
        others = [file for file in unread if file.suffix.lower() not in UNREADABLE_SUFFIXES]
        reasons = {
            reason: list(names) for reason, names in {**self.left_out, **(more or {})}.items() if names
        }
        parts = [f"{len(names)} {reason} ({few_names(names)})" for reason, names in reasons.items()]
        if unreadable:
            parts.append(f"{len(unreadable)} to be saved as JPEG or PNG first ({_endings(unreadable)})")
        if others:
            parts.append(f"{len(others)} that are no pictures ({_endings(others)})")
        if parts:
            log_once(f"{self.root}: left out {', '.join(parts)}")


def _endings(files: Iterable[Path]) -> str:
    return few_names(sorted({file.suffix.lower() or file.name for file in files}))


def few_names(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def normalized(name: str | Path) -> str:
    """A file name in Unicode's composed form: Macs store decomposed names, captions name composed ones."""
    return unicodedata.normalize("NFC", os.fspath(name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is skipped by its name alone."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def is_picture(file: Path) -> bool:
    """Whether a file is a picture by its name."""
    return file.suffix.lower() in PICTURE_SUFFIXES and not is_hidden(file.name)


def list_folder(root: Path) -> FolderListing:
    """List all files below a folder. Raises UserError if `root` is no folder that can be read.

    A folder that is a link is read like any other, unless it is read already under another name. The grid of
    `d2g sample` is left out.
    """
    files: list[Path] = []
    left_out: dict[str, list[str]] = {}
    visited: set[str] = set()
    folders, links = [root], list[Path]()
    # Folders come before links, so that a folder is read under its own name.
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        real = os.path.realpath(folder)
        if real in visited:
            _note(left_out, "links to folders that are read already", root, folder)
            continue
        visited.add(real)
        _list_one(root, folder, files, folders, links, left_out)
        links.sort(reverse=True)
    files.sort()
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    for grid in [file for file in pictures if _is_sample_grid(file)]:
        pictures.remove(grid)
        _note(left_out, "grids of d2g sample", root, grid)
    tables = [file for file in files if file.suffix.lower() == TABLE_SUFFIX]
    others = [file for file in files if file.suffix.lower() not in (*PICTURE_SUFFIXES, TABLE_SUFFIX)]
    left_out = {reason: sorted(names) for reason, names in left_out.items()}
    return FolderListing(root=root, pictures=pictures, tables=tables, others=others, left_out=left_out)


def _list_one(
    root: Path,
    folder: Path,
    files: list[Path],
    folders: list[Path],
    links: list[Path],
    left_out: dict[str, list[str]],
) -> None:
    """Add the entries of one folder to the lists."""
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        if folder == root:
            raise UserError(f"{root} cannot be read: {error.strerror}; check its name and rights") from error
        return _note(left_out, "folders that cannot be read", root, folder)
    for entry in entries:
        path = folder / entry.name
        if is_hidden(entry.name):
            _note(left_out, "hidden", root, path)
        elif entry.is_dir():
            (links if entry.is_symlink() else folders).append(path)
        elif entry.is_file():
            files.append(path)
        else:
            _note(left_out, "broken links or special files", root, path)


def _note(left_out: dict[str, list[str]], reason: str, root: Path, path: Path) -> None:
    left_out.setdefault(reason, []).append(str(path.relative_to(root)))


def _is_sample_grid(file: Path) -> bool:
    """Whether this is the grid that `d2g sample` writes beside its pictures."""
    first = file.with_name("00000.png")
    return file.name == "grid.png" and first.is_file() and "index" in png_text(first)
