"""d2g.core.json_files: reading any bytes gives the value or a one-line error."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from d2g.core.errors import UserError
from d2g.core.json_files import check_type, parse_json, read_json


class Facts(TypedDict):
    name: str
    size: NotRequired[float | None]
    tags: NotRequired[list[str]]


@dataclass
class Row:
    count: int
    kind: Literal["a", "b"] = "a"


DAMAGE: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "Expecting property name"),
    "empty": (b"", "Expecting value"),
    "deep list": (b"[" * 20_000 + b"]" * 20_000, "nested too deeply"),
    "deep object": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "nested too deeply"),
    "half a surrogate": (b'{"name": "\\ud800"}', "half of a surrogate pair"),
    "half a surrogate in a key": (b'{"name": "a", "\\udfff": 1}', "half of a surrogate pair"),
    "not UTF-8": (b'{"name": "\xff"}', "can't decode byte"),
    "long number": (b'{"name": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    "list": (b"[1]", "expected a JSON object, got '[1]'"),
    "number": (b"3", "expected a JSON object, got '3'"),
    "missing": (b"{}", "it has no 'name'"),
    "wrong type": (b'{"name": 3}', "name: expected a text, got '3'"),
    "wrong member": (b'{"name": "a", "tags": ["b", null]}', "tags[1]: expected a text, got 'null'"),
    "wrong union": (b'{"name": "a", "size": "big"}', "size: expected a number or null, got"),
    "long value": (b'{"name": [' + b"1," * 500 + b"1]}", "name: expected a text, got '[1, 1, 1,"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_a_one_line_error(case: str, tmp_path: Path) -> None:
    data, reason = DAMAGE[case]
    (tmp_path / "f.json").write_bytes(data)
    with pytest.raises(UserError, match=r"f\.json is damaged \(.*\); copy it") as caught:
        read_json(tmp_path / "f.json", "copy it", Facts)
    assert reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_other_file_types_are_not_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "f.json")
    with pytest.raises(UserError, match=r"cannot be read: (not a regular file|Is a directory); copy it"):
        read_json(tmp_path / "f.json", "copy it", Facts)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_json(tmp_path / "g.json", "copy it", Facts)


def test_valid_values_are_returned() -> None:
    check_type({"name": "a", "size": 3, "tags": [], "other": {}}, Facts)
    check_type({"count": 3, "kind": "b"}, Row)
    check_type({"a": [1.5, 2]}, dict[str, list[float]])
    for value, schema in (({"count": True}, Row), ({"kind": "c"}, Row), ({"a": {}}, dict[str, float])):
        with pytest.raises(ValueError, match="expected"):
            check_type(value, schema)
    assert parse_json("\N{GRINNING FACE}".join('""')) == "\N{GRINNING FACE}"
    assert parse_json(b'\xef\xbb\xbf"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


def fuzzed(rng: random.Random, text: bytes) -> bytes:
    """A JSON text with changed bytes, or with values of other types."""
    if rng.random() < 0.5:
        data = bytearray(text)
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.randrange(len(data))] = rng.choice(b'{}[]",:\\0\xff')
        return bytes(data)
    value: Any = json.loads(text)
    wrong: list[Any] = [None, [], {}, 1e308, -1, "x" * 5000, "\ud800", [[]], True, 10**400, "\x1b[31m"]
    value[rng.choice(list(value))] = rng.choice(wrong)
    return json.dumps(value).encode()


ROUNDS = ((4_000, pytest.mark.slow), (20_000, (pytest.mark.slow, pytest.mark.long)))


@pytest.mark.parametrize("rounds", [300, *(pytest.param(n, marks=mark) for n, mark in ROUNDS)])
def test_fuzzed_files_give_the_value_or_a_one_line_error(rounds: int, tmp_path: Path) -> None:
    rng, good = random.Random(3), json.dumps({"name": "a", "size": 2.5, "tags": ["b"]}).encode()
    for _ in range(rounds):
        (tmp_path / "f.json").write_bytes(fuzzed(rng, good))
        try:
            check_type(read_json(tmp_path / "f.json", "copy it", Facts), Facts)
        except UserError as error:
            assert "\n" not in str(error) and str(error).isprintable()
