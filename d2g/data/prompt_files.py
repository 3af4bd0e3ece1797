"""Reading prompt files of all common formats as streams: no file is loaded completely."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from d2g.core.errors import SettingError, UserError
from d2g.core.logs import log_once
from d2g.data.captions import Captions, class_captions
from d2g.data.columns import CAPTION_COLUMNS, caption_column, find_caption_column
from d2g.data.folders import list_folder
from d2g.data.pictures import picture_prompt, png_text
from d2g.data.tables import check_expansion, open_table, parquet_errors, unreadable_table
from d2g.data.text_files import STANDARD_INPUT, csv_rows, json_rows, text_lines

JSON_WINDOW = 1 << 20  # characters of a .json file that are read at once, at least
PARQUET_ROWS = 1 << 14


def prompt_cells(path: Path, column: str | None = None) -> Iterator[Any]:
    """Yield the prompts of a .txt, .jsonl, .csv, .tsv, COCO captions .json or .parquet file, or the captions
    of a folder of pictures.

    "-" is standard input. It has one prompt a line, as have pipes without an ending. `column`: the name of
    the prompt column (`d2g.data.columns`). Raises SettingError for a column of a format without columns, and
    UserError for other formats, text that is not UTF-8, damage, a missing column and an error of the disk.
    """
    if path.is_dir():
        yield from _folder(path, column)
        return
    suffix = path.suffix.lower()
    if path == STANDARD_INPUT or path.is_fifo():
        suffix = suffix if suffix in READERS else ".txt"
    if suffix not in READERS:
        known = " ".join(READERS)
        raise UserError(
            f"{path}: prompt files end in {known}, got {path.suffix!r}; convert it to one of these, or give "
            "a folder of captioned pictures"
        )
    try:
        yield from READERS[suffix](path, column)
    except OSError as error:
        raise UserError(
            f"cannot read prompts from {path}: {error.strerror or error}; check --prompts"
        ) from error


def _folder(folder: Path, column: str | None) -> Iterator[Any]:
    """The captions of a folder of pictures: from its metadata file, NAME.txt or the PNG itself, else from the
    names of class folders; or those of its parquet files."""
    listing = list_folder(folder)
    if not listing.pictures and listing.tables:
        listing.log_left_out(listing.tables)
        for table in listing.tables:
            yield from _parquet(table, column)
        return
    own = Captions(listing, column)
    own.require_column(column)
    listing.log_left_out(own.files)
    own.log_several()
    captions: Mapping[Path, str] = own or class_captions(folder, listing.pictures)
    without = 0
    for picture in listing.pictures:
        caption = captions[picture] if picture in captions else picture_prompt(png_text(picture))
        if caption:
            yield caption
        else:
            without += 1
    if without:
        log_once(f"{folder}: {without} of {len(listing.pictures)} pictures have no caption, left out")


def prompt_text(source: Path | str, cell: Any) -> str:
    """The stripped text of a cell, "" for an empty one. Raises UserError for a cell that is no text."""
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise UserError(f"{source}: prompts must be text, got {str(cell)[:40]!r} ({type(cell).__name__})")
    if not is_clean_text(cell):
        raise UserError(
            f"{source}: prompt {cell[:40]!r} holds a NUL, half a surrogate pair or bytes that are not UTF-8; "
            "correct or remove it"
        )
    return cell.strip()


def is_clean_text(text: str) -> bool:
    """Whether a text can be stored as UTF-8 without a NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _txt(path: Path, column: str | None) -> Iterator[str]:
    if column is not None:
        raise SettingError(
            f"column is {column!r}, but {path} has one prompt a line and no columns; leave it out, or give a "
            "file with that column"
        )
    return text_lines(path)


def _jsonl(path: Path, column: str | None) -> Iterator[Any]:
    for number, row in json_rows(path):
        yield row[caption_column(f"{path} line {number}", row, column)]


def _csv(path: Path, column: str | None) -> Iterator[Any]:
    names, rows = csv_rows(path, (*CAPTION_COLUMNS, *([column] if column else [])))
    index = names.index(caption_column(path, names, column))
    for _, row in rows:
        yield row[index] if len(row) > index else None


def _tsv(path: Path, column: str | None) -> Iterator[str]:
    """Cells are not parsed as CSV: PartiPrompts.tsv has prompts that begin with a single quotation mark. Only
    a cell that is quoted completely, as pandas writes it, is unquoted."""
    rows = (line.rstrip("\r\n").split("\t") for line in text_lines(path))
    names = [name.strip() for name in next(rows, [])]
    index = names.index(caption_column(path, names, column))
    for number, row in enumerate(rows, 2):
        if any(row):
            if len(row) <= index:
                text = f"{path} line {number} has {len(row)} cells, expected {len(names)}"
                raise UserError(f"{text}; remove line breaks inside cells, or use .csv")
            yield _unquoted(row[index])


