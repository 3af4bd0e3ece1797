"""Runs commands other than `d2g distill` on fake CUDA tensors, as tests/fake_cuda.py runs the training step.

    PYTHONPATH=.:tests python tests/fake_cuda_commands.py evaluation
    PYTHONPATH=.:tests python tests/fake_cuda_commands.py sampling
    PYTHONPATH=.:tests python tests/fake_cuda_commands.py stores
    PYTHONPATH=.:tests python tests/fake_cuda_commands.py teachers NETWORK|cascade ...
    PYTHONPATH=.:tests python tests/fake_cuda_commands.py metric

`evaluation` evaluates a teacher and a student. `sampling` draws with students and a teacher as `d2g sample`,
`explore`, `serve`, `eval export` and the demo do, and compares their images with those of folders. `stores`
makes, checks and plans pair stores. `teachers` plans, trains and judges tiny teachers of these networks.
`metric` trains, calibrates and scores LatentLPIPS. Each prints one JSON object: where the host waits in each
part.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fake_cuda import FakeCuda, GpuAttention, begin


def evaluation() -> None:
    """Evaluate a teacher and a student by FID, precision, recall and CLIP score on three batches of four, and
    time the feature network as the plan of `d2g run` does."""
    from PIL import Image

    import eval_jobs
    import jobs
    import tiny
    from distill.training.train import train
    from eval.runner.run import run_evaluation
    from teacher_training.full_run.config import FULL_RUN_PRESETS
    from teacher_training.full_run.plan import feature_seconds

    folder = Path(tempfile.mkdtemp())
    teacher = Path(tiny.save_teacher(folder / "teacher"))
    pairs = jobs.make_pairs(teacher, folder)
    train(jobs.distill_config(teacher, pairs, "train.images=4"), folder / "run")
    jobs.make_clip(teacher, folder / "clip")
    (folder / "photographs").mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(folder / "photographs" / f"{number:02}.png")
    (folder / "own_features.py").write_text("def mean(images):\n    return images.float().mean((2, 3))\n")
    sys.path.insert(0, str(folder))
    data = str(folder / "photographs")
    full_run = replace(FULL_RUN_PRESETS["quick"], data=data, features="own_features:mean")
    begin()
    print_waits(
        {
            "teacher": lambda: run_evaluation(eval_jobs.config(folder, teacher=str(teacher))),
            "student": lambda: run_evaluation(eval_jobs.config(folder, student=str(folder / "run"))),
            "plan": lambda: feature_seconds(full_run),
        }
    )


def sampling() -> None:
    """Everything that draws with a finished student, or with a teacher beside it."""
    import eval_jobs
    import jobs
    import tiny
    import tiny_teachers
    from d2g.diffusion.teacher_sampler import SolverSettings
    from distill.browser_page import DrawRequest, open_page
    from distill.exploration import open_student, path_metric, save_edits, save_mix, save_walk
    from distill.sampling import load_student
    from distill.saved_samples import save_both_samples
    from distill.training.train import train
    from eval.runner.benchmark_export import export_benchmark, plan_benchmark
    from eval.runner.run import run_evaluation
    from eval.runner.samplers import SamplingRequest, student_source

    folder, device = Path(tempfile.mkdtemp()), torch.device("cuda", 0)
    teacher = Path(tiny.save_teacher(folder / "teacher"))
    pairs = jobs.make_pairs(teacher, folder)
    student, texts = str(folder / "run"), ["a red cube", "a blue cone"]
    train(jobs.distill_config(teacher, pairs, "train.images=4"), folder / "run")
    jobs.make_clip(teacher, folder / "clip")
    images, csv = str(folder / "images"), folder / "dpg_bench.csv"
    run_evaluation(eval_jobs.config(folder, teacher=str(teacher), metrics=("clip",), keep=images))
    (folder / "twelve.txt").write_text("\n".join(f"a red cube {n}" for n in range(12)))
    csv.write_text("item_id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(texts)))
    # A generator with styles for a teacher of classes.
    classes = tiny_teachers.save_kind("unet2d", folder / "classes")
    styles = str(folder / "styles")
    pairs = folder / "class-pairs"
    generate_class_pairs(classes, folder, pairs)
    settings = (*STYLES, "train.images=4")
    train(jobs.distill_config(Path(classes), pairs, *settings, stage="gan"), folder / "styles")

    def draw_pages() -> None:
        request = DrawRequest(prompt=texts[0], seed=0, count=2, second_seed=1, position=0.5, guidance=3.0)
        sampler = load_student(student, device=device)
        page = open_page(sampler, student, str(teacher), SolverSettings(steps=2))
        page.draw(request)
        page.draw_teacher(request)

    def explore() -> None:
        sampler = open_student(student)
        metric = path_metric(student, sampler, None)
        save_walk(student, sampler, texts, [0], 4, folder / "walk", metric=metric)
        save_edits(student, sampler, *texts, [0], [0.0, 1.0], folder / "edit")
        sampler = open_student(styles)
        save_walk(styles, sampler, ["1"], [0, 1], 4, folder / "class-walk")
        save_mix(styles, sampler, ["1"], [0, 1], [], folder / "mix")

    def export() -> None:
        plan = plan_benchmark("dpg-bench", csv, None)
        request = SamplingRequest(prompts=plan.texts, device=device)
        export_benchmark(plan, student_source(student, request), folder / "benchmark", 4)

    def evaluate(**settings: Any) -> Callable[[], object]:
        return lambda: run_evaluation(eval_jobs.config(folder, **settings))

    both = SolverSettings(steps=2)
    begin()
    calls: dict[str, Callable[[], object]] = {
        "sample": lambda: save_both_samples(student, str(teacher), texts, folder / "both", 0, 2, both),
        "explore": explore,
        "serve": draw_pages,
        "export": export,
        "demo": evaluate_demo,
        "against": evaluate(student=student, metrics=("psnr",), against=images),
        "folder": evaluate(
            images=images, metrics=("psnr",), against=str(teacher), prompts=str(folder / "twelve.txt")
        ),
        "latency": evaluate(student=student, metrics=("clip",), latency=True, latency_repeats=1),
    }
    print_waits(calls)


STYLES = (
    *("student.kind=stylegan-t", "regression.losses=[]", "gan.z_conditioning=false", "gan.mix_z=0"),
    *("student.generator.channel_base=64", "student.generator.channel_max=16"),
    *("student.generator.residual_blocks=1", "student.generator.z_dim=8", "student.generator.w_dim=8"),
)
"""Settings of a tiny StyleGAN-T."""


def generate_class_pairs(teacher: str, folder: Path, pairs: Path) -> None:
    import tiny_teachers
    from pairgen.generate import generate_pairs

    generate_pairs(tiny_teachers.pair_config(teacher, folder), pairs)


def evaluate_demo() -> None:
    """The demo's measurements, with the student of the package in place of those that it trains."""
    from d2g.core.progress import quiet
    from d2g.diffusion.teacher import load_teacher
    from distill.sampling import load_student, untrained_one_step
    from miniature.config import DEMO_PRESETS
    from miniature.demo import evaluate_samplers, measure_sampling_time
    from miniature.registration import register_eval_scenes

    register_eval_scenes()
    device = torch.device("cuda", 0)
    config = replace(DEMO_PRESETS["quick"], eval_images=16, teacher_steps=2, columns=2)
    teacher, trained = load_teacher("miniature", device), load_student("miniature", device=device)
    students = {"naive": untrained_one_step("miniature", device), "ode": trained, "gan": trained}
    evaluate_samplers(config, teacher, students, quiet)
    measure_sampling_time(config, teacher, trained)


