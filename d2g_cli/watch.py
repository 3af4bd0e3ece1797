"""`d2g distill watch`: the health of a run, live in the terminal, as JSON, or as a picture."""

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from d2g.core.errors import SettingError
from d2g_cli.common import Json, emit


def watch(
    folder: Annotated[Path, typer.Argument(help="The --out of a run of `d2g distill`.")],
    once: Annotated[bool, typer.Option("--once", help="Show it now and leave.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between looks.")] = 5.0,
    png: Annotated[Path | None, typer.Option(help="Draw the panel to this file, and leave.")] = None,
    as_json: Json = False,
) -> None:
    """Losses, logits per head, gradients, drift, speed and what is wrong, until the run ends or Ctrl-C."""
    from d2g.core.tracking.run_directory import read_stats
    from distill.monitoring.plots import plot_health
    from distill.monitoring.status import view

    if not 0 < every < float("inf"):
        raise SettingError(f"--every is {every}; expected seconds above 0")
    if png is not None and png.is_dir():
        raise SettingError(
            f"--png {png} is a folder; give the name of a file in it, say {png / 'health.png'}"
        )
    seen = view(folder)
    if png is not None:
        plot_health(read_stats(folder), png, str(folder))
    if as_json:
        emit(seen.to_json() | ({} if png is None else {"png": str(png)}), True, "watch")
        return
    console = Console()
    if once or png is not None:
        console.print(render(seen))
        return
    with Live(console=console) if console.is_terminal else nullcontext() as live:
        show = live.update if live else console.print  # a file gets a table for every report
        try:
            show(render(seen))
            while not seen.over:
                time.sleep(every)
                before, seen = seen, view(folder)
                if news(before, seen, bool(live)):
                    show(render(seen))
        except KeyboardInterrupt:  # how people leave; the run itself goes on
            return


def news(before: Any, seen: Any, live: bool) -> bool:
    """Whether there is something to show; that a run is still silent is, where it can be overwritten."""
    if not live and None not in (before.silent_minutes, seen.silent_minutes):
        seen = replace(seen, silent_minutes=before.silent_minutes)
    return bool(seen != before)


def render(seen: Any) -> Group:
    """A distill.monitoring.status.View as a table of its panels, warnings beneath."""
    title = f"{escape(seen.out)}  {seen.stage}  {seen.nimg:,} of {seen.images:,} images, {_state(seen)}"
    table = Table(title=title, show_header=False, title_justify="left")
    shown = ""
    for row in seen.rows:
        table.add_row(row.panel if row.panel != shown else "", row.name, f"{row.value:.4g}", row.trend)
        shown = row.panel
    if not seen.rows:
        table.add_row("no reports yet")
    notes = [Text(text, style="bold red") for text in (*seen.warnings, *([seen.why] if seen.why else []))]
    files = [f"{name}: {path}" for name in ("checkpoint", "preview") if (path := getattr(seen, name))]
    return Group(table, *notes, *(Text(line, style="dim") for line in files))


def _state(seen: Any) -> str:
    """How far a run is, or how it ended."""
    share = f"{seen.nimg / seen.images:.1%}"
    ends = {"minutes": "its minutes were over", "stopped": "it was stopped", "failed": "it failed"}
    if seen.ended in ends:
        return f"{share}, {ends[seen.ended]}"
    if seen.over:
        return "finished"
    if seen.silent_minutes is not None:
        return f"{share}, no report for {seen.silent_minutes} minutes"
    return f"{share}, {seen.seconds_left / 60:.0f} min left" if seen.seconds_left else share
