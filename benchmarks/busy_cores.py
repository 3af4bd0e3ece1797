"""Threads and processes beside other programs: pairs and stage 1 of the miniature under a load of busy loops.

    python benchmarks/busy_cores.py [--loads 0,2,6] [--seconds 15] [--rounds 1] [--only TEXT]

Each way of computing runs `d2g pairs generate` (2 steps, fp32) and `d2g distill ode` from the preset
`miniature`, in batches of 64, beside so many endless loops of the shell. Ways take turns
within a load. At the start of each load it also says what `d2g demo` and `d2g run` would measure and choose.
Writes benchmarks/busy_cores_DATE_cpu.md.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import table, write  # noqa: E402
from d2g.core.distributed.process_count import measure_processes  # noqa: E402
from d2g.core.environment import usable_cores  # noqa: E402
from miniature.sampling import scene_captions  # noqa: E402

CORES = usable_cores()
BATCH = 64
SPIN = {"GOMP_SPINCOUNT": "300000"}
"""GNU OpenMP's own default."""


@dataclass(frozen=True)
class Way:
    """A way to use the cores: processes, threads of each, and environment variables of OpenMP."""

    name: str
    processes: int
    threads: int
    environment: Mapping[str, str] = field(default_factory=dict)


WAYS = (
    Way(f"1 process, {CORES} threads that spin", 1, CORES, SPIN),
    Way(f"1 process, {CORES} threads that sleep", 1, CORES),
    Way("1 process, 1 thread", 1, 1),
    Way(f"{CORES} processes, 1 thread each", CORES, 1),
)


def commands(folder: Path, pairs: Path) -> dict[str, tuple[list[str], Callable[[], int]]]:
    """The commands by name, and how many batches each has done."""
    store, run = folder / "pairs", folder / "run"
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(dict.fromkeys(scene_captions(4_096, 3))))
    generate = ["pairs", "generate", "--preset", "miniature", "--prompts", str(prompts), "--out", str(store)]
    generate += ["--num-pairs", str(BATCH * 512), "--batch-size", str(BATCH)]
    for setting in ("steps=2", f"shard_size={BATCH}", "precision=fp32", "compile=false", "per_prompt=64"):
        generate += ["--set", setting]
    ode = ["distill", "ode", "--preset", "miniature", "--pairs", str(pairs), "--out", str(run)]
    for setting in (
        f"batch_size={BATCH}",
        f"report_images={BATCH}",
        "images=1000000",
        "plot=false",
        "on_collapse=off",
    ):
        ode += ["--set", f"train.{setting}"]
    stats = run / "stats.jsonl"
    return {
        "pairs": (generate, lambda: len(list(store.glob("shards/*.h5")))),
        "stage 1": (ode, lambda: stats.read_bytes().count(b"\n") if stats.is_file() else 0),
    }


def images_per_second(words: list[str], way: Way, seconds: float, batches: Callable[[], int]) -> float:
    """Run a command until its third batch was `seconds` ago, then stop it."""
    words = [*(["launch", "--gpus", str(way.processes), "--"] if way.processes > 1 else []), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(way.threads), **way.environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "d2g_cli", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    seen: list[tuple[float, int]] = []
    # The first batches warm up. One batch may take longer than `seconds`.
    while len(seen) < 2 or seen[-1][0] - seen[0][0] < seconds:
        if process.poll() is not None:
            assert process.stderr is not None
            raise RuntimeError(f"{' '.join(words)} has ended: {process.stderr.read().decode()[-2000:]}")
        done = batches()
        if done > 2 and (not seen or done > seen[-1][1]):
            seen.append((time.monotonic(), done))
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    process.communicate()
    (first, least), (last, most) = seen[0], seen[-1]
    return BATCH * (most - least) / (last - first)


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run so many endless loops."""
    loops = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def make_pairs(folder: Path) -> Path:
    """Pairs for stage 1."""
    store = folder / "few"
    prompts = folder / "few.txt"
    prompts.write_text("\n".join(dict.fromkeys(scene_captions(2 * BATCH, 3))))
    words = ["pairs", "generate", "--preset", "miniature", "--prompts", str(prompts), "--out", str(store)]
    words += ["--set", "steps=2", "--set", "precision=fp32", "--set", "per_prompt=4"]
    subprocess.run([sys.executable, "-m", "d2g_cli", *words], cwd=ROOT, check=True, capture_output=True)
    return store


def main() -> None:
    """Run all ways under all loads and write the result file."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--loads", default="0,2,6")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="", help="run only ways whose name contains this")
    args = parser.parse_args()
    loads = [int(load) for load in args.loads.split(",")]
    ways = [way for way in WAYS if args.only in way.name]
    rates: dict[tuple[str, str, int], list[float]] = {}
    choices = []
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(Path(folder))
        for load in loads:
            with busy_loops(load):
                started = time.monotonic()
                measurement = measure_processes(CORES)
                took = time.monotonic() - started
                choices.append(f"- load {load}: {measurement.line()}; {took:.1f} s")
                for _ in range(args.rounds):
                    for way in ways:
                        with tempfile.TemporaryDirectory() as scratch:
                            for work, (words, batches) in commands(Path(scratch), pairs).items():
                                rate = images_per_second(words, way, args.seconds, batches)
                                rates.setdefault((work, way.name, load), []).append(rate)
                                print(json.dumps([work, way.name, load, rate]), file=sys.stderr, flush=True)
    rows = [
        [work, way.name, *(statistics.median(rates[work, way.name, load]) for load in loads)]
        for work in ("pairs", "stage 1")
        for way in ways
    ]
    lines = [f"Images/s, {args.seconds:.0f} s each, median of {args.rounds}. Loops beside it: columns.", ""]
    lines += table(["work", "way", *(f"load {load}" for load in loads)], rows)
    write("busy_cores", "Busy cores", [*lines, "", "What is measured and chosen:", "", *choices])


if __name__ == "__main__":
    main()
