"""Threads and processes beside other programs: pairs, stage 1 and evaluation under a load of busy loops.

    python benchmarks/busy_cores.py [--loads 0,2,6] [--seconds 15] [--rounds 1]

Each way of computing starts its processes once. They take turns: a solver step of guided batches of 64 pairs;
training steps of stage 1 (preset `miniature`, 64 rows over all processes, random weights); and batches of 64
images of the bundled student, decoded, with features of the oracle and of the miniature's CLIP. Each runs for
some seconds beside so many endless loops of the shell. For each load it also says what `d2g demo` and
`d2g run` would measure and choose. Writes benchmarks/busy_cores_DATE_cpu.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BATCH = 64
PORT = "29617"
WORKS = ("pairs", "stage 1", "evaluation")


@dataclass(frozen=True)
class Way:
    """A way to use the cores: processes, threads of each, and environment variables of OpenMP."""

    name: str
    processes: int
    threads: int
    environment: Mapping[str, str] = field(default_factory=lambda: {"OMP_WAIT_POLICY": "PASSIVE"})


def all_ways(cores: int) -> tuple[Way, ...]:
    """The ways that are compared; 300,000 spins are GNU OpenMP's own default."""
    return (
        Way(f"1 process, {cores} threads that spin", 1, cores, {"GOMP_SPINCOUNT": "300000"}),
        Way(f"1 process, {cores} threads that sleep", 1, cores),
        Way("1 process, 1 thread", 1, 1),
        Way(f"{cores} processes, 1 thread each", cores, 1),
    )


def worker() -> None:
    """Answer each line of standard input, a work and seconds, with this process's images per second."""
    import torch

    from benchmarks.training_step import RandomStep
    from d2g.core.config import override
    from d2g.core.distributed import process_group
    from d2g.diffusion.pretrained import resolve
    from distill.config.presets import DISTILL_PRESETS
    from distill.sampling import load_student
    from eval.images.resize import NATIVE
    from eval.networks.clip import load_clip_features
    from eval.runner.samplers import SamplingRequest, one_step_source
    from miniature.metrics import oracle_features
    from miniature.oracle import load_oracle
    from pairgen.config import PAIR_PRESETS
    from pairgen.job import open_job, resolve_auto

    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(f"a red sphere number {number}" for number in range(BATCH)))
        pairs = override(PAIR_PRESETS["miniature"], [f"prompts={prompts}", "compile=false"])
        job = open_job(resolve_auto(pairs, "fp32", False), torch.device("cpu"))
        noise = torch.zeros(BATCH, *job.spec.latent_shape)
        texts = job.texts(list(range(BATCH)))
        cond = job.encode(list(range(BATCH))).cond

        def sample() -> None:
            with torch.no_grad():
                job.teacher.sample(noise, texts, 1, job.spec.guidance, job.spec.solver, 0.0, cond)

        request = SamplingRequest(prompts=texts, seed=0, device="cpu")
        student = one_step_source("student", load_student("miniature"), request)
        networks = (oracle_features(load_oracle()), load_clip_features(resolve("miniature") / "clip"))

        def evaluate() -> None:
            for batch in student.draw(range(BATCH), BATCH, (NATIVE,)):
                for network in networks:
                    network.function(batch.views[NATIVE])

        process_group.init()
        config = override(
            DISTILL_PRESETS["miniature"]["ode"], [f"train.batch_size={BATCH}", "train.precision=fp32"]
        )
        step = RandomStep(config, torch.device("cpu"), Path(folder))
        rows = BATCH // process_group.world_size()
        works: dict[str, tuple[Callable[[], object], int]] = {
            "pairs": (sample, BATCH),
            "stage 1": (step, rows),
            "evaluation": (evaluate, BATCH),
        }
        print("ready", flush=True)
        for line in sys.stdin:
            work, seconds = json.loads(line)
            run, images = works[work]
            run()
            process_group.barrier()
            started, count = time.monotonic(), 0
            # Ranks end together, after the same step.
            while not process_group.any_rank(time.monotonic() - started > seconds):
                run()
                count += 1
            print(images * count / (time.monotonic() - started), flush=True)
    process_group.finish()


@contextmanager
def workers(way: Way) -> Iterator[list["subprocess.Popen[str]"]]:
    """The processes of a way, ready."""
    with ExitStack() as stack:
        processes = []
        for rank in range(way.processes):
            environment = {**os.environ, "OMP_NUM_THREADS": str(way.threads), **way.environment}
            if way.processes > 1:
                group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": way.processes, "MASTER_PORT": PORT}
                environment |= {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in group.items()}}
            command = [sys.executable, __file__, "--worker"]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
            processes.append(stack.enter_context(process))
        for process in processes:
            assert pipe_of(process.stdout).readline() == "ready\n", f"a process of {way.name} has ended"
        yield processes


def images_per_second(processes: list["subprocess.Popen[str]"], work: str, seconds: float) -> float:
    """Images per second of all processes of a way together."""
    for process in processes:
        pipe = pipe_of(process.stdin)
        pipe.write(json.dumps([work, seconds]) + "\n")
        pipe.flush()
    return sum(float(pipe_of(process.stdout).readline()) for process in processes)


def pipe_of(pipe: IO[str] | None) -> IO[str]:
    """A pipe that was asked for."""
    assert pipe is not None
    return pipe


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


def main() -> None:
    """Run all ways under all loads and write the result file."""
    from benchmarks.common import table, write
    from d2g.core.distributed.process_count import measure_processes
    from d2g.core.environment import usable_cores

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--loads", default="0,2,6")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    loads, ways = [int(load) for load in args.loads.split(",")], all_ways(usable_cores())
    rates: dict[tuple[str, str, int], list[float]] = {}
    choices = []
    with ExitStack() as stack:
        started_ways = {way.name: stack.enter_context(workers(way)) for way in ways}
        for load in loads:
            with busy_loops(load):
                others = os.getloadavg()[0]
                started = time.monotonic()
                line = measure_processes(usable_cores()).line()
                took = time.monotonic() - started
                choices.append(f"- {load} loops: {line}; it took {took:.1f} s")
                choices[-1] += f"; load average of the last minute {others:.1f}"
                for _ in range(args.rounds):
                    for name, processes in started_ways.items():
                        for work in WORKS:
                            rate = images_per_second(processes, work, args.seconds)
                            rates.setdefault((work, name, load), []).append(rate)
                            print(json.dumps([work, name, load, rate]), file=sys.stderr, flush=True)
    rows = [
        [work, way.name, *(statistics.median(rates[work, way.name, load]) for load in loads)]
        for work in WORKS
        for way in ways
    ]
    about = f"Images/s, {args.seconds:.0f} s each, median of {args.rounds}. Pairs: of one solver step."
    lines = [about, "", *table(["work", "way", *(f"{load} loops" for load in loads)], rows)]
    write("busy_cores", "Busy cores", [*lines, "", "What is measured and chosen:", "", *choices])


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