def stores() -> None:
    """Make a pair store, check it against the teacher, show it and plan another."""
    import jobs
    import tiny
    from pairgen.contact_sheet import save_sheet
    from pairgen.cost import plan_pairs
    from pairgen.generate import generate_pairs, resimulate
    from pairgen.store import writer

    folder = Path(tempfile.mkdtemp())
    teacher = Path(tiny.save_teacher(folder / "teacher"))
    pairs = jobs.make_pairs(teacher, folder)
    any_writer: Any = writer
    any_writer.ThreadPoolExecutor = InThisThread
    config = tiny.pair_config(str(teacher), str(folder / "prompts.txt"))
    begin()
    auto = replace(config, batch_size=0, text_cache=6, channels_last=True, noise="seeded")
    print_waits(
        {
            "generate": lambda: generate_pairs(config, folder / "made"),
            "auto": lambda: generate_pairs(auto, folder / "auto"),
            "plan": lambda: plan_pairs(config),
            "resimulate": lambda: resimulate(pairs, 5),
            "sheet": lambda: save_sheet(pairs, folder / "sheet.png", 6),
        }
    )


class InThisThread(Executor):
    """Runs each call at once: fake tensors know one thread."""

    def __init__(self, *arguments: object, **settings: object) -> None:
        pass

    def submit(self, call: Any, /, *arguments: Any, **settings: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*arguments, **settings))
        except BaseException as error:
            future.set_exception(error)
        return future


