"""Students of the miniature beside their teacher, by three feature networks, each over several noises.

    python benchmarks/student_and_teacher.py [--student miniature RUN ...] [--seed 0 1 2]

All draw the captions of the same test scenes. Writes student_and_teacher_DATE_cpu.md: means and standard
deviations over the noises, and how far each student is from its teacher.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import spread, table, write
from benchmarks.student_scores import COLUMNS, score_sampler
from d2g.diffusion.teacher_sampler import SolverSettings, load_sampler
from distill.sampling import load_student
from eval.measure.source import ImageSource
from eval.runner.samplers import SamplingRequest, one_step_source, teacher_sampler_source

DISTANCES = COLUMNS[:3]

Sampler = Callable[[SamplingRequest], ImageSource]


def samplers(students: list[str], steps: int) -> dict[str, Sampler]:
    """The teacher, and each student, by its row's name."""
    teacher = load_sampler("miniature", SolverSettings(steps=steps))
    rows: dict[str, Sampler] = {f"teacher, {steps} steps": partial(teacher_sampler_source, teacher)}
    for name in students:
        rows[f"student {name}"] = partial(one_step_source, name, load_student(name))
    return rows


def main() -> None:
    """Score the teacher and all students, and write the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--student", nargs="+", default=["miniature"], help="names or runs")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="of the noise")
    parser.add_argument("--steps", type=int, default=20, help="of the teacher, as in its pairs")
    parser.add_argument("--scenes", type=int, default=2_048, help="test scenes")
    args = parser.parse_args()
    scores: dict[str, list[dict[str, float]]] = {}
    for name, sampler in samplers(args.student, args.steps).items():
        scores[name] = [score_sampler(sampler, args.scenes, seed) for seed in args.seed]
        print(name, scores[name], file=sys.stderr, flush=True)
    rows = [
        [name, len(seeds), *(spread([one[column] for one in seeds]) for column in COLUMNS)]
        for name, seeds in scores.items()
    ]
    # Ratios of the same noise to the teacher's.
    teacher, *others = scores
    ratios = [
        [
            name,
            *(
                spread([a[column] / b[column] for a, b in zip(scores[name], scores[teacher], strict=True)])
                for column in DISTANCES
            ),
        ]
        for name in others
    ]
    lines = [
        f"Frechet distances by three feature networks (CLIP's times 1000), and scores of the oracle, on "
        f"{args.scenes:,} test scenes.",
        "",
        *table(["", "seeds", *COLUMNS], rows),
        "",
        "The student's distance divided by its teacher's on the same noise:",
        "",
        *table(["", *DISTANCES], ratios),
    ]
    write("student_and_teacher", "Students beside their teacher", lines)


if __name__ == "__main__":
    main()
