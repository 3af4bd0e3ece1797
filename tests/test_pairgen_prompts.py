"""Prompt files of every kind, and what is said about bad ones."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from core.errors import UserError
from pairgen.prompts import prompts_sha256, read_prompts

PROMPTS = ["a red cube", "two cats, one hat", 'a sign that says "go"', "ein Bär im Schnee ☃"]


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _table(path: Path, rows: list[list[str]]) -> Path:
    table = {name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])}
    parquet.write_table(pa.table(table), path)
    return path


FILES = {
    "a.txt": "\n".join(PROMPTS),
    "dos.txt": b"\xef\xbb\xbf" + "\r\n".join(PROMPTS).encode(),
    "a.jsonl": "\n".join(json.dumps({"prompt": p, "id": i}) for i, p in enumerate(PROMPTS)) + "\n\n",
    "a.csv": 'n,prompt\n,a red cube\n,"two cats, one hat"\n,"a sign that says ""go"""\n,ein Bär im Schnee ☃',
    "caption.csv": 'caption\na red cube\n"two cats, one hat"\na sign that says "go"\nein Bär im Schnee ☃',
    "a.tsv": "Prompt\tNote\n" + "".join(f"{p}\tnote\n" for p in PROMPTS),
    "coco.json": json.dumps({"images": [], "annotations": [{"id": 1, "caption": p} for p in PROMPTS]}),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    assert read_prompts(_write(tmp_path / name, FILES[name])) == PROMPTS


@pytest.mark.parametrize("column", ["prompt", "caption"])
def test_parquet(tmp_path: Path, column: str) -> None:
    path = _table(tmp_path / "a.parquet", [["id", column], *[["1", p] for p in PROMPTS]])
    assert read_prompts(path) == PROMPTS


def test_blank_lines_spaces_and_duplicates_go_and_order_stays(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.txt", "  b \n\n a\nb\n\t\nc\u2028d\nA\n")
    assert read_prompts(path) == ["b", "a", "c\u2028d", "A"]


def test_null_cells_are_blank(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"prompt": ["a", None, "b"]}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == ["a", "b"]


def test_tsv_keeps_bare_quotation_marks_and_unquotes_quoted_cells(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.tsv", 'Prompt\n"G I G" on a wall\n"say ""hi"" now"\n"\n')
    assert read_prompts(path) == ['"G I G" on a wall', 'say "hi" now', '"']


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("e.txt", " \n\n", "no prompts"),
        ("e.csv", "", "found none"),
        ("e.jsonl", "", "no prompts"),
        ("bad.txt", b"ok\nfine\nbr\xe9ton\n", r"line 3, byte offset 10 \(0xe9\)"),
        ("bom.txt", b"\xef\xbb\xbfok\n\xff", r"line 2, byte offset 6 \(0xff\)"),
        ("bad.csv", b"prompt\n\xff\n", "line 2, byte offset 7"),
        ("utf16.txt", "a cat".encode("utf-16"), "line 1, byte offset 0"),
        ("col.csv", "id,text\n1,a\n", "found id, text"),
        ("short.tsv", "id\tprompt\n1\ta\n2\n", "line 3 has 1 cells"),
        ("key.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2: .*found text"),
        ("list.jsonl", "[1]\n", "line 1: .*found list"),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("half.jsonl", '{"prompt": "\\ud800"}\n', "surrogate"),
        ("type.jsonl", '{"prompt": 7}\n', "must be text, got '7' .int"),
        ("nul.txt", b"a\x00b\n", "NUL"),
        ("list.json", '["a"]', "expected COCO captions"),
        ("keys.json", '{"prompts": []}', "found prompts"),
        ("bad.parquet", b"PAR1 nonsense", "no readable parquet"),
        ("p.doc", "a", r"got '\.doc'"),
    ],
)
def test_bad_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read_prompts(_write(tmp_path / name, content))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_folder_and_missing_parquet_column(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: No such file"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match=r"nowhere\.parquet"):
        read_prompts(tmp_path / "nowhere.parquet")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        read_prompts(tmp_path / "folder.txt")
    with pytest.raises(UserError, match="found id, text"):
        read_prompts(_table(tmp_path / "p.parquet", [["id", "text"], ["1", "a"]]))


def test_digest_depends_on_order_and_text() -> None:
    digests = {prompts_sha256(p) for p in (["a", "b"], ["b", "a"], ["ab"], ["a", "b "])}
    assert len(digests) == 4 and prompts_sha256(["a", "b"]) in digests
