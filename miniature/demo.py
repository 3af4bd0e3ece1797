"""The demo: the complete method on the miniature, with the functions that an SD 1.5 run uses."""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed import process_group
from d2g.core.distributed.process_count import save_process_count
from d2g.core.png import image_grid, save_png
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import noise
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion import pretrained
from d2g.diffusion.teacher import Teacher, load_teacher
from distill.sampling import OneStepSampler, load_student, untrained_one_step
from eval.evaluation import evaluate
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
from pairgen.store.reader import PairReader
from teacher_training.full_run.stages import distill_teacher
from teacher_training.times import PartTimes

PROMPT_SEED = 3  # seed 1 trained the teacher, seed 2 is for tests
DEMO_SAMPLERS = ("naive", "ode", "gan", "teacher")


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo measured. Dictionaries are keyed by sampler; `fid` uses the oracle's features."""

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
        """Return the result as a dictionary, as demo.json holds it."""
        return asdict(self)


def run_demo(config: DemoConfig, out: Path, progress: Progress = quiet) -> DemoResult | None:
    """Generate pairs, train both stages, evaluate, and write a report to OUT. Call on every rank.

    Returns None on other ranks than 0. Finished parts are kept, so an interrupted demo resumes when it is run
    again. Raises what the stages raise.
    """
    register_eval_scenes()
    started, times = time.monotonic(), PartTimes()
    device = process_group.init()
    save_process_count(out)
    # Captions of scenes that the teacher was not trained on.
    prompts = out / "prompts.txt"
    captions = list(dict.fromkeys(scene_captions(config.pairs.num_pairs, PROMPT_SEED)))
    if process_group.rank() == 0:
        write_atomically(prompts, "\n".join(captions) + "\n")
    process_group.barrier()
    pairs = replace(config.pairs, prompts=str(prompts), seed=config.seed)
    ode, gan = replace(config.ode, seed=config.seed), replace(config.gan, seed=config.seed)
    distill_teacher(pairs, ode, gan, out, times, progress)
    with times.measure("evaluation"):
        # Students without training, after stage 1 and after stage 2, beside the teacher.
        name = config.pairs.teacher
        teacher = load_teacher(name, device)
        students = {
            "naive": untrained_one_step(name, device),
            "ode": load_student(str(out / "ode"), device=device),
            "gan": load_student(str(out / "gan"), device=device),
        }
        results, images = evaluate_samplers(config, teacher, students, progress)
    if process_group.rank() != 0:
        return None
    speed = measure_sampling_time(config, teacher, students["gan"])

    # The report and demo.json hold the same result.
    result = DemoResult(
        out=str(out),
        report=str(out / "report.html"),
        seconds=time.monotonic() - started,
        pairs=len(PairReader(out / "pairs")),
        ms_per_image=speed,
        timings=times.seconds,
        **_scores(results),
    )
    _write_output(config, out, result, results, images)
    return result


def _scores(results: dict[str, EvalResult]) -> dict[str, dict[str, float]]:
    """Return every score of the demo, by metric and sampler."""
    scores = {
        key: {sampler: float(getattr(result, key) or 0.0) for sampler, result in results.items()}
        for key in ("fid", "recall", "precision", "clip_score")
    }
    for key in ("caption_accuracy", "caption_exact"):
        scores[key] = {sampler: result.extra[key] for sampler, result in results.items()}
    return scores


def _write_output(
    config: DemoConfig,
    out: Path,
    result: DemoResult,
    results: dict[str, EvalResult],
    images: dict[str, Tensor],
) -> None:
    """Write the images, report.html and demo.json."""
    for sampler, pixels in images.items():
        save_png(image_grid(pixels, columns=config.columns), out / f"{sampler}.png", {})
    save_png(
        image_grid(torch.cat(list(images.values())), columns=config.columns), out / "side-by-side.png", {}
    )
    curves = {stage: read_stats(out / stage) for stage in ("ode", "gan")}
    prompts = scene_captions(config.columns, TEST_SEED)
    write_demo_report(
        out / "report.html", result.to_json(), results, images, prompts, curves, config.teacher_steps
    )
    write_atomically(out / "demo.json", json.dumps(result.to_json(), indent=1))


def evaluate_samplers(
    config: DemoConfig, teacher: Teacher, students: dict[str, OneStepSampler], progress: Progress
) -> tuple[dict[str, EvalResult], dict[str, Tensor]]:
    """Evaluate each sampler under protocol `miniature`, all with the same noise and test captions.

    Returns the results and the first images [columns, 3, 64, 64], by sampler.
    """
    # Networks, reference and sources.
    oracle, protocol = load_oracle(), PROTOCOLS["miniature"]
    networks = Networks(
        sets={"features": oracle_features(oracle)},
        clip=load_clip(str(pretrained.resolve(teacher.name) / "clip")),
        extra=oracle_measures(oracle, protocol.preprocessing),
    )
    scenes = real_scenes(config.eval_images, progress)
    texts = [text for _, batch in scenes for text in batch]
    reference = build_reference(batch_source("scenes", scenes), protocol, networks.sets)
    request = SamplingRequest(prompts=texts, seed=protocol.seed, device=teacher.device)
    guidance = config.pairs.guidance
    sources = {name: one_step_source(name, student, request) for name, student in students.items()}
    sources["teacher"] = ode_source(teacher, request, steps=config.teacher_steps, guidance=guidance)
    results, first = {}, {}
    # Evaluate one sampler after the other.
    for name in DEMO_SAMPLERS:
        evaluation = evaluate(
            sources[name],
            protocol,
            networks,
            metrics=("fid", "clip", "pr", "caption_accuracy"),
            reference=reference,
            count=len(texts),
            resamples=0,
        )
        results[name] = evaluation.result
        first[name] = torch.stack(first_images(sources[name], config.columns))
        progress("evaluate", len(results), len(DEMO_SAMPLERS))
    return results, first


def measure_sampling_time(config: DemoConfig, teacher: Teacher, student: OneStepSampler) -> dict[str, float]:
    """Return milliseconds per image, end to end at batch 1: text encoder, UNet, VAE."""
    prompt, latent_noise = scene_captions(1, TEST_SEED), noise(config.seed, [0], teacher.latent_shape)

    def sample_teacher() -> None:
        latents = teacher.sample(latent_noise, prompt, config.teacher_steps, config.pairs.guidance, "ddim")
        student.decode(latents)

    return {
        "teacher": milliseconds_per_image(sample_teacher, repeats=5, warmup=1),
        "student": milliseconds_per_image(lambda: student.images(latent_noise, prompt), repeats=20, warmup=3),
    }
