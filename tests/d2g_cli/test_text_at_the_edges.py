"""Output in any encoding and into any stream; arguments, paths and prompts with odd characters."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from d2g_cli import common, terminal
from d2g_cli.common import emit, emit_table

ROOT = Path(__file__).parents[2]
DIGEST = "0123456789abcdef" * 4
UNUSUAL_TEXTS = [
    "a [bold]b[/bold]",
    "[red]",
    "a :cat: b",
    "[/]",
    "a\\",
    "caf\u00e9 \u2603",
    "line\nbreak and \u2028",
]


class Terminal(io.TextIOWrapper):
    """A text stream whose `isatty` is true."""

    def isatty(self) -> bool:
        return True


def printed(monkeypatch: pytest.MonkeyPatch, call: Any, encoding: str = "utf-8", tty: bool = False) -> str:
    """The text that `call` writes to a stdout with this encoding."""
    stream = (Terminal if tty else io.TextIOWrapper)(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.prepare_streams()
    call()
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined,no-any-return]


@pytest.fixture(params=["", "FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "GITHUB_ACTIONS", "COLUMNS"])
def colors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setenv(request.param, "1" if request.param != "COLUMNS" else "20")


@pytest.mark.usefixtures("colors")
def test_lines_in_a_pipe_are_plain_and_not_truncated(monkeypatch: pytest.MonkeyPatch) -> None:
    out = printed(
        monkeypatch, lambda: emit({"sha256": DIGEST, "prompts": UNUSUAL_TEXTS[:5]}, False, "a [title]")
    )
    assert out.splitlines() == [
        "a [title]",
        f"sha256   {DIGEST}",
        f"prompts  {json.dumps(UNUSUAL_TEXTS[:5])}",
    ]
    out = printed(monkeypatch, lambda: emit_table(["name", "digest"], [["x" * 200, DIGEST], ["y", "z"]], "t"))
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["name", "digest"],
        ["x" * 200, DIGEST],
        ["y", "z"],
    ]
    assert "\x1b" not in out


def test_long_cells_in_a_terminal_are_wrapped_not_truncated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    out = printed(monkeypatch, lambda: emit({"sha256": DIGEST}, False, "t"), tty=True)
    cells = [line.split("\u2502")[2].strip() for line in out.splitlines() if line.count("\u2502") == 3]
    assert "".join(cells) == DIGEST and "\u2026" not in out


@pytest.mark.parametrize("text", UNUSUAL_TEXTS)
@pytest.mark.parametrize("tty", [True, False])
def test_markup_in_texts_is_printed_literally(text: str, tty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich interprets [brackets] as styles and :names: as emoji by default. A terminal gets no bare \\r."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    out = printed(monkeypatch, lambda: emit({"prompt": text}, False, "t"), tty=tty)
    expected = terminal.printable(text) if tty else text
    assert "".join(expected.split()) in "".join(out.replace("\u2502", "").split())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16", "shift_jis"])
@pytest.mark.parametrize("tty", [True, False])
def test_characters_that_the_encoding_lacks_are_escaped(
    encoding: str, tty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "caf\u00e9 \u2603 \U0001f600 \udce9"
    out = printed(monkeypatch, lambda: emit({"prompt": text}, False, "t"), encoding, tty)
    assert (
        "caf" in out
        and "\\udce9" in out
        and ("\\u2603" in out) == (encoding in ("ascii", "latin-1", "cp1252", "shift_jis"))
    )
    out = printed(monkeypatch, lambda: emit({"prompt": text}, True, "t"), encoding, tty)
    assert json.loads(out) == {"prompt": text}


def test_errors_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    terminal.prepare_streams()
    common.print_error("caf\u00e9 [x] \udcff: no such file")
    stream.flush()
    assert stream.buffer.getvalue() == b"error: caf\\xe9 [x] \\udcff: no such file\n"  # type: ignore[attr-defined]


def command(*args: bytes, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable.encode(), b"-m", b"d2g_cli", *args],
        input=stdin,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
    )


def test_a_usage_error_in_a_pipe_is_one_plain_line() -> None:
    process = command(b"pairs", b"generate", b"--num-pairs", b"many", COLUMNS="30", FORCE_COLOR="1")
    *_, last = process.stderr.decode().splitlines()
    assert process.returncode == 2 and last.startswith("Error: Invalid value for '--num-pairs': ")
    assert b"\x1b" not in process.stderr and "\u2500" not in process.stderr.decode()


def test_help_in_a_pipe_is_plain_and_lists_the_presets() -> None:
    process = command(b"pairs", b"generate", b"--help", FORCE_COLOR="1", PYTHONIOENCODING="ascii")
    text = process.stdout.decode("ascii")
    assert process.returncode == 0 and "\x1b" not in text
    assert text.index("--prompts") < text.index("Presets:") < text.index("  sd15-cfg8 ")
    process = command(b"pairs", b"--help", COLUMNS="30", PYTHONIOENCODING="utf-16")
    assert process.returncode == 0 and process.stdout.decode("utf-16").count("...") == 1, "[ARGS]..."


@pytest.mark.long
@pytest.mark.slow
def test_paths_that_are_not_utf_8(tmp_path: Path) -> None:
    """File names on Linux are bytes in any encoding."""
    folder = os.fsencode(tmp_path) + b"/a [b] \xe9"
    os.mkdir(folder)
    (Path(os.fsdecode(folder)) / "p.txt").write_bytes("a ☃ [red]\n".encode())
    process = command(
        *(b"sample", b"--student", b"miniature", b"--json", b"--prompts", folder + b"/p.txt"),
        *(b"--out", folder + b"/out", b"--teacher", b"miniature"),
        PYTHONIOENCODING="latin-1",
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["out"] == os.fsdecode(folder + b"/out")
    assert sorted(os.listdir(folder + b"/out")) == [b"grid.png", b"student", b"teacher"]


def test_prompts_that_are_not_utf_8_are_refused(tmp_path: Path, d2g: Any) -> None:
    text = os.fsdecode(b"caf\xe9")
    process = d2g("sample", "--student", "miniature", "--prompt", text, "--out", tmp_path / "out")
    assert process.code == 1 and process.stderr.count("\n") == 1 and not os.listdir(tmp_path)
    assert "prompt 'caf\\udce9' holds a NUL, half a surrogate pair or bytes that are not" in process.stderr


@pytest.mark.slow
def test_prompts_from_standard_input_and_a_warning_about_old_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, d2g: Any
) -> None:
    out = tmp_path / "[out]"
    for text in ("a red cube\nb\nc\n", "a red cube\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        process = d2g("sample", "--student", "miniature", "--prompts", "-", "--out", out)
        assert process.code == 0, process.stderr
    assert f"{out} also holds 2 images of an earlier call, from 00001.png on; remove them" in process.stderr
