"""Step time and memory of both stages, by gradient penalty, compiler and number of processes.

    python benchmarks/steps.py --pairs DIR [--teacher miniature] [--preset miniature] [--init RUN]
                               [--batch 32] [--rounds 3] [--set a.b=c ...]

Each variant runs `d2g distill` in processes of its own, for 48 steps that report every 16. The first report
is warm-up. The other two count, so a penalty of interval 16 falls in each once. The variants take turns in
every round. Without --init, a first stage of one step is trained. Writes benchmarks/steps_DATE_DEVICE.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import table, write  # noqa: E402

STEPS, EVERY = 48, 16
CORES = torch.get_num_threads()


@dataclass(frozen=True)
class Variant:
    """One way to run a stage, in `processes` processes of `threads` threads each."""

    name: str
    stage: str
    settings: tuple[str, ...] = ()
    processes: int = 1
    threads: int = CORES


PENALTY = ("gan.r1_interval=16",)
VARIANTS = (
    Variant("stage 1", "ode"),
    Variant("stage 1, a loader worker", "ode", ("train.loader_workers=1",)),
    Variant("stage 1, inductor", "ode", ("engine.compile=inductor",)),
    Variant("stage 1, recompute", "ode", ("engine.activation_checkpointing=true",)),
    Variant("stage 2, no penalty", "gan", ("gan.penalty=none",)),
    Variant(
        "stage 2, no penalty, own generator passes",
        "gan",
        ("gan.penalty=none", "engine.own_generator_passes=true"),
    ),
    Variant("stage 2, R1 of one row", "gan", ("gan.penalty=single", *PENALTY)),
    Variant("stage 2, R1 of the batch", "gan", ("gan.penalty=full", *PENALTY)),
    Variant(
        "stage 2, R1 of one row, inductor", "gan", ("gan.penalty=single", "engine.compile=inductor", *PENALTY)
    ),
    Variant("stage 1, 1 process of 1 thread", "ode", threads=1),
    Variant("stage 1, 2 processes of 1 thread, ddp", "ode", processes=2, threads=1),
    Variant("stage 1, 2 processes of 1 thread, fsdp", "ode", ("engine.parallel=fsdp",), 2, 1),
)


def run(variant: Variant, args: argparse.Namespace, init: str, folder: Path) -> dict[str, float]:
    """Seconds per step, share of time waiting for data, and peak GiB of a process."""
    batch = args.batch
    sets = (
        f"train.batch_size={batch}",
        f"train.report_images={EVERY * batch}",
        "train.checkpoint_images=1000000000",
        "train.on_collapse=off",
        *variant.settings,
        *args.sets,
    )
    out = folder / "run"
    command = ["distill", variant.stage, "--preset", args.preset, "--teacher", args.teacher]
    command += ["--pairs", args.pairs, "--out", str(out), "--images", str(STEPS * batch)]
    command += ["--init", init] if variant.stage == "gan" else []
    command += [part for setting in sets for part in ("--set", setting)]
    launch = [sys.executable, "-m"]
    if variant.processes > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(variant.processes), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(variant.threads)}
    done = subprocess.run(
        [*launch, "d2g_cli", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{variant.name}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()][1:]
    return {
        "seconds": statistics.mean(batch / line["time/images_per_sec"] for line in lines),
        "waited": statistics.mean(line["time/loader_wait"] for line in lines),
        "gib": max(line["mem/peak_gib"] for line in lines),
    }


def first_stage(args: argparse.Namespace, folder: Path) -> str:
    """Train a first stage of one step, from which the second stage starts."""
    out = str(folder / "first")
    command = [
        sys.executable,
        "-m",
        "d2g_cli",
        "distill",
        "ode",
        "--preset",
        args.preset,
        "--teacher",
        args.teacher,
    ]
    command += ["--pairs", args.pairs, "--out", out, "--images", str(args.batch)]
    sets = (f"train.batch_size={args.batch}", *args.sets)
    command += [part for setting in sets for part in ("--set", setting)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


def main() -> None:
    """Run the variants in turns and write the result file."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--pairs", required=True, type=lambda text: str(Path(text).absolute()))
    parser.add_argument("--teacher", default="miniature")
    parser.add_argument("--preset", default="miniature")
    parser.add_argument("--init")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="run only variants whose name contains this")
    parser.add_argument("--set", dest="sets", action="append", default=[])
    args = parser.parse_args()
    variants = [variant for variant in VARIANTS if args.only in variant.name]
    results: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        init = args.init or first_stage(args, Path(folder))
        for number in range(args.rounds):
            for variant in variants:
                with tempfile.TemporaryDirectory() as scratch:
                    results[variant.name].append(run(variant, args, init, Path(scratch)))
                print(number, variant.name, results[variant.name][-1], file=sys.stderr, flush=True)
    median = {name: statistics.median(r["seconds"] for r in rounds) for name, rounds in results.items()}
    rows = []
    for name, rounds in results.items():
        fastest = min(r["seconds"] for r in rounds)
        waited, gib = max(r["waited"] for r in rounds), max(r["gib"] for r in rounds)
        rows.append([name, median[name], fastest, args.batch / median[name], f"{waited:.2%}", gib])
    lines = [f"Batch {args.batch} over all processes, {args.teacher}, {args.rounds} rounds.", ""]
    head = ["variant", "median s per step", "fastest", "images/s", "waiting for data", "peak GiB"]
    lines += table(head, rows)
    lines += ["", *ratios(median)]
    write("steps", "Training steps", lines)


def ratios(seconds: dict[str, float]) -> list[str]:
    """Comparisons between variants, for those that ran."""
    added = (
        ("R1 of one row adds to the mean step", "stage 2, R1 of one row", "stage 2, no penalty"),
        ("R1 of the batch adds to the mean step", "stage 2, R1 of the batch", "stage 2, no penalty"),
        (
            "own generator passes (5 evaluations per row, not 4) add to stage 2",
            "stage 2, no penalty, own generator passes",
            "stage 2, no penalty",
        ),
        ("recompute adds to stage 1", "stage 1, recompute", "stage 1"),
    )
    lines = [
        f"- {what}: {seconds[a] / seconds[b] - 1:+.1%}"
        for what, a, b in added
        if a in seconds and b in seconds
    ]
    faster = (
        ("inductor, stage 1", "stage 1", "stage 1, inductor"),
        ("inductor, stage 2", "stage 2, R1 of one row", "stage 2, R1 of one row, inductor"),
        (
            "2 processes with DDP against 1",
            "stage 1, 1 process of 1 thread",
            "stage 1, 2 processes of 1 thread, ddp",
        ),
        (
            "2 processes with FSDP2 against 1",
            "stage 1, 1 process of 1 thread",
            "stage 1, 2 processes of 1 thread, fsdp",
        ),
    )
    return lines + [
        f"- {what}: {seconds[a] / seconds[b]:.2f}x" for what, a, b in faster if a in seconds and b in seconds
    ]


if __name__ == "__main__":
    main()
