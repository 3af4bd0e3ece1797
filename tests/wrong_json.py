"""JSON objects with a wrong value at any depth."""

import random
from typing import Any

WRONG: list[Any] = [
    *(None, True, -1, 0, 2.5, 1e308, 10**400, "", "x" * 300, "\ud800", "\x1b[2J"),
    *([], [1], [[]], {}, {"a": {}}, float("nan"), float("inf")),
]


def changed(rng: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    """The object with one value replaced or removed, at any depth."""
    value = dict(value)
    key = rng.choice(list(value))
    if isinstance(value[key], dict) and value[key] and rng.random() < 0.6:
        value[key] = changed(rng, value[key])
    elif rng.random() < 0.15:
        del value[key]
    else:
        value[key] = rng.choice(WRONG)
    return value
