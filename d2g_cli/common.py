"""Shared parts of all commands: option types, progress and log on stderr, configs from options, output."""

import functools
import inspect
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperCommand

from d2g.core.config import Presets, parse_assignments, pick, to_json, with_values
from d2g.core.errors import Interrupted, SettingError
from d2g.core.logs import logger
from d2g.core.signals import raise_swallowed_interrupt
from d2g_cli.terminal import is_terminal, one_line, print_line, print_table, printable

T = TypeVar("T")

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the settings and the plan; touch nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Out = Annotated[Path, typer.Option(help="Output folder. Run the same command again to resume.")]
TeacherOption = Annotated[
    str | None, typer.Option(help="Folder or hub id in diffusers layout, or a shipped name: miniature.")
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="Prompt file (.txt .jsonl .csv .tsv .parquet, .json of COCO), folder of captioned pictures, or "
        "- for standard input"
    ),
]


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """Options of every command that makes a config. Commands with more options inherit from this class."""

    preset: Annotated[str | None, typer.Option(help="A named set of settings; they are listed below.")] = None
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Override one setting, a.b=value (`d2g settings` lists them); repeatable."
        ),
    ] = None
    dry_run: DryRun = False
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class WorkOptions(BaseOptions):
    """Options of every command that makes a config and draws random numbers."""

    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter that is an options dataclass by one option for each of its fields.

    The fields of a subclass come before those of its bases.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type[Any], list[str]]] = {}
    for parameter in inspect.signature(command).parameters.values():
        cls: type[Any] = parameter.annotation
        if not is_dataclass(cls):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        # Fields of the class itself first, then those of its bases.
        defaults = {field.name: field.default for field in fields(cls)}
        annotations: dict[str, Any] = {}
        for base in cls.__mro__:
            for name, hint in inspect.get_annotations(base).items():
                annotations.setdefault(name, hint)
        groups[parameter.name] = (cls, list(annotations))
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint)
            for name, hint in annotations.items()
        ]

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        for parameter, (cls, names) in groups.items():
            values[parameter] = cls(**{name: values.pop(name) for name in names})
        command(**values)

    # typer reads the signature; a parameter with a default may stand before one without.
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {p.name: p.annotation for p in parameters}
    return expanded


TORCHRUN = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"),
)
"""Environment variables by which torchrun makes a process one of many."""


def one_process(command: Callable[..., None]) -> Callable[..., None]:
    """A command that does its work in one process. Under torchrun rank 0 does it, and the others end well."""

    @functools.wraps(command)
    def alone(**values: Any) -> None:
        if not is_rank_0():
            return
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            name = command.__name__.replace("_", " ")
            logger.info("%s works in one process; the others of torchrun have nothing to do", name)
        for variable in TORCHRUN:
            os.environ.pop(variable, None)
        command(**values)

    return alone


def presets_in_help(
    load: Callable[[], Presets[Any]], **others: Callable[[], Mapping[str, str]]
) -> type[TyperCommand]:
    """A command class whose `--help` ends with the presets, one line each, and other lists by their title."""

    class CommandWithPresets(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            panels = {title: other() for title, other in others.items()} | {"Presets": load().about}
            if self.rich_markup_mode is None:  # not on a terminal
                for title, lines in panels.items():
                    with formatter.section(title):
                        formatter.write_dl(list(lines.items()))
                return
            for title, lines in panels.items():
                table = Table.grid(padding=(0, 2))
                table.add_column(no_wrap=True)
                for name, about in lines.items():
                    table.add_row(escape(name), escape(about))
                Console().print(Panel(table, title=title, title_align="left", border_style="dim"))

    return CommandWithPresets


def is_rank_0() -> bool:
    """Whether this is rank 0, or the only process; known from torchrun's environment, without torch."""
    return int(os.environ.get("RANK", 0)) == 0


class Reporter:
    """Progress on stderr: rich bars on a terminal, else a line every 10 seconds. Rank 0 alone reports."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),  # labels hold paths
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.tasks: dict[str, Any] = {}
        self.started: dict[str, tuple[float, int]] = {}
        self.latest: dict[str, tuple[int, int]] = {}
        self.last_line = 0.0

    def __call__(self, label: str, done: int, total: int) -> None:
        raise_swallowed_interrupt()
        if not is_rank_0():
            return
        label = one_line(label)
        now = time.monotonic()
        # A loop that repeats an earlier one's label starts again, or elsewhere after the earlier one's end.
        last_done, last_total = self.latest.get(label, (done, total))
        self.latest[label] = done, total
        if repeated := done < last_done or (last_done >= last_total > 0 and total != last_total):
            self.started.pop(label, None)
        start_time, start_done = self.started.setdefault(label, (now, done))
        rate = (done - start_done) / (now - start_time) if now > start_time else 0.0
        if is_terminal(sys.stderr):
            if not self.tasks:
                self.bars.start()
            if label not in self.tasks:
                self.tasks[label] = self.bars.add_task(label, total=total or None, rate="")
            elif repeated:
                self.bars.reset(self.tasks[label], total=total or None)
            self.bars.update(self.tasks[label], completed=done, rate=f"{rate:.1f}/s")
        elif now - self.last_line >= 10 or (total and done >= total):
            self.last_line = now
            remaining = f", {(total - done) / rate:.0f} s left" if rate and total else ""
            logger.info("%s: %d/%s (%.1f/s%s)", label, done, total or "?", rate, remaining)

    def stop(self) -> None:
        """Remove the bars from the terminal before anything else is printed."""
        if self.tasks:
            self.bars.stop()


reporter = Reporter()


class _StderrHandler(logging.Handler):
    """Prints a record as one line on stderr, above the progress bars where there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        text = one_line(self.format(record)) if record.exc_info is None else printable(self.format(record))
        if reporter.tasks:
            reporter.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    """Show the log of all packages on stderr. Further calls change nothing."""
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
        logger.setLevel(logging.INFO)


def settings_from(options: Any, config_class: type, *names: str) -> dict[str, Any]:
    """The options, of a dataclass, that are settings of a config class, by name; `names`: those alone."""
    known = {field.name for field in fields(config_class)}
    names = names or tuple(field.name for field in fields(options))
    return {name: getattr(options, name) for name in names if name in known}


def configure(config: T, settings: Mapping[str, Any], sets: list[str] | None) -> T:
    """A config with settings from options, by dotted name, then `--set`. None leaves a setting as it is.

    Raises SettingError for a value that is not finite, an unknown setting or a value that the config refuses.
    """
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            option = name.rpartition(".")[2].replace("_", "-")
            raise SettingError(f"--{option} is {value}; expected a finite number")
    values = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items() if v is not None}
    config = with_values(config, values | parse_assignments(config, sets or []))
    if (seed := getattr(config, "seed", None)) is not None:
        from d2g.core.seeds import checked_key

        checked_key("seed", seed)
    return config


