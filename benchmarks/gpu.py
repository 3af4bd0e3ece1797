"""The battery for a first GPU: what only a GPU can tell, in order of value.

    PYTHONPATH=. python benchmarks/gpu.py [--out gpu_results] [--only NAME ...] [--minutes M]
                                          [--theirs PYTHON] [--tiny [--together]] [--list] [--plan GIB]

Each item runs in processes of its own for at most 8 minutes. OUT/results.json has all results, and is all
that the same command needs to go on where it stopped, in a new OUT as well (but miniature-2 needs
OUT/miniature): it takes the items without a result, and of those that failed or were stopped the rows that
are missing. Results of another card or of tiny sizes are refused. After each item
OUT/gpu_DATE_CARD.md is the page with all results so far, and OUT/gpu_DATE_CARD.json the same with the goals.
The page is printed at the end. OUT/NAME.log is an item's output, OUT/models holds teachers with random
weights (10 GB).

`--plan GIB` computes forecasts and FLOP of the training steps for a GPU with so many GiB, on a CPU: otherwise
the GPU waits for them. They are in OUT/plan.json and belong to this version of the code.

`--minutes` stops after so many minutes, in the middle of an item if it must. `--theirs` is a Python with
elatentlpips 0.2 (benchmarks/elatentlpips_golden.py), to measure the authors' package itself. `--tiny` takes
tiny sizes, to try the battery without a GPU; its numbers mean nothing. `--together` runs tiny items in one
process, which imports everything once. Exit code 1 if an item failed or is left.

docs/gpu-battery.md says what it needs on a machine without network, and what each item measures.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks import gpu_items  # noqa: E402
from benchmarks.common import card, environment, table  # noqa: E402
from benchmarks.gpu_rows import Options, Result, Rows  # noqa: E402
from benchmarks.gpu_steps import STEP_ITEMS, plan  # noqa: E402
from d2g.core.atomic_files import write_atomically  # noqa: E402

SECONDS = 8 * 60
"""An item that takes longer is stopped, and counts as failed."""
SHORTEST = 45
"""Seconds that must be left to start an item: one that only imports would be stopped."""


@dataclass(frozen=True)
class Item:
    """One measurement. `measure` adds rows to its table as they are measured, and returns notes and goals."""

    name: str
    question: str
    measure: Callable[[Options, Rows], Result]


ITEMS = (
    Item("tests", "Do the tests that need a GPU pass?", gpu_items.gpu_tests),
    Item("matmul", "What does a matrix product reach?", gpu_items.matmul),
    Item("pairs-sd15", "SD 1.5 pairs against diffusers", gpu_items.pairs_sd15),
    Item("pairs-sdxl", "SDXL pairs against diffusers", gpu_items.pairs_sdxl),
    Item("steps-sd15", "SD 1.5 training steps", STEP_ITEMS["steps-sd15"]),
    Item("steps-sdxl", "SDXL training steps", STEP_ITEMS["steps-sdxl"]),
    Item(
        "metric", "E-LatentLPIPS against the authors' form, and against decoding and LPIPS", gpu_items.metric
    ),
    Item("latency", "One step against 50 steps", gpu_items.latency),
    Item("fid", "Throughput of FID statistics", gpu_items.fid),
    Item("compile-sd15", "SD 1.5 training steps with inductor", STEP_ITEMS["compile-sd15"]),
    Item("miniature-1", "The miniature's first stage, five minutes", gpu_items.miniature_first_stage),
    Item("miniature-2", "The miniature's second stage, five minutes", gpu_items.miniature_second_stage),
    Item("compile-sdxl", "SDXL training steps with inductor", STEP_ITEMS["compile-sdxl"]),
)
"""In order of value. Compilation comes late, because it can take an item's whole time."""


def run_item(item: Item, options: Options, seconds: float | None) -> dict[str, Any]:
    """Run an item in a process of its own. The result has `error` if it failed or was stopped."""
    command = [sys.executable, __file__, "--item", item.name, "--out", str(options.out)]
    command += ["--tiny"] if options.tiny else []
    command += ["--theirs", options.theirs] if options.theirs else []
    log, answer = options.out / f"{item.name}.log", options.out / f"{item.name}.new.json"
    answer.unlink(missing_ok=True)
    started = time.monotonic()
    code = run_process_group(command, log, seconds)
    taken = time.monotonic() - started
    if code is None:
        return {"error": f"stopped after {seconds:.0f} s", "seconds": taken}
    if code or not answer.is_file():
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        return {"error": f"{last}; see {log.name}", "seconds": taken}
    result: dict[str, Any] = json.loads(answer.read_text())
    answer.unlink()
    return {**result, "seconds": taken}


def run_process_group(command: Sequence[str], log: Path, seconds: float | None) -> int | None:
    """Run a command with its output in `log`; its exit code, or None if it was stopped after `seconds`.

    It has a process group of its own, which ends with it: processes that it started must not live on with the
    GPU's memory.
    """
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, process_group=0)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of an item's process and of those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all of them have ended
        pass
    process.wait()


