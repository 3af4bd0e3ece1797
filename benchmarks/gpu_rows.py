"""The tables, goals and options of benchmarks/gpu.py."""

import gc
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d2g.core.atomic_files import write_atomically
from d2g.core.errors import first_line
from d2g.core.peak_flops import peak_flops

Row = dict[str, Any]
Result = dict[str, Any]
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where results and the random models go, whether sizes are tiny, and a Python with elatentlpips.

    memory_gib: of the GPU, where it is not this machine's.
    """

    out: Path
    tiny: bool
    theirs: str = ""
    memory_gib: float = 0.0


class Rows:
    """The table of an item, OUT/NAME.rows.json: a row is on disk as soon as it is measured, so that an item
    that is stopped loses nothing. A row that could not be measured has an `error`."""

    def __init__(self, out: Path, name: str) -> None:
        self.file = out / f"{name}.rows.json"

    def read(self) -> list[Row]:
        """All rows so far."""
        rows: list[Row] = json.loads(self.file.read_text()) if self.file.is_file() else []
        return rows

    def restart(self, rows: Sequence[Row]) -> None:
        """Begin with these rows, without those that have an error."""
        write_atomically(self.file, json.dumps([row for row in rows if not row.get("error")], indent=1))

    def measure(self, key: Row, measurement: Callable[[], Row]) -> None:
        """Add the row `key` with what `measurement` returns, or with the error that it raises; nothing if
        there is such a row already."""
        if any(key.items() <= row.items() for row in self.read()):
            return
        values = _values_or_error(measurement)
        # Only now: the error of a measurement holds all that it had on the GPU. After some errors of a GPU
        # this fails, too.
        freed = _values_or_error(free_memory)
        values = values if "error" in values else freed or values
        print({**key, **values}, flush=True)
        self.add({**key, **values})

    def add(self, row: Row) -> None:
        """Add a row."""
        write_atomically(self.file, json.dumps([*self.read(), row], indent=1))

    def finish(self, notes: Sequence[str], goals: Sequence[Row] = ()) -> Result:
        """The item's result. With `error` if rows could not be measured: then a goal is reached so far."""
        result: Result = {"notes": list(notes), "goals": list(goals)}
        if failed := [row for row in self.read() if row.get("error")]:
            result["error"] = f"{len(failed)} of {len(self.read())} rows: {failed[0]['error']}"
            reached = {"yes": "so far"}
            result["goals"] = [{**g, "reached": reached.get(g["reached"], g["reached"])} for g in goals]
        return result

    def values(self, column: str, **where: Any) -> list[float]:
        """A column of the rows with these values in other columns, without what was not measured."""
        rows = [row for row in self.read() if where.items() <= row.items()]
        return [row[column] for row in rows if row.get(column, NAN) == row.get(column, NAN)]


def _values_or_error(call: Callable[[], Row | None]) -> Row:
    """What the call returns, or its `error`."""
    try:
        return call() or {}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {first_line(error)}"}


def goal(
    what: str, measured: float, *, at_least: float = -float("inf"), at_most: float = float("inf")
) -> Row:
    """A goal and whether it is reached; "" where nothing was measured."""
    aim = f">= {at_least:g}" if at_most == float("inf") else f"<= {at_most:g}"
    reached = "" if measured != measured else "yes" if at_least <= measured <= at_most else "no"
    return {"goal": what, "aim": aim, "measured": measured, "reached": reached}


def free_memory() -> None:
    """Give the GPU's memory back: a training state holds itself in a circle of references."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def stated_peak() -> float:
    """FLOP/s of the card in bf16 by its data sheet; NaN on a CPU and for an unknown card."""
    peak = peak_flops(torch.cuda.get_device_name(), "bf16") if DEVICE.type == "cuda" else None
    return NAN if peak is None else peak