def configure_preset(
    presets: Presets[T], default: str, options: BaseOptions, settings: Mapping[str, Any]
) -> T:
    """`configure` for the preset that the options name, or the default one."""
    return configure(pick(presets, options.preset or default, "preset"), settings, options.sets)


def require_range(least: float = 0, most: float = math.inf, **options: float) -> None:
    """Raise SettingError for the first of the options that is not finite or not from `least` to `most`.

    For options that are not settings of a config, which checks its own.
    """
    for name, value in options.items():
        if not (math.isfinite(value) and least <= value <= most):
            expected = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise SettingError(f"--{name.replace('_', '-')} is {value}; expected {expected}")


def require_solver_options(teacher: str | None, steps: int | None, guidance: float | None) -> None:
    """Raise SettingError for solver options of a teacher that cannot be used, or without a teacher."""
    options = {"steps": steps, "guidance": guidance}
    for name, value in options.items():
        if value is not None and teacher is None:
            raise SettingError(f"--{name} is {value} without --teacher, whose solver it is for; leave it out")
    if steps is not None:
        require_range(1, 10_000, steps=steps)
    # Below 1 the teacher would draw less of the prompt, and at 0 nothing of it.
    if guidance is not None and not 1 <= guidance < math.inf:
        raise SettingError(f"--guidance is {guidance:g}; expected 1 (no guidance) or more")


@contextmanager
def leave_process_group(*collective: type[Exception]) -> Iterator[None]:
    """Leave the process group, if there is one, when the block ends or raises an error that all ranks raise
    together: Ctrl-C, a loss that is not finite, or one of `collective`.

    After any other error this process only prints it and exits. Leaving the group could wait for the other
    ranks, or make them fail before this one has printed its error.
    """
    from d2g.core.distributed import process_group

    shared: tuple[type[Exception], ...] = (Interrupted, FloatingPointError, *collective)
    try:
        yield
    except shared:
        process_group.finish()
        raise
    process_group.finish()


def print_error(text: str, every_rank: bool = False) -> None:
    """Print the final error of this process. When all ranks fail with the same error, rank 0 alone prints it,
    unless `every_rank`.
    """
    if every_rank or not is_printed_by_rank_0(text):
        print_line(f"error: {text}", sys.stderr)
    if not every_rank:
        publish_error(text)


def is_printed_by_rank_0(text: str) -> bool:
    """Whether this is a rank above 0 under torchrun, and rank 0 prints the same final error."""
    if "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:  # decided without importing torch
        return False
    from d2g.core.distributed import process_group

    return process_group.rank() != 0 and process_group.rank_0_published(text)


def publish_error(text: str) -> None:
    """On rank 0 under torchrun: publish the final error, so that other ranks do not print it again."""
    if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        from d2g.core.distributed import process_group

        if process_group.rank() == 0:
            process_group.publish_final_error(text)


def emit(result: Any, as_json: bool, title: str) -> None:
    """Print a result on rank 0: one JSON line, or a table."""
    reporter.stop()
    data = result if isinstance(result, dict) else asdict(result)
    if not is_rank_0():
        return
    if as_json:
        print(json.dumps(data, default=str), flush=True)
        return
    print_table(title, [], [[key, _cell(value)] for key, value in data.items()])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)


def emit_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    """Print a table with named columns on rank 0."""
    reporter.stop()
    if not is_rank_0():
        return
    print_table(title, head, rows)


def finish_dry_run(
    config: Any, as_json: bool, plan: Mapping[str, Any] | None = None, inputs: Mapping[str, Any] | None = None
) -> None:
    """Print the config and the plan of a run, and exit.

    inputs: values by option. Raises UserError for one that does not exist.
    """
    from d2g_cli.inputs import check_inputs

    check_inputs(inputs or {})
    emit({"config": to_json(config), **(plan or {})}, as_json, "dry run: nothing was touched")
    raise typer.Exit
