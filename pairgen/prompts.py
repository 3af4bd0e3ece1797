"""Prompt files of every usual kind -> a clean list of different prompts in file order."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from core.config import digest
from core.errors import UserError

COLUMNS = ("prompt", "Prompt", "caption")
BOM = b"\xef\xbb\xbf"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a .txt, .jsonl, .csv, .tsv, COCO captions .json or .parquet file.

    Stripped; blank lines dropped; exact duplicates dropped, the first stays. A prompt's position in the list
    is its id. Raises UserError for a file that is missing, empty, not UTF-8, without a prompt column, damaged
    or of another kind.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        known = " ".join(READERS)
        raise UserError(
            f"{path}: prompt files end in {known}, got {path.suffix!r}; convert it to one of these"
        )
    try:
        texts = READERS[path.suffix.lower()](path)
        prompts = list(dict.fromkeys(text for text in (_clean(path, text) for text in texts) if text))
    except OSError as error:
        raise UserError(
            f"cannot read prompts from {path}: {error.strerror or error}; check --prompts"
        ) from error
    if not prompts:
        raise UserError(f"{path} holds no prompts, expected at least one; check --prompts")
    return prompts


def prompts_sha256(prompts: list[str]) -> str:
    """sha256 of the list's compact JSON: equal when the same prompts stand in the same order."""
    return digest(prompts)


def _clean(path: Path, text: Any) -> str:
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{path}: prompts must be text, got {str(text)[:40]!r} ({type(text).__name__})")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(
            f"{path}: prompt {text[:40]!r} holds a NUL or half a surrogate pair; mend or remove it"
        )
    return text.strip()


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        offset = error.start + (len(BOM) if data.startswith(BOM) else 0)
        line = data.count(b"\n", 0, offset) + 1
        where = f"line {line}, byte offset {offset} (0x{data[offset]:02x})"
        raise UserError(f"{path} is not UTF-8: {where}; convert it, for example with iconv") from error


def _txt(path: Path) -> list[str]:
    return _decode(path).split("\n")  # splitlines() would also split at form feeds and U+2028


def _jsonl(path: Path) -> Iterable[Any]:
    for number, line in enumerate(_decode(path).split("\n"), 1):
        if line.strip():
            row = _json(path, line, f"line {number}")
            if not isinstance(row, dict) or "prompt" not in row:
                found = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
                raise UserError(
                    f'{path} line {number}: expected {{"prompt": "..."}}, found {found or "no keys"}'
                )
            yield row["prompt"]


def _coco(path: Path) -> Iterable[Any]:
    content = _json(path, _decode(path), "the file")
    try:
        return [annotation["caption"] for annotation in content["annotations"]]
    except (KeyError, TypeError) as error:
        found = ", ".join(sorted(content)) if isinstance(content, dict) else type(content).__name__
        expected = 'COCO captions, {"annotations": [{"caption": "..."}]}'
        raise UserError(f"{path}: expected {expected}, found {found}; use .jsonl for other JSON") from error


def _json(path: Path, text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: {what} is not JSON ({error}); mend or remove it") from error


def _csv(path: Path) -> Iterable[Any]:
    rows = csv.DictReader(io.StringIO(_decode(path), newline=""))
    try:
        column = _column(path, rows.fieldnames or [])
        return [row[column] for row in rows]
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num}: {error}; mend the file") from error


def _tsv(path: Path) -> Iterable[str]:
    """Cells are taken as they are, as PartiPrompts.tsv has prompts that begin with a bare quotation mark;
    only a cell quoted from end to end, as pandas writes them, is unquoted."""
    rows = [line.rstrip("\r").split("\t") for line in _decode(path).split("\n")]
    column = rows[0].index(_column(path, rows[0]))
    for number, cells in enumerate(rows[1:], 2):
        if any(cells):
            if len(cells) <= column:
                text = f"{path} line {number} has {len(cells)} cells, expected {len(rows[0])}"
                raise UserError(f"{text}; remove line breaks inside cells, or use .csv")
            yield _unquoted(cells[column])


def _unquoted(cell: str) -> str:
    inner = cell[1:-1].replace('""', "")
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner
    return cell[1:-1].replace('""', '"') if quoted else cell


def _parquet(path: Path) -> Iterable[Any]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        file = parquet.ParquetFile(path)
        column = _column(path, file.schema_arrow.names)
        return list(file.read(columns=[column]).column(column).to_pylist())
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no readable parquet file ({error}); check --prompts") from error


def _column(path: Path, found: Iterable[str]) -> str:
    names = list(found)
    for column in COLUMNS:
        if column in names:
            return column
    expected = ", ".join(COLUMNS)
    raise UserError(
        f"{path}: expected a column named {expected}; found {', '.join(names) or 'none'}; rename one"
    )


READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _coco,
    ".parquet": _parquet,
}