def print_waits(calls: dict[str, Callable[[], object]]) -> None:
    """Run calls on fake CUDA tensors, and print where the host waits in each."""
    results = {}
    for name, call in calls.items():
        mode = FakeCuda()
        with torch.autograd.set_multithreading_enabled(False), mode, GpuAttention():
            call()
        results[name] = dict(mode.waits)
    print(json.dumps(results))


def teachers(*names: str) -> None:
    """Train a teacher of each kind of network: its plan, all stages, and the check that it is trained."""
    import own_pictures
    from teacher_training.cascade.train import train_cascade
    from teacher_training.plan import Request, plan_teacher
    from teacher_training.train import check_stages, train_teacher

    root, data = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    own_pictures.class_folders(data)
    terms: dict[str, Any] = {"perceptual_weight": 1.0, "adversarial_weight": 0.5, "adversarial_start": 0.0}
    vae = replace(own_pictures.CLASSES.vae, **terms)
    begin()

    def train(name: str) -> None:
        if name == "cascade":
            train_cascade(replace(own_pictures.CASCADE, data=str(data)), root / name)
            return
        network: Any = name
        config = replace(own_pictures.CLASSES, data=str(data), network=network, vae=vae)
        plan_teacher(config, root / name, check_stages(config, None), Request())
        train_teacher(config, root / name)

    print_waits({name: partial(train, name) for name in names})


def metric() -> None:
    """Train a LatentLPIPS on fresh and on cached latents, calibrate and score one, overfit latents to it, and
    make judgments with a decoder."""
    import labeled
    import tiny
    from latent_lpips.config import CalibrateConfig
    from latent_lpips.training.calibrate import calibrate_folder
    from latent_lpips.training.classifier import train_classifier
    from latent_lpips.training.config import (
        ClassifyConfig,
        HeadsConfig,
        OverfitConfig,
        PatchConfig,
        ScoreConfig,
        TripletsConfig,
    )
    from latent_lpips.training.make_triplets import make_triplets
    from latent_lpips.training.overfit import overfit_latents
    from latent_lpips.training.score import score_folder

    root = Path(tempfile.mkdtemp())
    teacher = tiny.save_teacher(root / "teacher")
    data = str(labeled.save_classes(root / "data"))
    for number, name in enumerate(("train", "val")):
        labeled.save_judgments(root / "judgments" / name / "cnn", seed=number)
    begin()
    shape: dict[str, Any] = {"size": 16, "width": 1 / 16, "grid": 1}
    fresh = ClassifyConfig(data=data, latents=teacher, batch=12, epochs=2, held_out=0.25, workers=0, **shape)
    inputs: dict[str, Any] = {"latents": teacher, "weights": str(Path(teacher) / "latent_lpips")}
    heads = CalibrateConfig(epochs=2, batch=8, held_out=0.25)
    patch = PatchConfig(batch=5)
    judged = HeadsConfig(data=str(root / "judgments"), heads=heads, patch=patch, **inputs)
    scored = ScoreConfig(
        data=str(root / "judgments"), baselines=("l2", "ssim"), patch=patch, resamples=20, **inputs
    )
    triplets = TripletsConfig(data=data, decoders=(teacher,), kinds=("decoder",), size=16)
    points: dict[str, Any] = {"count": 2, "size": 32, "steps": 4, "report_steps": 2, "checkpoint_steps": 2}
    cached = replace(fresh, crops=1, precision="bf16")
    print_waits(
        {
            "fresh": lambda: train_classifier(fresh, root / "fresh"),
            "cached": lambda: train_classifier(cached, root / "cached"),
            "calibrate": lambda: calibrate_folder(judged, root / "calibrate"),
            "overfit": lambda: overfit_latents(
                OverfitConfig(data=data, **points, **inputs), root / "overfit"
            ),
            "score": lambda: score_folder(scored),
            "triplets": lambda: make_triplets(triplets, root / "triplets"),
        }
    )


if __name__ == "__main__":
    modes: dict[str, Callable[..., None]] = {
        "evaluation": evaluation,
        "sampling": sampling,
        "stores": stores,
        "teachers": teachers,
        "metric": metric,
    }
    modes[sys.argv[1]](*sys.argv[2:])
