"""JSON that this tool reads back: one parser and one check of types, for files that anybody may have written.

A schema is a type: a TypedDict for an object with named values, `dict[str, float]`, `list[str]`, a dataclass
(each value that is there has the field's type) and so on. Keys that a schema does not name are allowed.
"""

import json
import sys
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from d2g.core.errors import UserError
from d2g.core.machine_errors import raise_machine_error
from d2g.core.regular_files import open_regular

T = TypeVar("T")
COPY_AGAIN = "copy it again from where it came from"
"""The end of an error message about a file of a teacher: what to do."""
MAX_SHOWN_LENGTH = 40  # characters of a wrong value in a message


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError, also for JSON that is nested too deeply, and for half of a
    surrogate pair, which is no text and could not be written or printed.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair") from None
    return value


def read_json_object(path: Path, remedy: str, schema: Any = dict[str, Any]) -> dict[str, Any]:
    """The JSON object in a file, as `read_json` reads it."""
    return dict(read_json(path, remedy, schema))


def read_json(path: Path, remedy: str, schema: Any) -> Any:
    """The value in a JSON file of a folder. Raises UserError, which ends with `remedy`, if the file is
    missing, damaged, no regular file, or does not have the types of `schema`.
    """
    try:
        with open_regular(path) as file:
            value = parse_json(file.read())
        check_type(value, schema)
    except OSError as error:
        raise_machine_error(error)
        raise UserError(f"{path} cannot be read: {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); {remedy}") from error
    return value


def check_type(value: Any, schema: Any, name: str = "") -> None:
    """Raise ValueError, naming the value, unless `value`, read from JSON, has the type `schema`."""
    origin, args = get_origin(schema), get_args(schema)
    # Choices.
    if origin in (Union, types.UnionType):
        if not any(_matches(value, option) for option in args):
            raise _wrong(value, " or ".join(map(_words, args)), name)
    elif origin is Literal:
        if value not in args:
            raise _wrong(value, " or ".join(map(repr, args)), name)
    # Objects and lists, whose members are checked in turn.
    elif is_typeddict(schema) or is_dataclass(schema):
        _check_members(value, schema, name)
    elif (origin or schema) in (dict, Mapping):
        if not isinstance(value, dict):
            raise _wrong(value, "a JSON object", name)
        for key, member in value.items() if args else ():
            check_type(member, args[1], f"{name}.{key}" if name else key)
    elif (origin or schema) in (list, tuple):
        if not isinstance(value, list):
            raise _wrong(value, "a JSON list", name)
        for number, member in enumerate(value) if args else ():
            check_type(member, args[0], f"{name}[{number}]")
    # Single values.
    elif not _is_plain(value, schema):
        raise _wrong(value, _words(schema), name)


def _check_members(value: Any, schema: Any, name: str) -> None:
    """Check an object whose values have names and types of their own."""
    if not isinstance(value, dict):
        raise _wrong(value, "a JSON object", name)
    for key in getattr(schema, "__required_keys__", ()):
        if key not in value:
            raise ValueError(f"{name or 'it'} has no {key!r}")
    for key, hint in get_type_hints(schema).items():
        if key in value:
            check_type(value[key], hint, f"{name}.{key}" if name else key)


def _matches(value: Any, schema: Any) -> bool:
    try:
        check_type(value, schema)
    except ValueError:
        return False
    return True


def _is_plain(value: Any, schema: Any) -> bool:
    if schema is Any or schema is object:
        return True
    if schema is None or schema is type(None):
        return value is None
    if schema is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return isinstance(value, float) or abs(value) <= sys.float_info.max
    if schema is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, schema)


def _words(schema: Any) -> str:
    """A type in words."""
    words: dict[Any, str] = {str: "a text", float: "a number", int: "a whole number", bool: "true or false"}
    words |= {None: "null", type(None): "null", dict: "a JSON object", list: "a JSON list"}
    return words.get(get_origin(schema) or schema, "another value")


def _wrong(value: Any, expected: str, name: str) -> ValueError:
    text = json.dumps(value)
    text = text if len(text) <= MAX_SHOWN_LENGTH else f"{text[:MAX_SHOWN_LENGTH]}..."
    return ValueError(f"{name + ': ' if name else ''}expected {expected}, got {text!r}")
