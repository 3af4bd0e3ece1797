"""The measurements of benchmarks/gpu.py.

Each adds rows {column: value} to its table as they are measured, and returns notes and goals.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import latent_lpips, pairs
from benchmarks.common import compare, median
from benchmarks.gpu_models import random_teacher
from benchmarks.gpu_rows import DEVICE, NAN, Options, Result, Row, Rows, goal, stated_peak
from d2g.core.config import override
from d2g.core.distributed import process_group
from d2g.core.seeds import noise
from d2g.diffusion.teacher import load_teacher
from distill.config.presets import DISTILL_PRESETS
from distill.sampling import untrained_one_step
from distill.training.train import train
from eval.measure.latency import milliseconds_per_image
from eval.metrics.feature_stats import FeatureStats, Origin
from eval.networks.inception import fid_inception, load_inception
from miniature.sampling import scene_captions
from pairgen.config import PairConfig
from pairgen.generate import generate_pairs

ROOT = Path(__file__).resolve().parents[1]


def gpu_tests(options: Options, rows: Rows) -> Result:
    """The tests with the mark gpu; those that have passed before this item was stopped do not run again.
    Without a GPU two of them run on the CPU, to show that they do."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib"]
    command += ["-v", "-rfE", "-m", "gpu"]
    # Warnings of other versions of packages are no failure here. The files are named, because others need
    # packages for tests that such a machine may lack.
    command += ["-W", "default", "-p", "no:cacheprovider"]
    on_cpu = {} if DEVICE.type == "cuda" else {"D2G_GPU_TESTS_ON_CPU": "1"}
    command += ["tests/test_on_a_gpu.py", "-k", "metric"] if on_cpu else gpu_test_files()
    passed = [str(row["test"]) for row in rows.read()]
    command += [word for test in passed for word in ("--deselect", test)]
    environment, lines = {**os.environ, **on_cpu}, []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pytest:
        assert pytest.stdout is not None
        for line in pytest.stdout:  # at once, so that the log of a test that hangs names it
            print(line, end="", flush=True)
            lines.append(line.strip())
            if match := re.match(r"(tests/.+?) PASSED\b", line):
                rows.add({"test": match[1], "passed": "yes"})
    if pytest.returncode and not (pytest.returncode == NO_TESTS_LEFT and passed):
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise RuntimeError(f"pytest: {'; '.join([*failed, lines[-1]])}")
    return rows.finish([f"The last of its starts: {lines[-1]}"])


NO_TESTS_LEFT = 5
"""pytest's exit code if all tests are deselected."""


def gpu_test_files() -> list[str]:
    """The files that have tests with the mark gpu."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [
        str(file.relative_to(ROOT)) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")
    ]


# Matrix products


def matmul(options: Options, rows: Rows) -> Result:
    """FLOP/s of square matrix products by type and size."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "TF32": torch.float32, "fp32": torch.float32}
    for size in (128, 256) if options.tiny else (4096, 8192, 16384):
        for name, dtype in types.items():
            torch.backends.cuda.matmul.allow_tf32 = name == "TF32"
            key = {"type": name, "size": size}
            rows.measure(key, lambda: {"TFLOP/s": pairs.matmul_peak(dtype, size) / 1e12})  # noqa: B023
    return rows.finish([f"By the data sheet for bf16: {stated_peak() / 1e12:.0f} TFLOP/s."])


# Pairs


def pairs_sd15(options: Options, rows: Rows) -> Result:
    """SD 1.5, 50 DDIM steps."""
    return _pairs("sd15", options, rows, steps=50, batches=[1, 8, 32])


def pairs_sdxl(options: Options, rows: Rows) -> Result:
    """SDXL, 20 DDIM steps: 50 of them would not fit the time."""
    return _pairs("sdxl", options, rows, steps=20, batches=[1, 8])


def _pairs(kind: str, options: Options, rows: Rows, steps: int, batches: list[int]) -> Result:
    prompts = options.out / "prompts.txt"
    prompts.write_text("\n".join(scene_captions(128, 0)))
    config = PairConfig(
        teacher=random_teacher(kind, options),
        prompts=str(prompts),
        num_pairs=128,
        steps=2 if options.tiny else steps,
        guidance=8.0,
        precision="fp32" if options.tiny else "fp16",
        channels_last=not options.tiny,
        compile=False,
    )
    sizes, repeats, peak_size = ([1, 2], 1, 256) if options.tiny else (batches, 2, 8192)
    race = pairs.Race(config)
    flops = cache(lambda: (pairs.row_flops(race.job), pairs.matmul_peak(race.product_dtype, peak_size)))

    def row(size: int, compiled: bool) -> Row:
        measured = race.row(size, repeats, compiled)
        flop, peak = flops()
        return {
            "ours, pairs/s": measured["ours"],
            "diffusers, pairs/s": measured["diffusers"],
            "ratio": measured["ours"] / measured["diffusers"],
            "largest difference": measured["largest difference"],
            "TFLOP a pair": flop / 1e12,
            "share of the matmul peak": measured["ours"] * flop / peak,
        }

    for size in sizes:
        rows.measure({"batch": size, "ours": "eager"}, lambda: row(size, False))  # noqa: B023
    # Inductor takes a minute even for a tiny network, and minutes for SDXL.
    if kind == "sd15":
        rows.measure({"batch": sizes[-1], "ours": "compiled"}, lambda: row(sizes[-1], not options.tiny))
    notes = [
        f"{config.steps} steps, guidance 8, {config.precision}, random weights, diffusers eager as it comes. "
        f"The peak is that of a product of {peak_size} x {peak_size} in the same run."
    ]
    goals = [
        goal(f"{kind} pairs against diffusers", max(rows.values("ratio"), default=NAN), at_least=1.5),
        goal(
            f"{kind} pairs, share of the matmul peak",
            max(rows.values("share of the matmul peak"), default=NAN),
            at_least=0.5,
        ),
    ]
    return rows.finish(notes, goals)


