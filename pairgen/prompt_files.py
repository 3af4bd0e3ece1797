"""Reading prompt files of all common formats as streams: no file is loaded completely."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from d2g.core.errors import UserError

PROMPT_COLUMNS = ("prompt", "Prompt", "caption")
JSON_WINDOW = 1 << 20  # characters of a .json file that are read at once, at least
PARQUET_ROWS = 1 << 14


def cells(path: Path) -> Iterator[Any]:
    """Yield the prompt column of a .txt, .jsonl, .csv, .tsv, COCO captions .json or .parquet file.

    Raises UserError for other formats, text that is not UTF-8, damage and a missing column; and OSError.
    """
    if path.suffix.lower() not in READERS:
        known = " ".join(READERS)
        raise UserError(
            f"{path}: prompt files end in {known}, got {path.suffix!r}; convert it to one of these"
        )
    yield from READERS[path.suffix.lower()](path)


def _lines(path: Path, newline: str = "\n") -> Iterator[str]:
    """Lines with their line ends. `newline` as in open(): "\\n" splits at newlines only."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield from file
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def _not_utf8(path: Path) -> UserError:
    # Read the file again as bytes to locate the first invalid byte.
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):  # no multi-byte character contains a newline byte
            try:
                line.decode()
            except UnicodeDecodeError as error:
                where = f"line {number}, byte offset {offset + error.start} (0x{line[error.start]:02x})"
                return UserError(f"{path} is not UTF-8: {where}; convert it, for example with iconv")
            offset += len(line)
    return UserError(f"{path} changed while it was read; run the same command again")


def _jsonl(path: Path) -> Iterator[Any]:
    # One object per line; blank lines are allowed.
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}: line {number} is not JSON ({error}); correct or remove it"
                ) from error
            if not isinstance(row, dict) or "prompt" not in row:
                keys = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
                raise UserError(
                    f'{path} line {number}: expected {{"prompt": "..."}}, found {keys or "no keys"}'
                )
            yield row["prompt"]


def _csv(path: Path) -> Iterator[Any]:
    rows = csv.reader(_lines(path, newline=""))
    try:
        names = next(rows, [])
        column = names.index(_column(path, names))
        for row in rows:
            yield row[column] if len(row) > column else None
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num}: {error}; correct the file") from error


def _tsv(path: Path) -> Iterator[str]:
    """Cells are not parsed as CSV: PartiPrompts.tsv has prompts that begin with a single quotation mark. Only
    a cell that is quoted completely, as pandas writes it, is unquoted."""
    # Split at tabs only, and require the prompt's cell in every row that is not empty.
    rows = (line.rstrip("\r\n").split("\t") for line in _lines(path))
    names = next(rows, [])
    column = names.index(_column(path, names))
    for number, row in enumerate(rows, 2):
        if any(row):
            if len(row) <= column:
                text = f"{path} line {number} has {len(row)} cells, expected {len(names)}"
                raise UserError(f"{text}; remove line breaks inside cells, or use .csv")
            yield _unquoted(row[column])


def _unquoted(cell: str) -> str:
    inner = cell[1:-1].replace('""', "")
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner
    return cell[1:-1].replace('""', '"') if quoted else cell


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        with parquet.ParquetFile(path) as file:
            column = _column(path, file.schema_arrow.names)
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file ({error}); check --prompts") from error


def _column(path: Path, columns: Iterable[str]) -> str:
    names = list(columns)
    for column in PROMPT_COLUMNS:
        if column in names:
            return column
    expected = ", ".join(PROMPT_COLUMNS)
    raise UserError(
        f"{path}: expected a column named {expected}; found {', '.join(names) or 'none'}; rename one"
    )


def _coco(path: Path) -> Iterator[Any]:
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
                    yield _caption(path, element)
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


def _caption(path: Path, annotation: Any) -> Any:
    if not isinstance(annotation, dict) or "caption" not in annotation:
        keys = isinstance(annotation, dict) and ", ".join(sorted(annotation))
        raise _no_coco(path, f"an annotation with {keys or 'no keys'}")
    return annotation["caption"]


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
        except UnicodeDecodeError as error:
            raise _not_utf8(self.path) from error

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


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".txt": _lines,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _coco,
    ".parquet": _parquet,
}