def exit_on_sigterm() -> None:
    """Let SIGTERM, which `timeout` sends, raise SystemExit: then the processes of an item end, too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def run_here(item: Item, options: Options) -> dict[str, Any]:
    """The same in this process."""
    started = time.monotonic()
    try:
        result: dict[str, Any] = {**item.measure(options, Rows(options.out, item.name))}
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": time.monotonic() - started}


def report(out: Path, results: dict[str, Any], tiny: bool, items: Sequence[Item]) -> Path:
    """Write the page with all results so far, and the same as JSON."""
    lines = ["# First GPU" + (", tiny sizes: these numbers mean nothing" if tiny else ""), "", *environment()]
    goals = [goal for item in items for goal in results.get(item.name, {}).get("goals", [])]
    if goals:
        head = ["goal", "aim", "measured", "reached"]
        lines += ["", "## Goals", "", *table(head, [[goal[name] for name in head] for goal in goals])]
    for item in items:
        lines += ["", f"## {item.question}", ""]
        result = results.get(item.name)
        if result is None:
            lines.append("Not run yet.")
            continue
        if rows := result.get("rows", []):
            head = list(dict.fromkeys(name for row in rows for name in row))
            lines += [*table(head, [[row.get(name, "") for name in head] for row in rows]), ""]
        if "error" in result:
            lines.append(f"Failed after {result['seconds']:.0f} s: {result['error']}")
            continue
        lines += [*result["notes"], "", f"It took {result['seconds']:.0f} s."]
    path = out / f"gpu_{date.today().isoformat()}_{card()}.md"
    write_atomically(path, "\n".join([*lines, ""]))
    write_atomically(path.with_suffix(".json"), json.dumps({"goals": goals, "items": results}, indent=1))
    return path


def earlier_results(store: Path, machine: str) -> dict[str, Any]:
    """The results so far. Ends the program if they are of another machine: one page must not mix them."""
    results: dict[str, Any] = json.loads(store.read_text()) if store.is_file() else {}
    if others := {result.get("machine", "unknown") for result in results.values()} - {machine}:
        sys.exit(f"{store} has results of {', '.join(sorted(others))}, this is {machine}; give another --out")
    return results


def run_items(args: argparse.Namespace, options: Options, items: Sequence[Item]) -> dict[str, Any]:
    """Run those of the items that have no result yet; returns all results."""
    end = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    machine = card() + (", tiny sizes" if args.tiny else "")
    store = options.out / "results.json"
    results = earlier_results(store, machine)
    # Some processes start in other folders.
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths if path)

    def keep(item: Item, result: dict[str, Any]) -> None:
        results[item.name] = {**result, "rows": rows.read(), "machine": machine}
        write_atomically(store, json.dumps(results, indent=1))

    # Items that failed or were stopped come after those that never ran.
    for item in sorted(items, key=lambda item: item.name in results):
        if args.only and item.name not in args.only:
            continue
        before = results.get(item.name, {"error": ""})
        if "error" not in before:
            continue
        left = end - time.monotonic()
        if left < SHORTEST:
            break
        print(f"{item.name}: {item.question}", flush=True)
        # Rows of an earlier start stay, those that failed are measured again. The file has more of them than
        # the result where the battery itself was stopped.
        rows = Rows(options.out, item.name)
        rows.restart((rows.read() if item.name in results else []) or before.get("rows", []))
        keep(item, {"error": "the battery ended while it ran", "seconds": 0.0})
        limit = min(SECONDS, left) if args.minutes or not args.tiny else None
        result = run_here(item, options) if args.together else run_item(item, options, limit)
        keep(item, result)
        print(f"  {result.get('error', 'done')}, {result['seconds']:.0f} s", flush=True)
        report(options.out, results, args.tiny, items)
    return results


def main(arguments: Sequence[str] | None = None, items: Sequence[Item] = ITEMS) -> int:
    """Run the items that have no result yet."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("gpu_results"))
    parser.add_argument("--only", nargs="+", choices=[item.name for item in items], default=[])
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    parser.add_argument("--theirs", default="", help="a Python that has elatentlpips 0.2")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--list", action="store_true", help="print the items and end")
    parser.add_argument("--plan", type=float, metavar="GIB", help="prepare for a GPU of so many GiB, and end")
    parser.add_argument("--item", help=argparse.SUPPRESS)  # in the process of one item
    args = parser.parse_args(arguments)
    if args.together and not args.tiny:
        parser.error("--together needs --tiny: on a GPU each item starts with empty memory")
    if args.list:
        print("\n".join(f"{item.name:14} {item.question}" for item in items))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    theirs = str(Path(args.theirs).absolute()) if args.theirs else ""
    options = Options(out=args.out.resolve(), tiny=args.tiny, theirs=theirs, memory_gib=args.plan or 0.0)
    if args.plan:
        plan(options)
        return 0
    if args.item:
        item = next(item for item in items if item.name == args.item)
        result = item.measure(options, Rows(options.out, item.name))
        write_atomically(options.out / f"{item.name}.new.json", json.dumps(result, indent=1))
        return 0
    results = run_items(args, options, items)
    path = report(options.out, results, args.tiny, items)
    print(path.read_text(), path, path.with_suffix(".json"), sep="\n")
    wanted = args.only or [item.name for item in items]
    return int(any("error" in results.get(name, {"error": ""}) for name in wanted))


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
