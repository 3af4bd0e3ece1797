"""The demo: the whole job on the miniature, through the functions that an SD 1.5 run calls."""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed import process_group
from d2g.core.png import grid, save_png
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import noise
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion import pretrained
from d2g.diffusion.teacher import Teacher, load_teacher
from distill.sampling import OneStep, load_one_step, untrained_one_step
from distill.training.train import train
from eval.evaluate import evaluate
from eval.measure.build_reference import build_reference
from eval.measure.latency import milliseconds_per_image
from eval.measure.required_networks import Networks
from eval.measure.source import batch_source
from eval.networks.registry import load_clip
from eval.protocols.protocol import PROTOCOLS
from eval.report.page import first_images
from eval.result import EvalResult
from eval.runner.samplers import SamplingRequest, ode_source, one_step_source
from miniature.config import DemoConfig
from miniature.demo_report import write_demo_report
from miniature.metrics import TEST_SEED, oracle_features, oracle_measures, real_scenes
from miniature.oracle import load_oracle
from miniature.registration import register_eval_scenes
from miniature.sampling import scene_captions
from pairgen.generate import generate_pairs

PROMPT_SEED = 3  # seed 1 trained the teacher, seed 2 is for tests
DEMO_SAMPLERS = ("naive", "ode", "gan", "teacher")


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo measured, in this very run. `fid`: Frechet distances of the oracle's features."""

    out: str
    report: str
    seconds: float
    pairs: int
    caption_accuracy: dict[str, float]
    fid: dict[str, float]
    recall: dict[str, float]
    precision: dict[str, float]
    clip_score: dict[str, float]
    caption_exact: dict[str, float]
    ms_per_image: dict[str, float]
    timings: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The contract's keys."""
        return asdict(self)


def run_demo(config: DemoConfig, out: Path, progress: Progress = quiet) -> DemoResult:
    """Pairs, stage 1, stage 2, evaluation, report. Finished parts are kept: run again to go on.

    Raises what the stages raise; nothing of a finished stage is lost.
    """
    register_eval_scenes()
    started, timings = time.monotonic(), {}
    device = process_group.init()

    def timed(label: str, since: float) -> None:
        timings[label] = time.monotonic() - since

    # Pairs.
    begun, prompts = time.monotonic(), out / "prompts.txt"
    texts = list(dict.fromkeys(scene_captions(config.pairs.num_pairs, PROMPT_SEED)))
    write_atomically(prompts, "\n".join(texts) + "\n")
    job = replace(config.pairs, prompts=str(prompts), seed=config.seed)
    made = generate_pairs(job, out / "pairs", progress)
    timed("pairs", begun)

    # Both stages.
    begun = time.monotonic()
    ode = replace(config.ode, pairs=str(out / "pairs"), seed=config.seed)
    train(ode, out / "ode", progress)
    timed("stage 1", begun)
    begun = time.monotonic()
    gan = replace(config.gan, pairs=str(out / "pairs"), init=str(out / "ode"), seed=config.seed)
    train(gan, out / "gan", progress)
    timed("stage 2", begun)

    # Evaluation: the same noise and test captions through all four.
    begun = time.monotonic()
    name = config.pairs.teacher
    teacher = load_teacher(name, device)
    students = {
        "naive": untrained_one_step(name, device),
        "ode": load_one_step(str(out / "ode"), device=device),
        "gan": load_one_step(str(out / "gan"), device=device),
    }
    results, first = evaluate_samplers(config, teacher, students, progress)
    timed("evaluation", begun)
    speed = measure_sampling_time(config, teacher, students["gan"])

    # Report.
    pick = {
        key: {k: float(getattr(r, key) or 0.0) for k, r in results.items()}
        for key in ("fid", "recall", "precision", "clip_score")
    }
    extra = {
        key: {k: r.extra[key] for k, r in results.items()} for key in ("caption_accuracy", "caption_exact")
    }
    for key, pictures in first.items():
        save_png(grid(pictures, columns=config.columns), out / f"{key}.png", {})
    save_png(grid(torch.cat(list(first.values())), columns=config.columns), out / "side-by-side.png", {})
    result = DemoResult(
        out=str(out),
        report=str(out / "report.html"),
        seconds=time.monotonic() - started,
        pairs=made.pairs,
        ms_per_image=speed,
        timings=timings,
        **pick,
        **extra,
    )
    curves = {stage: read_stats(out / stage) for stage in ("ode", "gan")}
    shown = scene_captions(config.columns, TEST_SEED)
    write_demo_report(out / "report.html", result.to_json(), first, shown, curves, config.teacher_steps)
    write_atomically(out / "demo.json", json.dumps(result.to_json(), indent=1))
    return result


def evaluate_samplers(
    config: DemoConfig, teacher: Teacher, students: dict[str, OneStep], progress: Progress
) -> tuple[dict[str, EvalResult], dict[str, Tensor]]:
    """Each sampler under protocol `miniature`, and its first images [columns, 3, 64, 64]."""
    oracle, protocol = load_oracle(), PROTOCOLS["miniature"]
    networks = Networks(
        sets={"features": oracle_features(oracle)},
        clip=load_clip(str(pretrained.resolve(teacher.name) / "clip")),
        extra=oracle_measures(oracle, protocol.preprocessing),
    )
    scenes = real_scenes(config.eval_images, progress)
    texts = [text for _, batch in scenes for text in batch]
    real = build_reference(batch_source("scenes", scenes), protocol, networks.sets)
    drawing = SamplingRequest(prompts=texts, seed=protocol.seed, device=teacher.device)
    guidance = config.pairs.guidance
    sources = {name: one_step_source(name, one, drawing) for name, one in students.items()}
    sources["teacher"] = ode_source(teacher, drawing, steps=config.teacher_steps, guidance=guidance)
    results, first = {}, {}
    for name in DEMO_SAMPLERS:
        found = evaluate(
            sources[name],
            protocol,
            networks,
            metrics=("fid", "clip", "pr", "caption_accuracy"),
            reference=real,
            count=len(texts),
            resamples=0,
        )
        results[name] = found.result
        first[name] = torch.stack(first_images(sources[name], config.columns))
        progress("evaluate", len(results), len(DEMO_SAMPLERS))
    return results, first


def measure_sampling_time(config: DemoConfig, teacher: Teacher, student: OneStep) -> dict[str, float]:
    """Milliseconds of one image, end to end at batch 1: text encoder, UNet, VAE."""
    text, drawn = scene_captions(1, TEST_SEED), noise(config.seed, [0], teacher.latent_shape)

    def by_teacher() -> None:
        latents = teacher.sample(drawn, text, config.teacher_steps, config.pairs.guidance, "ddim")
        student.decoded(latents)

    return {
        "teacher": milliseconds_per_image(by_teacher, repeats=5, warmup=1),
        "student": milliseconds_per_image(lambda: student.images(drawn, text), repeats=20, warmup=3),
    }