# The metric


DECODED_POSITIONS = 4 * 64 * 64
"""Largest case of decoding and LPIPS: it takes 6 GiB for each latent of 64x64."""


def metric(options: Options, rows: Rows) -> Result:
    """A distance and its gradient: ours, the authors' form of it, and a decoder of SD's size plus LPIPS."""
    cases = [(8, 1)] if options.tiny else [(64, 1), (64, 4), (64, 16), (128, 4)]
    authors, form = _authors(options)
    with tempfile.TemporaryDirectory() as folder:
        weights = latent_lpips.checkpoints(Path(folder))
        ours = {"who": "ours", "weights": str(weights), "root": str(ROOT)}
        if not options.theirs and authors["open"]["who"] == "plain":
            authors["open"] |= {**ours, "who": "plain", "precision": "fp32"}
        contestants: dict[str, dict[str, Any]] = {
            form: authors,
            "ours, fp32": {"python": sys.executable, "open": {**ours, "precision": "fp32"}},
            "ours, auto": {"python": sys.executable, "open": {**ours, "precision": "auto"}},
        }
        decoded = {"who": "decoded", **({"blocks": [32] * 4} if options.tiny else {})}
        for case in cases:
            running = dict(contestants)
            if case[0] ** 2 * case[1] <= DECODED_POSITIONS:
                running["decode and LPIPS"] = {"python": sys.executable, "open": decoded}
            rows.measure(
                {"latent": latent_lpips.latent(case), "batch": case[1]},
                lambda: _contest(case, running, form, options, weights.parents[1]),  # noqa: B023
            )
        # The trunk's share of the matrix units, at a batch that fills them.
        if not options.tiny and DEVICE.type == "cuda":
            rows.measure({"latent": "trunk's use of the matrix units"}, lambda: _use_of_peak(weights))
    goals = [
        goal(f"E-LatentLPIPS against {form}", min(rows.values("authors' / ours"), default=NAN), at_least=5),
        goal(
            "E-LatentLPIPS, share of the bf16 matmul peak",
            max(rows.values("share of the bf16 peak"), default=NAN),
            at_least=0.6,
        ),
    ]
    notes = [f"ms and extra MiB of a forward and a backward pass. The authors' form: {form}."]
    return rows.finish(notes, goals)


def _authors(options: Options) -> tuple[dict[str, Any], str]:
    """The contestant that stands for the authors' package: itself if a Python has it, else the same distance
    in its form, layer by layer through autograd, with batch norms; and its name."""
    python = options.theirs or (sys.executable if importlib.util.find_spec("elatentlpips") else "")
    if python:
        return {"python": python, "open": {"who": "theirs", "space": "sd15"}}, "elatentlpips 0.2"
    return {"python": sys.executable, "open": {"who": "plain"}}, "the authors' form in this code"


def _contest(
    case: tuple[int, int], contestants: Mapping[str, Any], form: str, options: Options, folder: Path
) -> Row:
    """ms and MiB of each contestant in a case, and the ratio to the authors' form."""
    times = latent_lpips.contest(case, dict(contestants), 1 if options.tiny else 5, folder)
    cells = {
        f"{name}, {unit}": value
        for name, row in times.items()
        for unit, value in (("ms", 1000 * row["wall"]), ("MiB", row["extra_mib"]))
    }
    return {**cells, "authors' / ours": times[form]["wall"] / times["ours, auto"]["wall"]}


def _use_of_peak(weights: Path) -> Row:
    """The trunk's FLOP/s in bf16, as a share of a matrix product's."""
    speed, peak = (
        latent_lpips.trunk_speed(weights, "bf16", in_a_row=5),
        pairs.matmul_peak(torch.bfloat16, 8192),
    )
    return {"batch": 16, "trunk, TFLOP/s": speed / 1e12, "share of the bf16 peak": speed / peak}


# Latency


