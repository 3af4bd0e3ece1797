"""The precision-and-recall part of benchmarks/eval.py: time and memory against prdc, a process a run."""

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import median, table
from d2g.core.seeds import generator
from eval.metrics.precision_recall import precision_recall

CAUSES = 16
"""What images differ in: about as many numbers as Inception's features of photographs seem to have, for P and
R then lie between 0.5 and 0.9 as they do."""
NUMBERS = ("precision", "recall", "density", "coverage")


def features(count: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    """fp32 rows [count, dim], none negative, on a bent surface of CAUSES dimensions with some noise on it."""
    stream = generator(seed)
    causes = torch.randn(count, CAUSES, generator=stream) + shift
    mix = torch.randn(CAUSES, dim, generator=generator(dim)) / CAUSES**0.5
    return (causes @ mix).relu() + 0.1 * torch.rand(count, dim, generator=stream)


def measure(package: str, count: int, dim: int) -> dict[str, float]:
    """Precision, recall, density and coverage at k = 3 of two sets of rows, and the seconds they took."""
    from prdc import compute_prdc  # before the clock starts

    real, fake = features(count, dim, 0), features(count, dim, 1, shift=0.3)
    started = time.perf_counter()
    if package == "prdc":
        with contextlib.redirect_stdout(io.StringIO()):
            by_prdc = compute_prdc(real.numpy(), fake.numpy(), 3)
        measured = {name: float(value) for name, value in by_prdc.items()}
    else:
        measured = asdict(precision_recall(real, fake, k=3))
    return {**measured, "seconds": time.perf_counter() - started}


def apart(package: str, count: int, dim: int, memory_gib: int) -> dict[str, float] | str:
    """The same in a process of its own that may use `memory_gib` of address space; a failure in words."""
    command = [sys.executable, __file__, package, str(count), str(dim)]
    limit = memory_gib * 2**30

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    # Each thread's arena reserves address space that it never uses.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, env=environment)
    if done.returncode == 0:
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return result
    reasons = [line.strip() for line in done.stderr.splitlines() if "Error" in line or "allocate" in line]
    return f"fails: {reasons[-1][:160] if reasons else f'exit code {done.returncode}'}"


def neighbours(repeats: Mapping[int, int], dim: int, memory_gib: int) -> list[str]:
    """Sets of so many rows so many times, contestants taking turns under one memory limit."""
    rows: list[tuple[object, ...]] = []
    ratios = []
    for count, times in repeats.items():
        measured: dict[str, list[dict[str, float] | str]] = {"diffusion2gan": [], "prdc": []}
        for _ in range(times):
            for package, results in measured.items():
                results.append(apart(package, count, dim, memory_gib))
        medians = {}
        for package, results in measured.items():
            numbers = [result for result in results if isinstance(result, dict)]
            if numbers:
                medians[package] = median([result["seconds"] for result in numbers])
                peak = max(result["peak_gib"] for result in numbers)
                values = [f"{numbers[0][name]:.8g}" for name in NUMBERS]
                rows.append((f"{count:,}", package, medians[package], peak, *values))
            else:
                rows.append((f"{count:,}", package, results[0], "", "", "", "", ""))
        ratio = (
            f"{medians['prdc'] / medians['diffusion2gan']:.2f}" if len(medians) == 2 else "none, prdc fails"
        )
        ratios.append(f"prdc's time over ours at {count:,} rows: {ratio}.")
    return [
        f"## Precision, recall, density and coverage at k = 3, fp32 rows of {dim} on either side",
        "",
        f"Every process may use {memory_gib} GiB of address space.",
        "",
        *table(("rows", "contestant", "median s", "peak GiB", *NUMBERS), rows),
        "",
        *ratios,
    ]


if __name__ == "__main__":
    measured = measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({**measured, "peak_gib": peak}))