def _unquoted(cell: str) -> str:
    inner = cell[1:-1].replace('""', "")
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner
    return cell[1:-1].replace('""', '"') if quoted else cell


def _parquet(path: Path, column: str | None) -> Iterator[Any]:
    schema = open_table(path).schema_arrow
    name = caption_column(path, schema.names, column)
    if (kind := schema.field(name).type).num_fields:
        raise UserError(
            f"{path}: column {name} holds {kind}, expected text; write the table again with one caption in a "
            "row, or give another column"
        )
    table = open_table(path, dictionaries=[name])
    check_expansion(path, table, [name])
    try:
        for batch in table.iter_batches(PARQUET_ROWS, columns=[name]):
            # One by one: a table may repeat one long text many times.
            for cell in batch.column(0):
                yield cell.as_py()
    except parquet_errors() as error:
        raise unreadable_table(path, error) from error


def _coco(path: Path, column: str | None) -> Iterator[Any]:
    """The captions of {"annotations": [{"caption": ...}]}, parsed one by one."""
    # The file must be a JSON object with at least one key.
    window, keys = _Window(path), []
    if window.peek() != "{":
        raise _no_coco(path, type(window.value()).__name__)
    window.take("{")
    if window.peek() == "}":
        raise _no_coco(path, "no keys")
    # Parse key by key. Lists are parsed element by element, because only they are long.
    while True:
        if window.peek() != '"':
            raise window.broken("Expecting property name enclosed in double quotes", window.at)
        keys.append(window.value())
        window.take(":")
        if window.peek() == "[":
            for element in window.elements():
                if keys[-1] == "annotations":
                    yield _caption(path, element, column)
        else:
            # A value that is not a list is parsed and dropped, unless it should have been the captions.
            value = window.value()
            if keys[-1] == "annotations":
                raise _no_coco(path, f"annotations that are {type(value).__name__}")
        if window.take(",}") == "}":
            break
    # Nothing may follow the object, and the captions must have occurred in it.
    if window.peek():
        raise window.broken("Extra data", window.at)
    if "annotations" not in keys:
        raise _no_coco(path, ", ".join(sorted(keys)))


def _caption(path: Path, annotation: Any, column: str | None) -> Any:
    name = find_caption_column(annotation, column) if isinstance(annotation, dict) else None
    if name is None:
        keys = isinstance(annotation, dict) and ", ".join(sorted(annotation))
        raise _no_coco(path, f"an annotation with {keys or 'no keys'}")
    return annotation[name]


def _no_coco(path: Path, content: str) -> UserError:
    expected = 'COCO captions, {"annotations": [{"caption": "..."}]}'
    return UserError(f"{path}: expected {expected}, found {content}; use .jsonl for other JSON")


class _Window:
    """Parses the values of a JSON file one by one; holds at most about twice the longest value in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.text, self.at, self.passed = path, "", 0, 0
        self.chunks = self._chunks()
        self.decode = json.JSONDecoder().raw_decode

    def _chunks(self) -> Iterator[str]:
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                # Double the window each time: a long value costs at most twice its length.
                while chunk := file.read(max(JSON_WINDOW, len(self.text) - self.at)):
                    yield chunk
        except UnicodeDecodeError:
            yield from text_lines(self.path)  # says where, unless the file is UTF-16, which it reads

    def _more(self) -> bool:
        if chunk := next(self.chunks, ""):
            self.passed += self.at
            self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)

    def broken(self, message: str, at: int) -> UserError:
        where = f"character {self.passed + at}"
        return UserError(f"{self.path}: the file is not JSON ({message}: {where}); correct or remove it")

    def peek(self) -> str:
        """The next non-space character without consuming it; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, expected: str) -> str:
        """Consume one of the characters `expected` and return it."""
        character = self.peek()
        if not character or character not in expected:
            raise self.broken(f"Expecting {' or '.join(repr(e) for e in expected)}", self.at)
        self.at += 1
        return character

    def value(self) -> Any:
        """Parse the next value."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._more():
                    continue
                raise self.broken(error.msg, error.pos) from error
            except RecursionError as error:
                raise self.broken("nested too deeply", self.at) from error
            if end < len(self.text) or not self._more():  # a number at the end of the window may continue
                self.at = end
                return value

    def elements(self) -> Iterator[Any]:
        """Parse the elements of the next list one by one."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return


READERS: dict[str, Callable[[Path, str | None], Iterator[Any]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _coco,
    ".parquet": _parquet,
}
