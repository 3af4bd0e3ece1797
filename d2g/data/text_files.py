"""Text that people wrote: UTF-8 with or without a byte order mark, UTF-16 with one, any line ends."""

import codecs
import csv
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from d2g.core.errors import SettingError, UserError
from d2g.core.json_files import parse_json
from d2g.core.logs import logger
from d2g.core.machine_errors import raise_machine_error

STANDARD_INPUT = Path("-")
_AFTER_LONE_CR = re.compile(r"(?<=\r)(?!\n)")
_DELIMITERS = ",;\t"


def text_lines(path: Path) -> Iterator[str]:
    r"""Yield the lines of a text file with their ends: \n, \r\n or \r, but not U+2028. "-" is standard input.

    Raises UserError for text that is not UTF-8, naming line and byte; and OSError.
    """
    with _open(path) as file:
        first = file.readline()
        if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            yield from _utf16_lines(path, first + file.read())
            return
        offset = 0
        for number, line in enumerate(chain([first], file), 1):  # no multi-byte character contains a newline
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                where = f"line {number}, byte offset {offset + error.start} (0x{line[error.start]:02x})"
                raise UserError(
                    f"{path} is not UTF-8: {where}; convert it, for example with iconv"
                ) from error
            offset += len(line)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if "\r" in text[:-2]:
                yield from filter(None, _AFTER_LONE_CR.split(text))
            elif text:
                yield text


def _open(path: Path) -> AbstractContextManager[BinaryIO]:
    if path != STANDARD_INPUT:
        return path.open("rb")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SettingError(
            "only one process can read standard input, and torchrun has started several; give a file, not -"
        )
    if sys.stdin is None:
        raise SettingError("standard input is closed; give a file, not -")
    if sys.stdin.isatty():
        logger.info("reading the terminal, one line each; end with Ctrl-D")
    return nullcontext(sys.stdin.buffer)


def _utf16_lines(path: Path, data: bytes) -> Iterator[str]:
    try:
        text = data.decode("utf-16")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} begins as UTF-16 and is none at byte offset {error.start}; save it as UTF-8"
        ) from error
    yield from io.StringIO(text, newline="")


def read_text(path: Path) -> str:
    """The whole text of a small file. Raises UserError as `text_lines` does, and for errors of the disk."""
    try:
        return "".join(text_lines(path))
    except OSError as error:
        raise_machine_error(error)
        raise UserError(f"{path} cannot be read: {error.strerror or error}; restore it") from error


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a file of JSON lines. Blank lines are skipped.

    Raises UserError for a line that is no JSON object, or that is nested too deeply; and OSError.
    """
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error}); correct or remove it") from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path} line {number}: expected an object with named columns, found {type(row).__name__}; "
                "correct or remove it"
            )
        yield number, row


def csv_rows(path: Path, wanted: Iterable[str]) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """(names of the columns, rows as (line number, cells)) of a .csv file.

    The delimiter is the first of comma, semicolon and tab that gives one of the `wanted` columns, else the
    comma. Raises UserError for text that is no CSV and for rows longer than the first line; and OSError.
    """
    lines = text_lines(path)
    head = next(lines, "")
    names = {name.casefold() for name in wanted}
    delimiter = next((d for d in _DELIMITERS if names & set(_cells(path, head.casefold(), d))), ",")
    rows = _checked_rows(path, chain([head], lines), delimiter)
    _, head_cells = next(rows, (1, []))
    return [cell.strip() for cell in head_cells], _not_longer(path, rows, len(head_cells))


def _not_longer(
    path: Path, rows: Iterator[tuple[int, list[str]]], columns: int
) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows. Raises UserError for text beyond the columns: an unquoted comma cuts a caption."""
    for number, cells in rows:
        if any(cells[columns:]):
            raise UserError(
                f"{path} line {number} has {len(cells)} cells; expected {columns}, as in the first line; put "
                "text that holds the delimiter in quotes"
            )
        yield number, cells


def _cells(path: Path, line: str, delimiter: str) -> list[str]:
    _, cells = next(_checked_rows(path, [line], delimiter), (1, []))
    return [cell.strip() for cell in cells]


def _checked_rows(path: Path, lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the last line, cells) of each row. Raises UserError for text that is no CSV."""
    taken: list[str] = []  # the lines of a row

    def take() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    rows = csv.reader(take(), delimiter=delimiter)
    try:
        for row in rows:
            if len(taken) > 1:
                _require_closed_quotes(path, taken, delimiter, rows.line_num)
            yield rows.line_num, row
            taken.clear()
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num}: {error}; correct the file") from error


def _require_closed_quotes(path: Path, lines: list[str], delimiter: str, last: int) -> None:
    """Raise UserError unless a row of several lines is strictly valid CSV.

    A quotation mark that is not closed makes one cell of all lines up to the next mark.
    """
    try:
        list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{path} lines {last - len(lines) + 1} to {last}: a quotation mark is not closed where its cell "
            'ends; close it, or write "" for one that is text'
        ) from error
