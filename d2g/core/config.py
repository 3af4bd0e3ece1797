"""Frozen dataclass configs: dotted overrides, JSON, digests. Errors name the nearest right setting."""

import difflib
import hashlib
import json
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from d2g.core.errors import SettingError, UserError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint `; did you mean 'x'?`, or the known names when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`, or a SettingError that names the nearest key."""
    if name not in table:
        raise SettingError(f"unknown {what} {name!r}{nearest(name, table)}")
    return table[name]


def override(config: T, settings: Sequence[str]) -> T:
    """Apply `a.b=value` strings to a frozen dataclass. Values are JSON, or bare words for strings.

    A group is rebuilt once, with all that is set in it: two settings may need each other. Raises SettingError
    for an unknown name (with the nearest one) or a value of another type.
    """
    values: dict[tuple[str, ...], Any] = {}
    for setting in settings:
        path, found, text = setting.partition("=")
        if not found:
            raise SettingError(f"--set takes name=value, got {setting!r}; write for example --set seed=1")
        names = tuple(path.strip().split("."))
        values[names] = _value(config, names, text.strip(), path.strip())
    rebuilt: T = _rebuilt(config, values)
    return rebuilt


def _value(config: Any, path: tuple[str, ...], text: str, full: str) -> Any:
    """What `text` says for the setting at `path`."""
    hints = get_type_hints(type(config))
    if path[0] not in hints:
        hint = nearest(path[0], hints)
        raise SettingError(f"unknown setting {path[0]!r} in {type(config).__name__}{hint}")
    current = getattr(config, path[0])
    if len(path) > 1:
        if not is_dataclass(current):
            raise SettingError(f"setting {full!r}: {path[0]!r} is a single value and has no {path[1]!r}")
        return _value(current, path[1:], text, full)
    if is_dataclass(current):
        names = ", ".join(f.name for f in fields(current))
        raise SettingError(f"setting {full!r} is a group; set one of its members: {names}")
    return _parse(text, hints[path[0]], full)


def _rebuilt(config: Any, values: Mapping[tuple[str, ...], Any]) -> Any:
    changes: dict[str, Any] = {path[0]: value for path, value in values.items() if len(path) == 1}
    for group in dict.fromkeys(path[0] for path in values if len(path) > 1):
        inside = {path[1:]: v for path, v in values.items() if path[0] == group}
        changes[group] = _rebuilt(getattr(config, group), inside)
    return replace(config, **changes) if changes else config


def _parse(text: str, hint: Any, full: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:  # a bare word, or a number of more digits than Python reads
        value = text
    return _convert(value, hint, full, text)


def _convert(value: Any, hint: Any, full: str, text: str) -> Any:
    """`value` as the type `hint`, or a SettingError. int -> float is the one silent widening."""
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise SettingError(f"setting {full!r} is a group of {hint.__name__}, got {text!r}")
        return from_json(hint, value)
    if origin is Literal:
        if value not in args:
            raise SettingError(f"setting {full!r} is {text!r}{nearest(str(value), [str(a) for a in args])}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), full, text)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise SettingError(f"setting {full!r} takes a JSON object, got {text!r}")
        return dict(value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise SettingError(f"setting {full!r} takes a JSON list, got {text!r}")
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        hints = [inner] * len(value) if inner is not None else list(args)
        if len(hints) != len(value):
            raise SettingError(f"setting {full!r} takes {len(hints)} values, got {text!r}")
        return tuple(_convert(v, h, full, text) for v, h in zip(value, hints, strict=True))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) <= sys.float_info.max:  # NaN is not
            return float(value)
        raise SettingError(f"setting {full!r} is {text!r}; expected a finite number")
    if hint is str and not isinstance(value, str):
        value = text
    if (isinstance(value, bool) and hint is not bool) or not isinstance(value, hint):
        raise SettingError(f"setting {full!r} takes {hint.__name__}, got {text!r}")
    return value


def to_json(config: Any) -> dict[str, Any]:
    """A JSON-able dict of a config dataclass."""
    result: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return result


def from_json(cls: type[T], data: Mapping[str, Any]) -> T:
    """The inverse of `to_json`. Unknown keys are SettingErrors; missing keys take their defaults."""
    hints = get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            raise SettingError(f"unknown setting {key!r} in {cls.__name__}{nearest(key, hints)}")
        values[key] = _convert(value, hints[key], key, json.dumps(value))
    return cls(**values)


WRITTEN_ANEW = "copy it from another --out, where the same command as before writes it at its start"
"""What to do about a config.json of a run that is damaged or gone."""


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file that we wrote. Raises UserError, ending in `remedy`, where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (expected a JSON object, got {str(found)[:40]!r}); {remedy}")
    return found


def digest(data: Any) -> str:
    """sha256 of the canonical JSON of `data`."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differing(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names whose values differ between two JSON-able dicts, as `name (a -> b)`, sorted."""
    names: list[str] = []
    for key in sorted(set(a) | set(b)):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            names += differing(left, right, f"{prefix}{key}.")
        elif left != right:
            names.append(f"{prefix}{key} ({left!r} -> {right!r})")
    return names
