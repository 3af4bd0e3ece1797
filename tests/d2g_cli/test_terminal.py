"""d2g_cli.terminal: control characters in untrusted text do not reach the terminal; and progress there."""

import io
import sys
from collections.abc import Callable

import pytest

from clocks import Clock
from d2g_cli import common
from d2g_cli.common import emit, print_error
from d2g_cli.main import main
from d2g_cli.terminal import print_line, print_table, printable

ATTACKS = {
    "color": "\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J\x1b[H",
    "8-bit": "\x9b2J",
    "backspace": "safe\b\b\b\bevil",
    "return": "safe\revil",
    "right to left": "\u202egnp.exe",
    "isolate": "\u2066a\u2069",
    "delete": "\x7f",
    "null": "a\0b",
}


class FakeTerminal(io.StringIO):
    """A text stream whose `isatty` is true."""

    def isatty(self) -> bool:
        return True


def show_progress(label: str) -> None:
    """Show the whole of a job's progress."""
    reporter = common.Reporter()
    reporter(label, 0, 2)
    reporter(label, 2, 2)
    reporter.stop()


@pytest.mark.parametrize("again", [[(0, 50), (20, 50)], [(100, 500), (120, 500)]])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_second_loop_of_one_label_has_its_own_rate(
    again: list[tuple[int, int]],
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The second loop starts at 0 or, where it resumes, later."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stderr", FakeTerminal() if terminal else io.StringIO())
    monkeypatch.setattr(common, "time", clock := Clock())
    caplog.set_level("INFO", "d2g")
    reporter = common.Reporter()
    for done, total in [(0, 100), (50, 100), (100, 100), *again]:
        reporter("draw", done, total)
        clock.sleep(10)
    reporter.stop()
    (done, total), rate = again[-1], "2.0/s"
    if terminal:
        (task,) = reporter.bars.tasks
        assert (task.completed, task.total, task.fields["rate"]) == (done, total, rate)
    else:
        assert caplog.messages[-1] == f"draw: {done}/{total} ({rate}, {(total - done) // 2} s left)"


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_are_not_printed(
    attack: str, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = FakeTerminal() if terminal else io.StringIO()
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    text = ATTACKS[attack]
    calls: list[Callable[[], None]] = [
        lambda: print_table(text, [text, "b"], [[text, text]]),
        lambda: print_error(text),
        lambda: print_line(text),
        lambda: emit({text: [text], "b": text}, False, text),
        lambda: emit({"prompt": text}, True, text),
        lambda: show_progress(text),
    ]
    for call in calls:
        call()
    assert all(c == "\n" or c.isprintable() for c in stream.getvalue()), repr(stream.getvalue())


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    "arguments", [["ATTACK"], ["--ATTACK"], ["pairs", "info", "a", "ATTACK"], ["eval", "run", "--num=ATTACK"]]
)
def test_usage_errors_are_printable(
    attack: str, terminal: bool, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = FakeTerminal() if terminal else io.StringIO()
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit, match="2"):
        main([argument.replace("ATTACK", ATTACKS[attack]) for argument in arguments])
    assert all(c == "\n" or c.isprintable() for c in stream.getvalue()), repr(stream.getvalue())
    assert "Error" in stream.getvalue()


def test_progress_labels_are_printed_literally(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = FakeTerminal()
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stderr", stream)
    show_progress("measure [red]a :cat:\nb")
    assert "measure [red]a :cat: b" in stream.getvalue()


@pytest.mark.parametrize("text", ["a [bold]cat[/bold] :smile:", "ein Bär ☃", "क्‍ष", "👩‍🚀", "a\tb"])
def test_printable_text_is_unchanged(text: str) -> None:
    assert printable(text) == text
