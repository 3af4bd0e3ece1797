"""Configs as frozen dataclasses: documented fields, dotted overrides, JSON, digests.

Errors name the full path of a setting (`gan.optim.lr`) and, for an unknown name, the nearest right one.
"""

import difflib
import hashlib
import json
import math
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from d2g.core.errors import SettingError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint `; did you mean 'x'?`, or a list of the known names when none is similar."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`. Raises SettingError naming the nearest key; `what` says what kind of name it is."""
    if name not in table:
        raise SettingError(f"unknown {what} {name!r}{nearest(name, table)}")
    return table[name]


class Presets(dict[str, T]):
    """Configs by name, each with a line for `--help`: `Presets({"small": ("Minutes on a CPU", config)})`."""

    def __init__(self, entries: Mapping[str, tuple[str, T]]) -> None:
        super().__init__({name: config for name, (_, config) in entries.items()})
        self.about = {name: about for name, (about, _) in entries.items()}


def setting(default: T, meaning: str, *, source: str = "", recipe: bool = False) -> T:
    """A config field with its documentation. `d2g settings` and docs/settings are generated from it.

    default: the field's default value, an immutable one. meaning: what the setting does, with its unit.
    source: where the default comes from (a table of the paper, an equation, a section of docs/method.md).
    recipe: whether the setting is part of the published recipe and is listed first.
    """
    documentation = {"meaning": meaning, "source": source, "recipe": recipe}
    value: T = field(default=default, metadata=documentation)
    return value


def require(config: Any, **rules: tuple[bool, str]) -> None:
    """Raise SettingError for the first field of `config` whose rule `(holds, expected value)` does not hold.

    The message begins with the field's own name: `override`, `with_values` and `from_json` put the path of
    the config in front of it.
    """
    for name, (holds, expected) in rules.items():
        if not holds:
            raise SettingError(f"{name} is {getattr(config, name)!r}; expected {expected}")


def check_values(config: Any) -> None:
    """Raise SettingError for a Literal field with another value than its choices, or for a float that is
    not finite.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        # An optional Literal holds its choices one level deeper, in the union.
        optional = type(None) in get_args(hint)
        for choices in get_args(hint) if optional and value is not None else (hint,):
            if get_origin(choices) is Literal and value not in get_args(choices):
                raise SettingError(f"{name} is {value!r}{nearest(str(value), map(str, get_args(choices)))}")
        # NaN and infinity parse as numbers, but no setting has a use for them.
        for part in value if isinstance(value, tuple) else (value,):
            finite = not isinstance(part, float) or math.isfinite(part)
            require(config, **{name: (finite, "finite numbers")})


def override(config: T, settings: Sequence[str]) -> T:
    """Apply `a.b=value` strings to a frozen dataclass. Values are JSON, or bare words for strings.

    Each group is rebuilt once, with all its new values, because two settings may need each other. Raises
    SettingError for an unknown name (with the nearest one) or a value of another type.
    """
    return with_values(config, parse_assignments(config, settings))


def parse_assignments(config: Any, settings: Sequence[str]) -> dict[str, Any]:
    """The values of `a.b=value` strings by dotted name, with the types of the config's fields."""
    values: dict[str, Any] = {}
    for assignment in settings:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise SettingError(f"--set takes name=value, got {assignment!r}; write for example --set seed=1")
        values[path.strip()] = _parse(text.strip(), _type_of(config, path.strip()), path.strip())
    return values


def with_values(config: T, values: Mapping[str, Any]) -> T:
    """The config with new values by dotted name, such as `{"gan.optim.lr": 1e-5}`. Raises SettingError for a
    value that the config refuses, with the full path of the setting.
    """
    rebuilt: T = _rebuild(config, {tuple(path.split(".")): value for path, value in values.items()}, "")
    return rebuilt


def _type_of(config: Any, full: str) -> Any:
    """The declared type of the setting with the dotted name `full`."""
    *groups, last = full.split(".")
    # Descend through the groups; every name on the way must exist.
    for depth, group in enumerate(groups):
        _check_known(config, group, ".".join(groups[:depth]))
        config = getattr(config, group)
        if not is_dataclass(config):
            member = full.split(".")[depth + 1]
            raise SettingError(f"setting {full!r}: {group!r} is a single value and has no {member!r}")
    # The last name must be a single value of its group.
    _check_known(config, last, ".".join(groups))
    if is_dataclass(value := getattr(config, last)):
        members = ", ".join(f.name for f in fields(value))
        raise SettingError(f"setting {full!r} is a group; set one of its members: {members}")
    return get_type_hints(type(config))[last]


def _check_known(config: Any, name: str, path: str) -> None:
    """Raise SettingError if the config, or config class, at `path` has no field `name`."""
    cls = config if isinstance(config, type) else type(config)
    known = [_join(path, f.name) for f in fields(cls)]
    if (full := _join(path, name)) not in known:
        raise SettingError(f"unknown setting {full!r} in {cls.__name__}{nearest(full, known)}")


