"""Extension of griffe for the API page: examples of docstrings become fenced code."""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^>>> .*\n?(?:(?!\n).+\n?)*", re.MULTILINE)
"""A block of lines that starts with a prompt and ends at an empty line."""


class FencedDoctests(Extension):
    """Put ``` around each example."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(
                lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", obj.docstring.value
            )
