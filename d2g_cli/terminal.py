"""Writing to stdout and stderr: styled tables on a terminal, plain and complete lines anywhere else."""

import io
import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text


def prepare_streams() -> None:
    """Make every text printable: characters that the encoding of a stream lacks become escapes (\\u00e9)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_terminal(stream: object) -> bool:
    """Whether a stream is a terminal, whatever the environment says about colors."""
    return bool(stream is not None and stream.isatty())  # type: ignore[attr-defined]


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. `head`: the names of the columns; empty for none.

    On a terminal, long cells are folded. Elsewhere each row is one line, aligned and never cut.
    """
    if is_terminal(sys.stdout):
        table = Table(title=Text(printable(title)), show_header=bool(head))
        for number in range(max(map(len, [head, *rows]), default=0)):
            table.add_column(Text(printable(head[number])) if head else "", overflow="fold")
        for row in rows:
            # As Text, [brackets] and :names: stay what they are.
            table.add_row(*(Text(printable(cell)) for cell in row))
        Console().print(table)
        return
    lines = [list(row) for row in ([head, *rows] if head else rows)]
    widths = [max(len(line[number]) for line in lines) for number in range(max(map(len, lines), default=0))]
    print_line(title)
    for line in lines:
        cells = (one_line(cell).ljust(width) for cell, width in zip(line, widths, strict=False))
        print_line("  ".join(cells).rstrip())
    if sys.stdout is not None:
        sys.stdout.flush()


def one_line(text: str) -> str:
    """The text without line ends, which would break a row of a table, and as `printable` makes it."""
    return printable(" ".join(text.splitlines()))


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print text that may hold names, prompts or facts from files, as one line; to stdout by default."""
    print(one_line(text), file=file, flush=True)


def printable(text: str) -> str:
    r"""The text with \x1b and the like in place of characters that control a terminal or turn text around.

    Everything that a command prints and that may come from outside passes through here.
    """
    return "".join(f"\\x{ord(c):02x}" if _controls(c) else c for c in text)


def _controls(character: str) -> bool:
    return (
        character not in "\n\t"
        and unicodedata.category(character) in ("Cc", "Cf")
        and (character not in _JOINERS)
    )


_JOINERS = "\u00ad\u200c\u200d\u2060\ufeff"
"""Format characters that scripts and emoji need; they change no other text."""
