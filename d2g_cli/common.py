"""What every command shares: option types, progress on stderr, configs from options, one way to print."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from d2g.core.config import override, pick, to_json, with_values
from d2g.core.errors import Interrupted, SettingError
from d2g.core.logs import logger

T = TypeVar("T")

Preset = Annotated[str | None, typer.Option(help="A named set of settings.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override one setting, a.b=value; repeatable.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print settings and plan; touch nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as stdout's last line.")]
Out = Annotated[Path, typer.Option(help="Output folder. Run the same command again to resume.")]
TeacherOption = Annotated[
    str | None, typer.Option(help="Folder or hub id in diffusers layout, or a shipped name: miniature.")
]
Prompts = Annotated[Path | None, typer.Option(help=".txt .jsonl .csv .tsv .json (COCO) .parquet")]


class Reporter:
    """Progress on stderr: rich bars on a terminal, else a line every 10 seconds."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.tasks: dict[str, Any] = {}
        self.begun: dict[str, tuple[float, int]] = {}
        self.last = 0.0

    def __call__(self, label: str, done: int, total: int) -> None:
        from d2g.core.distributed import process_group

        if process_group.rank() != 0:
            return
        now = time.monotonic()
        started, first = self.begun.setdefault(label, (now, done))
        rate = (done - first) / (now - started) if now > started else 0.0
        if self.console.is_terminal:
            if not self.tasks:
                self.bars.start()
            if label not in self.tasks:
                self.tasks[label] = self.bars.add_task(label, total=total or None, rate="")
            self.bars.update(self.tasks[label], completed=done, rate=f"{rate:.1f}/s")
        elif now - self.last >= 10 or (total and done >= total):
            self.last = now
            left = f", {(total - done) / rate:.0f} s left" if rate and total else ""
            print(f"{label}: {done}/{total or '?'} ({rate:.1f}/s{left})", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Leave the terminal clean before anything else is printed."""
        if self.tasks:
            self.bars.stop()


reporter = Reporter()


class _StderrHandler(logging.Handler):
    """Prints a record as one line on stderr, above the progress bars where there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if reporter.tasks:
            reporter.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    """Show the log of all packages on stderr. Call it as often as you like."""
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
        logger.setLevel(logging.INFO)


def configure(config: T, options: Mapping[str, Any], sets: list[str] | None) -> T:
    """A preset's config with the options that are set, by dotted name (None: not set), then --set overrides."""
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            option = name.rpartition(".")[2].replace("_", "-")
            raise SettingError(f"--{option} is {value}; expected a finite number")
    given = {k: str(v) if isinstance(v, Path) else v for k, v in options.items() if v is not None}
    config = override(with_values(config, given), sets or [])
    if (seed := getattr(config, "seed", None)) is not None:
        from d2g.core.seeds import checked_key

        checked_key("seed", seed)
    return config


def expect(least: float = 0, most: float = math.inf, **options: float) -> None:
    """Raise SettingError for the first of the options, which no config holds, that is not finite or not from
    `least` to `most`.
    """
    for name, value in options.items():
        if not (math.isfinite(value) and least <= value <= most):
            wanted = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise SettingError(f"--{name.replace('_', '-')} is {value}; expected {wanted}")


def chosen(presets: Mapping[str, T], name: str, options: Mapping[str, Any], sets: list[str] | None) -> T:
    """`configure` from the preset of that name."""
    return configure(pick(presets, name, "preset"), options, sets)


@contextmanager
def finishing(*together: type[Exception]) -> Iterator[None]:
    """Leave the process group, if there is one, when the block ends, or fails as all processes do together:
    with Ctrl-C, a loss that is not finite, or one of `together`.

    After any other error this process just says why and ends: leaving the group could wait for the others, or
    show them that it is gone before it has said so.
    """
    from d2g.core.distributed import process_group

    shared: tuple[type[Exception], ...] = (Interrupted, FloatingPointError, *together)
    try:
        yield
    except shared:
        process_group.finish()
        raise
    process_group.finish()


def last_word(text: str, to_itself: bool = False) -> None:
    """Print the line that a process fails with. Of torchrun's processes that all fail with the same, rank 0
    prints it; `to_itself`: each does.
    """
    if to_itself or not told_by_rank_0(text):
        print(f"error: {text}", file=sys.stderr, flush=True)
    if not to_itself:
        tell_others(text)


def told_by_rank_0(text: str) -> bool:
    """Whether this is another of torchrun's processes, and rank 0 prints `text` as its last too."""
    if "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:  # asked without torch
        return False
    from d2g.core.distributed import process_group

    return process_group.rank() != 0 and process_group.word_was_left(text)


def tell_others(text: str) -> None:
    """Of torchrun's processes on rank 0: let the others know what was printed last."""
    if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        from d2g.core.distributed import process_group

        if process_group.rank() == 0:
            process_group.leave_word(text)


def emit(result: Any, as_json: bool, title: str) -> None:
    """Print a result: one JSON line, or a table for people. Only rank 0 speaks."""
    from d2g.core.distributed import process_group

    reporter.stop()
    data = result if isinstance(result, dict) else asdict(result)
    if process_group.rank() != 0:
        return
    if as_json:
        print(json.dumps(data, default=str), flush=True)
        return
    table = Table(title=title, show_header=False)
    for key, value in data.items():
        shown = (
            f"{value:.4g}"
            if isinstance(value, float)
            else json.dumps(value, default=str)
            if isinstance(value, dict | list)
            else str(value)
        )
        table.add_row(key, escape(shown))  # a prompt's [brackets] are no markup
    Console().print(table)


def emit_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    """Print columns for people. Only rank 0 speaks."""
    from d2g.core.distributed import process_group

    reporter.stop()
    if process_group.rank() != 0:
        return
    table = Table(title=escape(title))
    for name in head:
        table.add_column(escape(name), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def dry(config: Any, as_json: bool, plan: Mapping[str, Any] | None = None) -> None:
    """Print what would run and leave."""
    emit({"config": to_json(config), **(plan or {})}, as_json, "dry run: nothing was touched")
    raise typer.Exit
