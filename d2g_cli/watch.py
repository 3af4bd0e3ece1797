"""`d2g distill watch`: show the health of a run live in the terminal, as JSON, or as an image."""

import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from d2g.core.errors import SettingError
from d2g_cli.common import Json, emit, one_process
from d2g_cli.terminal import is_terminal, print_line, print_table, printable


@one_process
def watch(
    folder: Annotated[Path, typer.Argument(help="The --out of a run of `d2g distill`.")],
    once: Annotated[bool, typer.Option("--once", help="Show the current state and exit.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between updates.")] = 5.0,
    png: Annotated[Path | None, typer.Option(help="Plot the curves to this file and exit.")] = None,
    as_json: Json = False,
) -> None:
    """Show losses, logits per head, gradients, drift, speed and warnings until the run ends or Ctrl-C."""
    from d2g.core.tracking.run_directory import read_stats
    from distill.monitoring.plots import plot_health
    from distill.monitoring.status import read_status

    if not 0 < every < float("inf"):
        raise SettingError(f"--every is {every}; expected seconds above 0")
    if png is not None and png.is_dir():
        raise SettingError(
            f"--png {png} is a folder; give the name of a file in it, for example {png / 'health.png'}"
        )
    # One look: a plot, JSON or a table.
    status = read_status(folder)
    if png is not None:
        plot_health(read_stats(folder), png, str(folder))
    if as_json:
        emit(status.to_json() | ({} if png is None else {"png": str(png)}), True, "watch")
        return
    if once or png is not None:
        show_status(status)
        return
    # Look again until the run is over.
    with Live() if is_terminal(sys.stdout) else nullcontext() as live:

        def show() -> None:
            if live:
                live.update(render(status))
            else:
                show_status(status)  # one table per report

        try:
            show()
            while not status.over:
                time.sleep(every)
                previous, status = status, read_status(folder)
                if has_news(previous, status, bool(live)):
                    show()
        except KeyboardInterrupt:  # stops watching; the run itself continues
            return


def has_news(previous: Any, status: Any, live: bool) -> bool:
    """Whether the status has changed. Minutes of silence count only on a live terminal."""
    if not live and None not in (previous.silent_minutes, status.silent_minutes):
        status = replace(status, silent_minutes=previous.silent_minutes)
    return bool(status != previous)


def show_status(status: Any) -> None:
    """Print a `distill.monitoring.status.RunStatus`: styled on a terminal, else as plain lines."""
    if is_terminal(sys.stdout):
        Console().print(render(status))
        return
    print_table(_title(status), [], _rows(status))
    for line in (*_notes(status), *_files(status)):
        print_line(line)


def render(status: Any) -> Group:
    """A `distill.monitoring.status.RunStatus` as a table of its panels, with warnings below."""
    table = Table(title=Text(printable(_title(status))), show_header=False, title_justify="left")
    for row in _rows(status):
        table.add_row(*(Text(printable(cell)) for cell in row))
    notes = [Text(printable(line), style="bold red") for line in _notes(status)]
    return Group(table, *notes, *(Text(printable(line), style="dim") for line in _files(status)))


def _title(status: Any) -> str:
    return f"{status.out}  {status.stage}  {status.nimg:,} of {status.images:,} images, {_state(status)}"


def _rows(status: Any) -> list[list[str]]:
    """Rows of panel, name, value and trend. The name of a panel stands in its first row only."""
    rows, panel = [], ""
    for row in status.rows:
        rows.append([row.panel if row.panel != panel else "", row.name, f"{row.value:.4g}", row.trend])
        panel = row.panel
    return rows or [["no reports yet"]]


def _notes(status: Any) -> list[str]:
    return [*status.warnings, *([status.why] if status.why else [])]


def _files(status: Any) -> list[str]:
    return [f"{name}: {path}" for name in ("checkpoint", "preview") if (path := getattr(status, name))]


def _state(status: Any) -> str:
    """The progress of a run, or how it ended."""
    share = f"{status.nimg / status.images:.1%}"
    ends = {"minutes": "it reached its limit of minutes", "stopped": "it was stopped", "failed": "it failed"}
    if status.ended in ends:
        return f"{share}, {ends[status.ended]}"
    if status.over:
        return "finished"
    if status.silent_minutes is not None:
        return f"{share}, no report for {status.silent_minutes} minutes"
    return f"{share}, {status.seconds_left / 60:.0f} min left" if status.seconds_left else share
