"""d2g.data: text in every encoding and with every line end, JSON lines, CSV, and the names of columns."""

import io
import json
import os
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2g.core.errors import SettingError, UserError
from d2g.data.columns import caption_column, find_caption_column
from d2g.data.prompt_files import prompt_cells
from d2g.data.text_files import csv_rows, json_rows, read_text, text_lines

ODD = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven"
"""Characters that `str.splitlines` takes for line ends."""


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_end_at_newlines_and_carriage_returns_only(tmp_path: Path, end: str, encoding: str) -> None:
    texts = ["a", "", ODD, "café ☃", "last"]
    path = write(tmp_path / "a.txt", end.join(texts).encode(encoding))
    lines = list(text_lines(path))
    assert [line.rstrip("\r\n") for line in lines] == texts and "".join(lines) == end.join(texts)
    assert read_text(path) == end.join(texts)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_lines_are_those_of_python_s_universal_newlines(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(text.encode())
    expected = list(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    if not text.encode().startswith((b"\xff\xfe", b"\xfe\xff")):
        assert list(text_lines(path)) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"caf\xe9\n", r"not UTF-8: line 1, byte offset 3 \(0xe9\); convert it"),
        (b"\xef\xbb\xbfa\nb\r\n\x80", "line 3, byte offset 8"),
        ("é".encode("utf-16")[:3], "begins as UTF-16 and is none"),
        ("a\nü".encode("latin-1"), "line 2, byte offset 2"),
        (b"a\xed\xa0\x80", "line 1, byte offset 1"),  # half a surrogate pair
    ],
)
def test_other_encodings_are_reported(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(text_lines(write(tmp_path / "a.txt", data)))


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"text": ODD.replace("\x0b", "").replace("\x0c", "").replace("\x1c", "")}, {"text": "é"}, {}]
    raw = "\n \n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for data in (raw.encode(), b"\xef\xbb\xbf" + raw.replace("\n", "\r\n").encode(), raw.encode("utf-16")):
        assert [row for _, row in json_rows(write(tmp_path / "a.jsonl", data))] == rows
    assert [number for number, _ in json_rows(write(tmp_path / "a.jsonl", raw.encode()))] == [1, 3, 5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 2: expected an object with named columns, found list"),
        ('{"a": 1', "line 2 is not JSON"),
        ("{} {}", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "line 2 is not JSON"),
        ('"text"', "found str"),
    ],
)
def test_damaged_json_lines_are_reported(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(json_rows(write(tmp_path / "a.jsonl", f"{{}}\n{line}\n".encode())))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_of_every_program(tmp_path: Path, delimiter: str, end: str) -> None:
    """Excel writes semicolons where the comma is a decimal point, a BOM, and UTF-16 for "Unicode text"."""
    lines = [["id", " Caption "], ["1", '"a ""b"", c; d"'], [], ["2", f'"two{end}lines"'], ["3", "é\u2028"]]
    text = end.join(delimiter.join(cells) for cells in lines)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = write(tmp_path / "a.csv", text.encode(encoding))
        names, rows = csv_rows(path, ["caption"])
        assert names == ["id", "Caption"]
        assert [cells for _, cells in rows if cells] == [
            ["1", 'a "b", c; d'],
            ["2", f"two{end}lines"],
            ["3", "é\u2028"],
        ]
        assert [cell for cell in prompt_cells(path) if cell] == ['a "b", c; d', f"two{end}lines", "é\u2028"]


@pytest.mark.parametrize(
    ("names", "column", "expected"),
    [
        (["id", "prompt"], None, "prompt"),
        (["text", "caption"], None, "caption"),
        (["URL", "TEXT"], None, "TEXT"),
        (["Prompt", "Note"], None, "Prompt"),
        (["CAPTION", "text"], None, "text"),
        (["a", "b"], None, None),
        (["text", "blip"], "blip", "blip"),
        (["text"], "blip", None),
    ],
)
def test_one_list_of_column_names(names: list[str], column: str | None, expected: str | None) -> None:
    assert find_caption_column(names, column) == expected
    if expected is None:
        with pytest.raises(UserError, match=rf"^x: expected a column named .*, found {', '.join(names)}"):
            caption_column("x", names, column)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("caption.jsonl", '{"caption": "a cube"}\n'),
        ("metadata.jsonl", '{"file_name": "0.png", "text": "a cube"}\n'),
        ("laion.csv", "URL,TEXT\nhttp://x,a cube\n"),
        ("metadata.csv", "file_name,text\n0.png,a cube\n"),
        ("coco.json", '{"annotations": [{"id": 1, "caption": "a cube"}]}'),
        ("text.json", '{"annotations": [{"id": 1, "text": "a cube"}]}'),
        ("a.tsv", "id\tText\n1\ta cube\n"),
        ("b.jsonl", '{"blip": "a cube", "text": "wrong"}'),
        ("b.csv", "blip;text\na cube;wrong"),
        ("b.tsv", "blip\ttext\na cube\twrong\n"),
        ("b.json", '{"annotations": [{"blip": "a cube", "caption": "wrong"}]}'),
    ],
)
def test_all_prompt_formats_accept_the_same_columns(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, content.encode())
    assert list(prompt_cells(path, "blip" if name.startswith("b.") else None)) == ["a cube"]


# Standard input and pipes.


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_prompts_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes are decoded independently of the encoding of the stream."""
    for kind in (io.TextIOWrapper, Terminal):
        stream = kind(io.BytesIO("\ufeffa ☃\r\n\nb".encode()), encoding="ascii")
        monkeypatch.setattr(sys, "stdin", stream)
        assert [line.strip() for line in prompt_cells(Path("-"))] == ["a ☃", "", "b"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(UserError, match="- is not UTF-8: line 1"):
        list(prompt_cells(Path("-")))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SettingError, match="standard input is closed; give a file"):
        list(prompt_cells(Path("-")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingError, match="only one process can read standard input"):
        list(prompt_cells(Path("-")))


@pytest.mark.parametrize(("name", "content"), [("63", b"a\nb\xc3\xa9\n"), ("p.jsonl", b'{"text": "a"}')])
def test_a_pipe_is_read_once(tmp_path: Path, name: str, content: bytes) -> None:
    """`--prompts <(zcat prompts.gz)` gives /dev/fd/63, a pipe without an ending."""
    os.mkfifo(tmp_path / name)
    writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(content,))
    writer.start()
    cells = [cell.strip() for cell in prompt_cells(tmp_path / name)]
    writer.join()
    assert cells == (["a"] if name == "p.jsonl" else ["a", "bé"])


def test_a_csv_row_longer_than_its_head_is_refused(tmp_path: Path) -> None:
    """A comma without quotes would otherwise cut the caption."""
    names, rows = csv_rows(
        write(tmp_path / "a.csv", b"file_name,caption\n0.png,a cube,\n1.png,a cube, red\n"), ["caption"]
    )
    assert names == ["file_name", "caption"] and next(rows)[1] == ["0.png", "a cube", ""]
    with pytest.raises(UserError, match="line 3 has 3 cells; expected 2, as in the first line"):
        next(rows)
