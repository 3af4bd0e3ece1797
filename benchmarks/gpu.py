"""The battery for a first GPU: what only a GPU can tell, in order of value.

    PYTHONPATH=. python benchmarks/gpu.py [--out gpu_results] [--only NAME ...] [--tiny [--together]] [--list]

Each item runs in a process of its own for at most 8 minutes, and writes OUT/NAME.json. The same command goes
on where it stopped: items with a result are left out, failed ones run again. After each item
OUT/gpu_DATE_CARD.md has all results so far. `--tiny` takes tiny sizes, to try the battery without a GPU; its
numbers mean nothing. `--together` runs tiny items in one process, which imports everything once. Exit code 1
if an item failed. The first item needs pytest and hypothesis.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks import gpu_items  # noqa: E402
from benchmarks.common import card, environment, table  # noqa: E402
from d2g.core.atomic_files import write_atomically  # noqa: E402

SECONDS = 8 * 60
"""An item that takes longer is stopped, and counts as failed."""


@dataclass(frozen=True)
class Item:
    """One measurement. `measure` returns rows (the same keys in each) and notes."""

    name: str
    question: str
    measure: Callable[[gpu_items.Options], dict[str, Any]]


ITEMS = (
    Item("tests", "Do the tests that need a GPU pass?", gpu_items.gpu_tests),
    Item("matmul", "What does a matrix product reach?", gpu_items.matmul),
    Item("pairs-sd15", "SD 1.5 pairs against diffusers", gpu_items.pairs_sd15),
    Item("pairs-sdxl", "SDXL pairs against diffusers", gpu_items.pairs_sdxl),
    Item("steps-sd15", "SD 1.5 training steps", gpu_items.steps_sd15),
    Item("steps-sdxl", "SDXL training steps", gpu_items.steps_sdxl),
    Item("compile-sd15", "SD 1.5 training steps with inductor", gpu_items.compiled_steps_sd15),
    Item("compile-sdxl", "SDXL training steps with inductor", gpu_items.compiled_steps_sdxl),
    Item("metric", "E-LatentLPIPS against decoding and LPIPS", gpu_items.metric),
    Item("latency", "One step against 50 steps", gpu_items.latency),
    Item("fid", "Throughput of FID statistics", gpu_items.fid),
    Item("miniature-1", "The miniature's first stage, five minutes", gpu_items.miniature_first_stage),
    Item("miniature-2", "The miniature's second stage, five minutes", gpu_items.miniature_second_stage),
)


def run_item(item: Item, options: gpu_items.Options) -> dict[str, Any]:
    """Run an item in a process of its own. The result has `error` if it failed."""
    command = [sys.executable, __file__, "--item", item.name, "--out", str(options.out)]
    command += ["--tiny"] if options.tiny else []
    log = options.out / f"{item.name}.log"
    started = time.monotonic()
    limit = None if options.tiny else SECONDS
    try:
        with log.open("w") as stream:
            done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {SECONDS} s; see {log.name}", "seconds": float(SECONDS)}
    seconds = time.monotonic() - started
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        return {"error": f"{last}; see {log.name}", "seconds": seconds}
    result_file = options.out / f"{item.name}.new.json"
    result: dict[str, Any] = json.loads(result_file.read_text())
    result_file.unlink()
    return {**result, "seconds": seconds}


def run_here(item: Item, options: gpu_items.Options) -> dict[str, Any]:
    """The same in this process."""
    started = time.monotonic()
    try:
        result = item.measure(options)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": time.monotonic() - started}


def report(out: Path, tiny: bool) -> Path:
    """Write the page with all results so far."""
    lines = ["# First GPU" + (", tiny sizes: these numbers mean nothing" if tiny else ""), ""]
    lines += environment()
    for item in ITEMS:
        lines += ["", f"## {item.question}", ""]
        file = out / f"{item.name}.json"
        if not file.is_file():
            lines.append("Not run yet.")
            continue
        result = json.loads(file.read_text())
        if "error" in result:
            lines.append(f"Failed after {result['seconds']:.0f} s: {result['error']}")
            continue
        if rows := result["rows"]:
            head = list(rows[0])
            lines += [*table(head, [[row[name] for name in head] for row in rows]), ""]
        lines += [*result["notes"], "", f"It took {result['seconds']:.0f} s."]
    path = out / f"gpu_{date.today().isoformat()}_{card()}.md"
    write_atomically(path, "\n".join([*lines, ""]))
    return path


def main() -> int:
    """Run the items that have no result yet."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("gpu_results"))
    parser.add_argument("--only", nargs="+", choices=[item.name for item in ITEMS], default=[])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--list", action="store_true", help="print the items and end")
    parser.add_argument("--item", help=argparse.SUPPRESS)  # in the process of one item
    args = parser.parse_args()
    if args.together and not args.tiny:
        parser.error("--together needs --tiny: on a GPU each item starts with empty memory")
    if args.list:
        print("\n".join(f"{item.name:14} {item.question}" for item in ITEMS))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    options = gpu_items.Options(out=args.out.resolve(), tiny=args.tiny)
    if args.item:
        item = next(item for item in ITEMS if item.name == args.item)
        write_atomically(args.out / f"{item.name}.new.json", json.dumps(item.measure(options), indent=1))
        return 0
    failed = []
    for item in ITEMS:
        file = args.out / f"{item.name}.json"
        if args.only and item.name not in args.only:
            continue
        if file.is_file() and "error" not in json.loads(file.read_text()):
            continue
        print(f"{item.name}: {item.question}", flush=True)
        result = (run_here if args.together else run_item)(item, options)
        write_atomically(file, json.dumps(result, indent=1))
        print(f"  {result.get('error', 'done')}, {result['seconds']:.0f} s", flush=True)
        failed += [item.name] if "error" in result else []
        report(args.out, args.tiny)
    print(report(args.out, args.tiny))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
