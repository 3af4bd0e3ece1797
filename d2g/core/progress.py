"""The type of progress callbacks, which loops of the library call."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""`progress(label, done, total)`: cheap and never raises. A total of 0 is unknown."""


def quiet(label: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""
