"""Prompt files of every format, prompt lists and their digests, and errors of bad files."""

import hashlib
import json
import pickle
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from d2g.core.errors import SettingError, UserError
from d2g.data import prompt_files
from pairgen.prompts import PromptList, check_labels, distinct, label_list, prompt_list_sha256, read_prompts

ROOT = Path(__file__).parents[2]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))

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
def test_every_format_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    assert read_prompts(_write(tmp_path / name, FILES[name])) == PROMPTS


@pytest.mark.parametrize("column", ["prompt", "caption"])
def test_parquet(tmp_path: Path, column: str) -> None:
    path = _table(tmp_path / "a.parquet", [["id", column], *[["1", p] for p in PROMPTS]])
    assert read_prompts(path) == PROMPTS


def test_blank_lines_spaces_and_duplicates_are_removed_in_order(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.txt", "  b \n\n a\nb\n\t\nc\u2028d\nA\n")
    assert read_prompts(path) == ["b", "a", "c\u2028d", "A"]


def test_prompts_that_repeat_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Else the numbers of images are not those of lines, and nobody knows why."""
    (tmp_path / "twice.txt").write_text("a\n\nb\n a\na\n")
    with caplog.at_level("INFO", "d2g"):
        assert read_prompts(tmp_path / "twice.txt") == ["a", "b"]
    assert "twice.txt: left out 2 of 4 prompts, which repeat earlier ones" in caplog.text


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
        ("utf16.txt", "a cat".encode("utf-16")[:-1], "begins as UTF-16 and is none at byte offset 10"),
        ("utf16.txt", "a caté".encode("utf-16-le"), "line 1, byte offset 10"),
        ("utf16le.txt", "a cat".encode("utf-16-le"), "holds a NUL"),
        ("col.csv", "id,title\n1,a\n", "found id, title"),
        ("open.csv", 'prompt\na\n"b\nc\nd\n', "lines 3 to 5: a quotation mark is not closed"),
        ("open.csv", 'prompt\n"b, c\nd\n"e" and f\n', "lines 2 to 4: a quotation mark is not closed"),
        ("short.tsv", "id\tprompt\n1\ta\n2\n", "line 3 has 1 cells"),
        ("key.jsonl", '{"prompt": "a"}\n{"title": "b"}\n', "line 2: .*found title"),
        ("list.jsonl", "[1]\n", "line 1: .*found list"),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("half.jsonl", '{"prompt": "\\ud800"}\n', "surrogate"),
        ("type.jsonl", '{"prompt": 7}\n', "must be text, got '7' .int"),
        ("nul.txt", b"a\x00b\n", "NUL"),
        ("list.json", '["a"]', "expected COCO captions"),
        ("keys.json", '{"prompts": []}', "found prompts"),
        ("empty.json", "", r"not JSON \(Expecting value: character 0\)"),
        ("cut.json", '{"annotations": [{"caption": "a"}', "not JSON .*character 33"),
        ("more.json", '{"annotations": []} x', r"not JSON \(Extra data: character 20\)"),
        ("number.json", '{1: [], "annotations": []}', "property name"),
        ("null.json", '{"annotations": null}', "found annotations that are NoneType"),
        ("caption.json", '{"annotations": [{"id": 1, "title": "a"}]}', "found an annotation with id, title"),
        ("none.json", "{}", "found no keys"),
        ("word.json", '"a"', "found str"),
        ("bad.json", b'{"annotations": [\n{"caption": "\xe9"}]}', "line 2, byte offset 31"),
        ("bad.parquet", b"PAR1 nonsense", "not a readable parquet"),
        ("p.doc", "a", r"got '\.doc'"),
    ],
)
def test_bad_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read_prompts(_write(tmp_path / name, content))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_lists_of_captions_in_a_parquet_file_are_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"caption": [["a cat", "one cat"]]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet: column caption holds list<.*>, expected text; write"):
        read_prompts(tmp_path / "p.parquet")


def test_a_column_of_a_file_without_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"column is 'title', but .*a\.txt has one prompt a line"):
        read_prompts(_write(tmp_path / "a.txt", "a cat\n"), "title")


def test_quoted_cells_of_several_lines_are_read(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv", 'prompt,x\n"a cat\n""sits""",1\n"b\n\n",2\nc 5" wide,3\n')
    assert list(read_prompts(path)) == ['a cat\n"sits"', "b", 'c 5" wide']


def test_several_captions_of_a_picture_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    lines = [{"file_name": name, "caption": f"{name} {n}"} for name in ("a.png", "b.png") for n in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with caplog.at_level("INFO", "d2g"):
        assert list(read_prompts(tmp_path)) == ["a.png 2", "b.png 2"]
    assert f"{tmp_path}: 2 pictures have several captions; the last one of each is used" in caplog.text


def test_missing_file_folder_and_missing_parquet_column(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: No such file"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match=r"nowhere\.parquet"):
        read_prompts(tmp_path / "nowhere.parquet")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match=r"folder\.txt holds no prompts"):
        read_prompts(tmp_path / "folder.txt")
    with pytest.raises(UserError, match="found id, title"):
        read_prompts(_table(tmp_path / "p.parquet", [["id", "title"], ["1", "a"]]))


# COCO captions of any layout.


def _coco_file(path: Path, captions: list[str], **before: Any) -> Path:
    annotations = [{"id": i, "caption": caption} for i, caption in enumerate(captions)]
    return _write(path, json.dumps({**before, "annotations": annotations, "licenses": [], "n": 17}, indent=1))


@pytest.mark.parametrize("window", [1, 2, 7, 1 << 20])
def test_json_parsing_does_not_depend_on_the_window_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(prompt_files, "JSON_WINDOW", window)
    before = {
        "info": {"year": 2014, "a": [1, {"b": None}]},
        "year": 123456,
        "images": [{"id": 1.5e-3}, 12345],
    }
    assert read_prompts(_coco_file(tmp_path / "a.json", PROMPTS, **before)) == PROMPTS
    with pytest.raises(UserError, match=r"not JSON \(Expecting value: character 18\)"):
        read_prompts(_write(tmp_path / "b.json", '{"annotations":   x}'))


# PromptList.


@given(st.lists(TEXT))
def test_a_list_equals_the_sequence_it_was_made_from(texts: list[str]) -> None:
    prompts = PromptList.of(texts)
    assert prompts == texts and texts == prompts and list(prompts) == texts and len(prompts) == len(texts)
    assert [prompts[i] for i in range(-len(texts), len(texts))] == texts * 2
    assert prompts != [*texts, "x"] and (not texts or prompts != [texts[0] + "x", *texts[1:]])
    assert (
        prompts[1:] == texts[1:]
        and prompts[::-2] == texts[::-2]
        and prompts[2:1] == []
        and prompts[1:][:2] == texts[1:3]
    )
    assert pickle.loads(pickle.dumps(prompts[1:])) == prompts[1:] == PromptList.of(texts[1:])
    assert prompt_list_sha256(prompts[1:]) == prompt_list_sha256(texts[1:])
    with pytest.raises(IndexError):
        prompts[len(texts)]


@given(st.lists(st.one_of(TEXT, st.sampled_from(["a", "b", "ä", '"', "\n"]))))
def test_distinct_keeps_the_first_of_each(texts: list[str]) -> None:
    assert distinct(texts) == list(dict.fromkeys(texts))


def test_distinct_over_many_blocks() -> None:
    draw = random.Random(0)
    texts = [f"{draw.randrange(90_000)} {'x' * draw.randrange(9)}" for _ in range(200_000)]
    assert distinct(texts) == list(dict.fromkeys(texts))


@given(st.lists(TEXT, min_size=1))
def test_a_saved_list_round_trips(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "saved.jsonl"
    PromptList.of(texts).save(path)
    prompts = PromptList.open(path)
    assert prompts == texts and prompt_list_sha256(prompts) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == texts
    assert pickle.loads(pickle.dumps(prompts)) == texts


@pytest.mark.parametrize(
    "content", [b"", b"\n", b'"\n', b'"a"', b'"a"\n"b', b'"a"\n\n"b"\n', b"a\n", b'"a"\n"b\n']
)
def test_a_damaged_list_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"p\.jsonl.*restore it"):
        PromptList.open(_write(tmp_path / "p.jsonl", content))


def test_damage_inside_a_line_is_reported_when_read(tmp_path: Path) -> None:
    prompts = PromptList.open(_write(tmp_path / "p.jsonl", b'"a"\n"\\x"\n"\xff"\n'))
    assert prompts[0] == "a"
    for row in (1, 2):
        with pytest.raises(UserError, match="not a JSON string"):
            prompts[row]
    with pytest.raises(UserError, match="No such file"):
        PromptList.open(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"cannot write .*no prompt list was written"):
        prompts.save(tmp_path / "no" / "folder" / "p.jsonl")


def test_memory_is_close_to_the_size_of_the_text(tmp_path: Path) -> None:
    """At most a quarter of the memory of a list of strings, also during reading and deduplication."""
    path = _write(
        tmp_path / "p.txt", "\n".join(f"{i} a prompt of some forty letters, about {i}" for i in range(50_000))
    )
    tracemalloc.start()
    try:
        texts = read_prompts(path)
        now, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        strings = list(texts)
        as_strings = tracemalloc.get_traced_memory()[0] - now
    finally:
        tracemalloc.stop()
    size = path.stat().st_size
    assert len(strings) == 50_000 and now < 1.6 * size and peak < 3 * size < as_strings + size


# Digest.


def test_digest_depends_on_order_and_text() -> None:
    digests = {
        prompt_list_sha256(p) for p in (["a", "b"], ["b", "a"], ["ab"], ["a", "b "], ["a\nb"], ['a"\n"b'])
    }
    assert len(digests) == 6 and prompt_list_sha256(["a", "b"]) in digests


def test_the_digest_does_not_depend_on_the_file_format(tmp_path: Path) -> None:
    files = [read_prompts(_write(tmp_path / name, content)) for name, content in FILES.items()]
    files.append(read_prompts(_table(tmp_path / "a.parquet", [["prompt"], *[[p] for p in PROMPTS]])))
    assert {prompt_list_sha256(file) for file in files} == {prompt_list_sha256(PROMPTS)}


def test_the_documented_digest(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pair-format.md").read_text(), re.DOTALL)
    recipe = next(block for block in blocks if "prompts" in block and "sha256" in block)
    for prompts in (PROMPTS, ["", "tab\t\x01", "back\\slash", "\u2028 \x7f \U0001f600", "line\nbreak"]):
        exec(recipe, {"prompts": prompts})
        assert capsys.readouterr().out.strip() == prompt_list_sha256(PromptList.of(prompts))


# Classes.


def test_labels_are_numbers_in_range_or_known_names() -> None:
    assert label_list(12) == [str(i) for i in range(12)]
    names = {"tench": 0, "goldfish": 1, "hammerhead shark": 4}
    assert check_labels(["3", "goldfish", "007", "1", "tench"], 10, names) == ["3", "1", "7", "0"]
    assert check_labels(label_list(10), 10) == label_list(10)


@pytest.mark.parametrize("label", ["10", "-1", "1.0", "\u0661", "9" * 5000, "goldfsh", "", " 1"])
def test_other_labels_are_refused(label: str) -> None:
    with pytest.raises(
        UserError, match=r"1 of 2 prompts are not classes of the teacher: prompt 1 .*0 to 9 or a class name"
    ):
        check_labels(["1", label], 10, {"goldfish": 1})


def test_errors_about_labels_have_a_count_and_a_hint() -> None:
    with pytest.raises(
        UserError, match=r"4 of 5 .*prompt 0 'goldfsh', .*, \.\.\.; expected .*did you mean 'goldfish'\?"
    ):
        check_labels(["goldfsh", "a", "b", "c", "1"], 10, {"goldfish": 1})
    with pytest.raises(UserError, match=r"1 of 1 prompts .*from 0 to 9$"):
        check_labels(["cat"], 10)
