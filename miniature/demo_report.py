"""The demo's HTML report, written by eval.report.html."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.report.gallery import Pictures
from eval.report.html import Latency, ReportData
from eval.report.html import write_report as write_page
from eval.report.page import metrics_of
from eval.result import EvalResult
from teacher_training.full_run.report import STAGE_TITLES, stage_curves

DEMO_NOTES = (
    "The Frechet distance is of the caption oracle's features against rendered scenes of the same captions: "
    "not an Inception FID.",
    "Caption accuracy: share of captioned facts that the oracle reads back. Flawless pictures: share of "
    "pictures with all of them right.",
)


def write_demo_report(
    path: Path,
    result: Mapping[str, Any],
    results: Mapping[str, EvalResult],
    pictures: Mapping[str, Tensor],
    prompts: Sequence[str],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    teacher_steps: int,
) -> None:
    """Write the report to `path`.

    `result` is the content of demo.json, `results` the evaluation of each sampler. `pictures` has uint8
    images [columns, 3, H, W] per sampler, `curves` the lines of stats.jsonl per stage.
    """
    # The column of each sampler, in the order of the page.
    titles = {
        "naive": "teacher, one step, no training",
        "ode": "after stage 1 (regression)",
        "gan": "after stage 2 (GAN)",
        "teacher": f"teacher, {teacher_steps} DDIM steps",
    }
    # The page of `d2g eval report`, with the demo's own summary, metrics and timings.
    speed = result["ms_per_image"]
    data = ReportData(
        title="A diffusion teacher, distilled into one step",
        summary=f"{result['pairs']:,} noise-latent pairs, two stages, measured in {result['seconds']:.0f} s. "
        f"One image takes {speed['student']:.1f} ms, the teacher's {speed['teacher']:.0f} ms "
        f"({speed['teacher'] / speed['student']:.0f}\u00d7).",
        notes=DEMO_NOTES,
        metrics=metrics_of({title: results[sampler] for sampler, title in titles.items()}),
        beside=[
            Pictures(
                title="Same noise, same prompt",
                columns={titles[sampler]: images for sampler, images in pictures.items()},
                prompts=prompts,
            )
        ],
        # Training curves, then speed and the time of each part.
        curves=[
            curve for stage, lines in curves.items() for curve in stage_curves(STAGE_TITLES[stage], lines)
        ],
        latency=[
            Latency(name=titles[sampler], milliseconds=speed[key])
            for sampler, key in (("teacher", "teacher"), ("gan", "student"))
        ],
        timings=result["timings"],
    )
    write_page(path, data)