def _rebuild(config: Any, values: Mapping[tuple[str, ...], Any], path: str) -> Any:
    """The config at `path` with new values by relative path."""
    changes: dict[str, Any] = {names[0]: value for names, value in values.items() if len(names) == 1}
    # Rebuild every nested group once, with all its new values together.
    for group in dict.fromkeys(names[0] for names in values if len(names) > 1):
        members = {names[1:]: value for names, value in values.items() if names[0] == group}
        # The group may be given as a whole, too: then that one is changed.
        current = changes.get(group, getattr(config, group))
        changes[group] = _rebuild(current, members, _join(path, group))
    with _errors_at(path):
        return replace(config, **changes) if changes else config


@contextmanager
def _errors_at(path: str) -> Iterator[None]:
    """Put `path` in front of the field name with which a config's own SettingError begins."""
    try:
        yield
    except SettingError as error:
        raise SettingError(_join(path, str(error))) from error


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _parse(text: str, hint: Any, full: str) -> Any:
    """The value of a setting on the command line: JSON, a bare word, or a list `a,b` or `a:1,b:2`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # a bare word, or more digits or brackets than Python reads
        value = text
    if get_origin(hint) is tuple and isinstance(value, str) and not value.startswith("["):
        value = [_tuple_item(item.strip(), get_args(hint)[0]) for item in value.split(",")]
    return _convert(value, hint, full, text)


def _tuple_item(text: str, hint: Any) -> Any:
    """One item of a tuple setting: a word, a number, or `name:number`, where `name` alone means 1."""
    if get_origin(hint) is tuple:
        name, _, number = text.partition(":")
        return [name, _number(number or "1")]
    return _number(text) if hint in (int, float) else text


def _number(text: str) -> Any:
    """The number that `text` holds, or `text`, which the conversion to a number then refuses."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _convert(value: Any, hint: Any, full: str, text: str) -> Any:
    """`value` as the type `hint`, or a SettingError. Only int -> float is converted silently."""
    origin, args = get_origin(hint), get_args(hint)
    # Structured types: groups, choices, optional values, dictionaries and lists.
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise SettingError(f"setting {full!r} is a group of {hint.__name__}, got {text!r}")
        return from_json(hint, value, full)
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
    # A tuple hint has either one type for all elements or one type per position.
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise SettingError(f"setting {full!r} takes a JSON list, got {text!r}")
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        hints = [inner] * len(value) if inner is not None else list(args)
        if len(hints) != len(value):
            raise SettingError(f"setting {full!r} takes {len(hints)} values, got {text!r}")
        return tuple(_convert(v, h, full, text) for v, h in zip(value, hints, strict=True))
    # Plain values. JSON reads 1 as an int, so an int is a valid float.
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) <= sys.float_info.max:  # false for NaN
            return float(value)
        raise SettingError(f"setting {full!r} is {text!r}; expected a finite number")
    # A string such as "123" reads as a JSON number: take its original text. A bool is never an int.
    if hint is str and not isinstance(value, str):
        value = text
    if (isinstance(value, bool) and hint is not bool) or not isinstance(value, hint):
        raise SettingError(f"setting {full!r} takes {hint.__name__}, got {text!r}")
    return value


def to_json(config: Any) -> dict[str, Any]:
    """A JSON-able dict of a config dataclass."""
    result: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return result


def from_json(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """The inverse of `to_json`. Missing keys take their defaults. `path`: the path of the config in a larger
    one, for messages. Raises SettingError for an unknown key or a value of another type.
    """
    hints = get_type_hints(cls)
    values = {}
    for key, value in data.items():
        _check_known(cls, key, path)
        values[key] = _convert(value, hints[key], _join(path, key), json.dumps(value))
    with _errors_at(path):
        return cls(**values)


RESTORE_CONFIG_HINT = "copy it from another --out, where the same command as before writes it at its start"
"""The end of an error message about a run's config.json that is damaged or lost: what to do."""


def digest(data: Any) -> str:
    """sha256 of the canonical JSON of `data`."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def completed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON-able dict with those of `defaults` that it lacks, at every level."""
    nested = {
        key: completed(value, defaults[key])
        for key, value in values.items()
        if isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping)
    }
    return {**defaults, **values, **nested}


def without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A JSON-able dict without these values or groups, by dotted name."""
    names = set(names)
    return {
        key: without(value, {name.removeprefix(f"{key}.") for name in names if name.startswith(f"{key}.")})
        if isinstance(value, Mapping)
        else value
        for key, value in values.items()
        if key not in names
    }


def with_values_of(
    values: Mapping[str, Any], other: Mapping[str, Any], names: Iterable[str]
) -> dict[str, Any]:
    """A JSON-able dict with the values that `other` has under these dotted names."""
    result = dict(values)
    for name in names:
        group, dot, member = name.partition(".")
        result[group] = with_values_of(result.get(group, {}), other[group], [member]) if dot else other[group]
    return result


def differing(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The values that differ between two JSON-able dicts, as sorted texts `dotted.name (a -> b)`."""
    names: list[str] = []
    for key in sorted(set(a) | set(b)):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            names += differing(left, right, f"{prefix}{key}.")
        elif left != right:
            names.append(f"{prefix}{key} ({left!r} -> {right!r})")
    return names
