"""Speed of two checkouts in one run, taking turns: training, E-LatentLPIPS, pair reader, `d2g --help`.

    python benchmarks/compare_commits.py BEFORE AFTER [--rounds 3] [--images 640]

BEFORE and AFTER are checkouts with an environment of their own in `.venv` (`uv sync`). Each measurement runs
in a process of its own with one thread. Writes benchmarks/compare_commits_DATE_DEVICE.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import table, write

COLORS = ("red", "green", "blue", "yellow")
METRIC = """
import time, torch
from latent_lpips import ELatentLPIPS
from latent_lpips.weights import load_lpips
distance = ELatentLPIPS(load_lpips("miniature/weights/teacher/latent_lpips", 8), "bgco")
x, y = (torch.randn(64, 8, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
x.requires_grad_()
for repeat in range(60):
    if repeat == 20:
        started = time.perf_counter()
    distance(x, y).mean().backward()
print((time.perf_counter() - started) / 40)
"""
READER = """
import random, sys, time
try:
    from pairgen import PairReader
except ImportError:  # before version 0.2
    from pairgen.reader import PairReader
reader = PairReader(sys.argv[1])
order = random.Random(0)
rows = [order.sample(range(len(reader)), 32) for _ in range(420)]
for number, batch in enumerate(rows):
    if number == 20:
        started = time.perf_counter()
    reader.read(batch)
print((time.perf_counter() - started) / 400)
"""
HELP = """
import subprocess, sys, time
started = time.perf_counter()
subprocess.run([".venv/bin/d2g", "--help"], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - started)
"""


def run(checkout: Path, *words: str) -> str:
    """Standard output of a command in a checkout, with its own interpreter and one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(words)[:200]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def d2g(checkout: Path, *words: str) -> dict[str, float]:
    """The JSON object that a `d2g` command ends with."""
    result: dict[str, float] = json.loads(run(checkout, ".venv/bin/d2g", *words, "--json").splitlines()[-1])
    return result


def seconds_per_step(checkout: Path, stage: str, pairs: Path, images: int, init: Path | None = None) -> float:
    """Seconds of a training step of batch 32 on the miniature, without start-up: two lengths, subtracted."""
    seconds = []
    for length in (images // 4, images):
        with tempfile.TemporaryDirectory() as out:
            words = ["distill", stage, "--preset", "miniature", "--pairs", str(pairs), "--out", f"{out}/run"]
            words += ["--init", str(init)] if init else []
            for setting in (f"train.images={length}", "train.batch_size=32", "train.preview_prompts=0"):
                words += ["--set", setting]
            seconds.append(d2g(checkout, *words)["seconds"])
    return (seconds[1] - seconds[0]) / ((images - images // 4) / 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=640)
    options = parser.parse_args()
    checkouts = {"before": options.before.resolve(), "after": options.after.resolve()}
    with tempfile.TemporaryDirectory() as folder:
        # Both checkouts read one store, made by the older one, and start stage 2 from one run.
        pairs, init = Path(folder) / "pairs", Path(folder) / "init"
        before, prompts = checkouts["before"], Path(folder) / "prompts.txt"
        prompts.write_text("".join(f"a {color} cube, {n}\n" for n in range(64) for color in COLORS))
        d2g(before, "pairs", "generate", "--preset", "trial", "--teacher", "miniature", "--out", str(pairs),
            "--prompts", str(prompts),
            "--num-pairs", "256")  # fmt: skip
        d2g(before, "distill", "ode", "--preset", "miniature", "--pairs", str(pairs), "--out", str(init),
            "--set", "train.images=64", "--set", "train.batch_size=32")  # fmt: skip
        measurements = {
            "stage 1, seconds per step of 32": lambda at: seconds_per_step(at, "ode", pairs, options.images),
            "stage 2, seconds per step of 32": lambda at: seconds_per_step(
                at, "gan", pairs, options.images, init
            ),
            "E-LatentLPIPS, forward and backward, seconds": lambda at: float(
                run(at, ".venv/bin/python", "-c", METRIC)
            ),
            "PairReader, 32 random rows, seconds": lambda at: float(
                run(at, ".venv/bin/python", "-c", READER, str(pairs))
            ),
            "d2g --help, seconds": lambda at: float(run(at, ".venv/bin/python", "-c", HELP)),
        }
        rows = []
        for name, measure in measurements.items():
            seconds: dict[str, list[float]] = {side: [] for side in checkouts}
            for _ in range(options.rounds):
                for side, checkout in checkouts.items():
                    seconds[side].append(measure(checkout))
            old, new = (min(seconds[side]) for side in checkouts)
            middle = [statistics.median(seconds[side]) for side in checkouts]
            rows.append([name, old, new, new / old, *middle, middle[1] / middle[0]])
            print(rows[-1], flush=True)
    commits = [
        run(checkout, "git", "rev-parse", "--short", "HEAD").strip() for checkout in checkouts.values()
    ]
    head = ["", "before, minimum", "after, minimum", "ratio", "before, median", "after, median", "ratio"]
    lines = [f"Before: {commits[0]}, after: {commits[1]}; {options.rounds} rounds, taking turns.", ""]
    write("compare_commits", "Two commits compared", [*lines, *table(head, rows)])


if __name__ == "__main__":
    main()
