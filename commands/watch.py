"""`d2g distill watch`: the health of a run, live in the terminal, as JSON, or as a picture."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from commands.common import Json, emit
from core.errors import SettingError


def watch(
    folder: Annotated[Path, typer.Argument(help="The --out of a run of `d2g distill`.")],
    once: Annotated[bool, typer.Option("--once", help="Show it now and leave.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between looks.")] = 5.0,
    png: Annotated[Path | None, typer.Option(help="Draw the panel to this file, and leave.")] = None,
    as_json: Json = False,
) -> None:
    """Losses, logits per head, gradients, drift, speed and what is wrong, until the run ends or Ctrl-C."""
    from core.runlog import read_stats
    from distill.health import plot_health
    from distill.watch import view

    if every <= 0:
        raise SettingError(f"--every is {every}; expected seconds above 0")
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
            while not seen.finished:
                time.sleep(every)
                before, seen = seen, view(folder)
                if seen != before:
                    show(render(seen))
        except KeyboardInterrupt:  # how people leave; the run itself goes on
            return


def render(seen: Any) -> Group:
    """A distill.watch.View as a table of its panels, warnings beneath."""
    left = f", {seen.seconds_left / 60:.0f} min left" if seen.seconds_left and not seen.finished else ""
    state = "finished" if seen.finished else f"{seen.nimg / seen.images:.1%}{left}"
    title = f"{escape(seen.out)}  {seen.stage}  {seen.nimg:,} of {seen.images:,} images, {state}"
    table = Table(title=title, show_header=False, title_justify="left")
    shown = ""
    for row in seen.rows:
        table.add_row(row.panel if row.panel != shown else "", row.name, f"{row.value:.4g}", row.trend)
        shown = row.panel
    if not seen.rows:
        table.add_row("no reports yet")
    notes = [Text(text, style="bold red") for text in seen.warnings]
    files = [f"{name}: {path}" for name in ("checkpoint", "preview") if (path := getattr(seen, name))]
    return Group(table, *notes, *(Text(line, style="dim") for line in files))