def latency(options: Options, rows: Rows) -> Result:
    """Milliseconds per image at batch 1, from prompt to pixels: one step, and the teacher's 50 steps."""
    name, steps = random_teacher("sd15", options), 2 if options.tiny else 50
    teacher = load_teacher(name, DEVICE, "fp16")
    student = untrained_one_step(name, DEVICE)
    for network in (student.student, student.conditioner, student.vae):
        network.half()
    prompt, start = scene_captions(1, 0), noise(0, [0], teacher.latent_shape)
    start_half = start.to(DEVICE).half()

    def draw_teacher() -> torch.Tensor:
        return teacher.sample(start, prompt, steps, 8.0, "ddim").half()

    def draw_student() -> torch.Tensor:
        return student.latents(start_half, prompt)

    calls: dict[str, Callable[[], object]] = {
        f"teacher, {steps} steps": lambda: student.decode(draw_teacher()),
        "one step": lambda: student.decode(draw_student()),
        f"teacher, {steps} steps, not decoded": draw_teacher,
        "one step, not decoded": draw_student,
    }
    for who, call in calls.items():
        repeats = 3 if options.tiny else 5 if "teacher" in who else 20
        rows.measure({"who": who}, lambda: {"ms per image": milliseconds_per_image(call, repeats=repeats)})  # noqa: B023
    # Whole images, then latents.
    ms = [rows.values("ms per image", who=who) or [NAN] for who in calls]
    image, latent = ms[0][0] / ms[1][0], ms[2][0] / ms[3][0]
    notes = [
        "SD 1.5's size, random weights, fp16, batch 1, guidance 8, from the prompt on. One step is "
        f"{image:.1f} times as fast for an image, {latent:.1f} times for its latents."
    ]
    return rows.finish(notes, [goal(f"one step against {steps}, image", image, at_least=25)])


# FID statistics


def fid(options: Options, rows: Rows) -> Result:
    """Images per second from uint8 pixels in memory to mean and covariance."""
    size, count = (64, 4) if options.tiny else (512, 64)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inception.pth"
        state = fid_inception().state_dict()
        torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, file)
        network = load_inception(file, DEVICE)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    stats = FeatureStats(
        network.dim, Origin(features="benchmark", features_sha256="", resize="native", source="")
    )
    calls = {
        "resize and Inception": lambda: network(images).cpu(),
        "with statistics": lambda: stats.update(network(images).cpu()),
    }
    seconds = compare(calls, 1 if options.tiny else 5)
    for name, values in seconds.items():
        rows.measure({"part": name}, lambda: {"images/s": count / median(values)})  # noqa: B023
    return rows.finish([f"Batches of {count} images of {size}x{size}, IEEE fp32."])


# The miniature


def miniature_first_stage(options: Options, rows: Rows) -> Result:
    """Pairs for a minute, then the first stage for five."""
    folder = options.out / "miniature"
    prompts = options.out / "miniature-prompts.txt"
    count = 64 if options.tiny else 20_000
    prompts.write_text("\n".join(dict.fromkeys(scene_captions(count, 3))) + "\n")
    config = PairConfig(
        teacher="miniature",
        prompts=str(prompts),
        steps=2 if options.tiny else 20,
        guidance=3.0,
        batch_size=512,  # small batches leave a GPU waiting for launches
    )
    generated = generate_pairs(config, folder / "pairs")
    speed = {"images": generated.pairs, "images/s": generated.pairs_per_sec}
    rows.measure({"stage": "pairs"}, lambda: speed)
    return _miniature("ode", options, rows)


def miniature_second_stage(options: Options, rows: Rows) -> Result:
    """The second stage for five minutes, from the first one."""
    return _miniature("gan", options, rows)


def _miniature(stage: str, options: Options, rows: Rows) -> Result:
    from benchmarks.student_scores import score

    folder = options.out / "miniature"
    config = replace(DISTILL_PRESETS["miniature"][stage], pairs=str(folder / "pairs"))
    config = replace(config, init=str(folder / "ode") if stage == "gan" else "")
    length = (
        ["train.images=64", "train.batch_size=8"]
        if options.tiny
        else ["train.minutes=5", "train.images=10000000"]
    )

    def trained() -> Row:
        summary = train(override(config, length), folder / stage)
        process_group.finish()
        return {"images": summary.images, "images/s": summary.images_per_sec}

    # Rows of their own: scores that fail, or are stopped, do not cost the training. A new OUT lacks its run.
    if not (folder / stage).is_dir():
        rows.restart([row for row in rows.read() if row.get("part") != "training"])
    rows.measure({"stage": stage, "part": "training"}, trained)
    rows.measure(
        {"stage": stage, "part": "scores"}, lambda: score(folder / stage, 32 if options.tiny else 1024)
    )
    scores = "Frechet distances by network, precision and recall on test scenes."
    rate = "The learning rate does not fall in five minutes: these are no scores of a finished recipe."
    return rows.finish([scores, rate])
