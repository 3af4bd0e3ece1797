"""Errors that a user can act on. The text of the exception is the complete message, in one line.

UserError             exit 1   the job cannot continue; the text says what, got, expected, what to do
├── SettingError      exit 2   a wrong option or setting; the text names the nearest right one
└── Interrupted       exit 130 stopped by the user; the text says what is safe on disk
"""

from collections.abc import Iterator
from contextlib import contextmanager


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


class UserError(Exception):
    """An error that the user can fix. `str(error)` is one line that needs no context."""

    exit_code = 1


class SettingError(UserError):
    """A setting with an unknown name or an impossible value."""

    exit_code = 2


class LostFolder(UserError):
    """Another process owns the output folder now: this one was suspended too long and may not write."""


class Interrupted(UserError):
    """Ctrl-C or SIGTERM, raised after everything worth keeping has been written to disk."""

    exit_code = 130


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Put the name of a setting in front of a plain UserError about its value."""
    try:
        yield
    except UserError as error:
        if type(error) is not UserError:
            raise
        raise UserError(f"{setting}: {error}") from error
