"""Writing to stdout and stderr: styled tables on a terminal, plain and complete lines anywhere else."""

import io
import sys
from collections.abc import Sequence

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
        table = Table(title=Text(title), show_header=bool(head))
        for number in range(max(map(len, [head, *rows]), default=0)):
            table.add_column(Text(head[number]) if head else "", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # as Text, [brackets] and :names: stay what they are
        Console().print(table)
        return
    lines = [list(row) for row in ([head, *rows] if head else rows)]
    widths = [max(len(line[number]) for line in lines) for number in range(max(map(len, lines), default=0))]
    print(title)
    for line in lines:
        cells = (one_line(cell).ljust(width) for cell, width in zip(line, widths, strict=False))
        print("  ".join(cells).rstrip())
    sys.stdout.flush()


def one_line(text: str) -> str:
    """The text without line ends, which would break a row of a table."""
    return " ".join(text.splitlines())
