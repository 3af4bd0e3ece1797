"""How library loops report progress without knowing who listens."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""`progress(label, done, total)`: called from loops, cheap, never raises."""


def quiet(label: str, done: int, total: int) -> None:
    """The progress of a library call that nobody watches."""
