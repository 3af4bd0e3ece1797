"""The names of the columns that hold captions or prompts, in every kind of file."""

from collections.abc import Iterable
from pathlib import Path

from d2g.core.config import nearest
from d2g.core.errors import SettingError, UserError
from d2g.core.logs import log_once

CAPTION_COLUMNS = ("prompt", "caption", "text", "TEXT")
"""Names of the caption column, in order of preference; other cases of them come after these."""


def find_caption_column(names: Iterable[str], column: str | None = None) -> str | None:
    """The column of captions among `names`: `column` itself, else the first of CAPTION_COLUMNS, else None."""
    names = list(names)
    if column is not None:
        return column if column in names else None
    exact = [name for name in CAPTION_COLUMNS if name in names]
    other_case = [name for key in CAPTION_COLUMNS for name in names if name.casefold() == key]
    return next(iter(exact + other_case), None)


def require_prompts(column: str | None, prompts: str | None) -> None:
    """Raise SettingError for a `column` without a file or folder of prompts."""
    if column is not None and not prompts:
        raise SettingError(
            f"column is {column!r}, but there is no prompt file to have it; leave it out, or give --prompts"
        )


def caption_column(
    where: Path | str, names: Iterable[str], column: str | None = None, setting: str = "column"
) -> str:
    """As `find_caption_column`; says so if there are several candidates.

    `where`: the file, for messages. `setting`: the setting that names the column. Raises UserError if there
    is none.
    """
    names = list(names)
    name = find_caption_column(names, column)
    if name is None:
        expected = column if column is not None else f"{', '.join(CAPTION_COLUMNS[:-1])} or TEXT"
        hint = nearest(column, names) if column is not None and names else ""
        raise UserError(
            f"{where}: expected a column named {expected}, found {', '.join(names) or 'none'}{hint}; "
            f"rename one, or give --set {setting}=NAME"
        )
    others = [other for other in names if other != name and other.casefold() in CAPTION_COLUMNS]
    if others and column is None:
        log_once(f"{where}: captions are read from {name}, not from {', '.join(others)}")
    return name
