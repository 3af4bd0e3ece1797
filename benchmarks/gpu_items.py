"""The measurements of benchmarks/gpu.py. Each returns {"rows": [{column: value}], "notes": [line]}."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import latent_lpips, pairs
from benchmarks.common import compare, median
from benchmarks.training_step import RandomStep, fill_randomly
from d2g.core.atomic_files import write_atomically
from d2g.core.config import override
from d2g.core.distributed import process_group
from d2g.core.peak_flops import peak_flops
from d2g.core.precision import set_training_arithmetic
from d2g.core.seeds import noise
from d2g.diffusion.pretrained import load_on_meta, new_tokenizer
from d2g.diffusion.teacher import load_teacher
from distill.config.presets import DISTILL_PRESETS, TABLE_A1
from distill.config.run import DistillConfig
from distill.planning.flops import flop_per_image
from distill.planning.memory import CONTEXT_GIB, predict
from distill.planning.reference_models import configs_only
from distill.sampling import untrained_one_step
from distill.training.train import train
from eval.measure.latency import milliseconds_per_image
from eval.metrics.feature_stats import FeatureStats, Origin
from eval.networks.inception import fid_inception, load_inception
from miniature.sampling import scene_captions
from pairgen.config import PairConfig
from pairgen.generate import generate_pairs

Result = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where results and the random models go, and whether sizes are tiny."""

    out: Path
    tiny: bool


def gpu_tests(options: Options) -> Result:
    """The tests with the mark gpu; without a GPU, the tests of what switches to the GPU's arithmetic."""
    chosen = ["-m", "gpu", "tests"] if DEVICE.type == "cuda" else ["tests/d2g/test_precision.py"]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "-q", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    if done.returncode:
        raise RuntimeError(f"pytest: {(done.stdout.strip().splitlines() or [done.stderr])[-1]}")
    return {"rows": [], "notes": [f"`{' '.join(chosen)}`: {done.stdout.strip().splitlines()[-1]}"]}


# Matrix products


def matmul(options: Options) -> Result:
    """FLOP/s of square matrix products by type and size."""
    rows = []
    for size in (128, 256) if options.tiny else (4096, 8192, 16384):
        for name, dtype, tf32 in (
            ("bf16", torch.bfloat16, False),
            ("fp16", torch.float16, False),
            ("TF32", torch.float32, True),
            ("fp32", torch.float32, False),
        ):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            rows.append({"type": name, "size": size, "TFLOP/s": pairs.matmul_peak(dtype, size) / 1e12})
    return {"rows": rows, "notes": [f"Stated for bf16: {_stated_peak() / 1e12:.0f} TFLOP/s."]}


def _stated_peak() -> float:
    """FLOP/s of the card in bf16 by its data sheet; NaN on a CPU and for an unknown card."""
    peak = peak_flops(torch.cuda.get_device_name(), "bf16") if DEVICE.type == "cuda" else None
    return float("nan") if peak is None else peak


# Teachers with random weights


def random_teacher(kind: str, options: Options) -> str:
    """A pipeline folder of SD 1.5's or SDXL's size in fp16 under OUT/models; tiny: the tests' pipelines."""
    folder = options.out / "models" / (f"tiny-{kind}" if options.tiny else kind)
    if (folder / "model_index.json").is_file():
        return str(folder)
    if options.tiny:
        import tiny
        import tiny_teachers

        return tiny.save_teacher(folder) if kind == "sd15" else tiny_teachers.save_sdxl(folder)
    return _save_random_pipeline(kind, folder)


def _save_random_pipeline(kind: str, folder: Path) -> str:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    with tempfile.TemporaryDirectory() as scratch:
        configs = configs_only(kind, Path(scratch) / "configs")
        parts = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if kind == "sdxl" else [])]
        networks: dict[str, Any] = {part: load_on_meta(configs, part) for part in parts}
        for network in networks.values():
            fill_randomly(network, DEVICE)
            network.half()
        # The vocabulary does not matter for the speed, the 77 tokens do.
        words = scene_captions(200, 0)
        tokenizers = {
            part.replace("text_encoder", "tokenizer"): new_tokenizer(words, Path(scratch) / part, 400, 77)
            for part in parts
            if part.startswith("text_encoder")
        }
        scheduler = DDIMScheduler.from_pretrained(configs, subfolder="scheduler")
        if kind == "sdxl":
            StableDiffusionXLPipeline(
                **networks, **tokenizers, scheduler=scheduler, add_watermarker=False
            ).save_pretrained(folder)
        else:
            StableDiffusionPipeline(
                **networks,
                **tokenizers,
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            ).save_pretrained(folder)
    return str(folder)


# Pairs


def pairs_sd15(options: Options) -> Result:
    """SD 1.5, 50 DDIM steps."""
    return _pairs("sd15", options, steps=50, batches=[1, 8, 32])


def pairs_sdxl(options: Options) -> Result:
    """SDXL, 20 DDIM steps: 50 of them would not fit the time."""
    return _pairs("sdxl", options, steps=20, batches=[1, 8])


def _pairs(kind: str, options: Options, steps: int, batches: list[int]) -> Result:
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
    sizes, repeats, peak_size = ([1, 2], 1, 256) if options.tiny else (batches, 2, 4096)
    result = pairs.race(config, sizes, repeats, peak_size)
    rows = [
        {
            "batch": row["batch"],
            "ours, pairs/s": row["ours"],
            "diffusers, pairs/s": row["diffusers"],
            "ratio": row["ours"] / row["diffusers"],
            "largest difference": row["largest difference"],
            "share of the matmul peak": row["ours"] * result["flops"] / result["peak"],
        }
        for row in result["rows"]
    ]
    notes = [
        f"{config.steps} steps, guidance 8, {config.precision}, random weights: "
        f"{result['flops'] / 1e12:.4g} TFLOP a pair; matmul peak {result['peak'] / 1e12:.4g} TFLOP/s.",
    ]
    return {"rows": rows, "notes": notes}


# Training steps

Settings = tuple[str, ...]
R1_OFF: Settings = ("gan.penalty=none",)
R1_ON: Settings = ("gan.penalty=single", "gan.r1_gamma=1", "gan.r1_rows=1", "gan.r1_interval=1")
STEPS: tuple[tuple[str, str, Settings], ...] = (
    ("stage 1", "ode", ()),
    ("stage 1, contiguous weights", "ode", ("engine.channels_last=off",)),
    ("stage 1, recomputation", "ode", ("engine.activation_checkpointing=true",)),
    ("stage 2, no R1", "gan", R1_OFF),
    ("stage 2, R1 of one row in each step", "gan", R1_ON),
)
COMPILED: tuple[tuple[str, str, Settings], ...] = (
    ("stage 1, inductor", "ode", ("engine.compile=inductor",)),
    ("stage 2, R1 of one row, inductor", "gan", ("engine.compile=inductor", *R1_ON)),
)
SDXL_ENGINE: Settings = ("engine.activation_checkpointing=true", "engine.parallel=ddp")
"""SDXL does not fit without recomputation."""


def steps_sd15(options: Options) -> Result:
    """Eager steps at SD 1.5's size."""
    return _steps("sd15-cfg3", STEPS, options, ("engine.activation_checkpointing=false",))


def steps_sdxl(options: Options) -> Result:
    """Eager steps at SDXL's size, recomputed; its recipe has no R1, here it is measured all the same."""
    variants = tuple(v for v in STEPS if "recomputation" not in v[0])
    # At tiny sizes SD 1.5's item has every variant, and this one has one of each stage.
    variants = (variants[0], variants[-1]) if options.tiny else variants
    return _steps("sdxl-cfg7", variants, options, SDXL_ENGINE)


def compiled_steps_sd15(options: Options) -> Result:
    """Compiled steps at SD 1.5's size."""
    # At tiny sizes compilation takes all the time, so each item compiles one stage.
    return _steps(
        "sd15-cfg3",
        COMPILED[1:] if options.tiny else COMPILED,
        options,
        ("engine.activation_checkpointing=false",),
    )


def compiled_steps_sdxl(options: Options) -> Result:
    """Compiled steps at SDXL's size."""
    return _steps("sdxl-cfg7", COMPILED[:1] if options.tiny else COMPILED, options, SDXL_ENGINE)


def _steps(
    preset: str, variants: tuple[tuple[str, str, Settings], ...], options: Options, common: Settings
) -> Result:
    # Write each row at once: an item that is stopped goes on with the variant that it did not finish.
    kind_of_run = "compiled" if variants[0] in COMPILED else "eager"
    file = options.out / f"{preset}-{kind_of_run}.rows.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        kind = DISTILL_PRESETS[preset].model
        teacher = random_teacher(kind, options) if options.tiny else configs_only(kind, Path(folder) / kind)
        for name, stage, settings in variants:
            if name in {row["variant"] for row in rows}:
                continue
            config = override(replace(TABLE_A1[preset][stage], teacher=teacher), [*common, *settings])
            if options.tiny:
                backend = {"inductor": "eager"}.get(config.engine.compile, "")
                config = override(config, ["train.precision=fp32", f"engine.compile={backend}"])
            rows.append({"variant": name, **_time_steps(config, Path(folder), options)})
            print(rows[-1], flush=True)
            write_atomically(file, json.dumps(rows))
    notes = [
        "Text encoders are not part of the step. MFU: FLOP of the forward and backward passes of networks, "
        "losses and R1, without recomputation (distill/planning/flops.py), against "
        f"{_stated_peak() / 1e12:.0f} TFLOP/s. R1 in the recipes comes every 16 steps.",
    ]
    return {"rows": rows, "notes": notes}


def _time_steps(config: DistillConfig, folder: Path, options: Options) -> Result:
    """Time of a step at the largest batch that the forecast lets fit."""
    config, forecast = _largest_batch(config, options)
    empty = dict.fromkeys(("s per step", "images/s", "TFLOP per step", "MFU", "peak GiB"), float("nan"))
    row = {"batch": config.train.batch_size, "forecast GiB": forecast, **empty}
    if forecast > _memory_gib():
        return {**row, "note": f"needs {forecast:.1f} GiB"}
    set_training_arithmetic(DEVICE, config.train.precision == "bf16")
    step = RandomStep(config, DEVICE, folder)
    step(at_once=True)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    repeats, warm_up = (1, 1) if options.tiny else (8, 3)
    seconds = median(compare({"step": step}, repeats, warm_up)["step"])
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else float("nan")
    flops = flop_per_image(config) * config.train.batch_size
    measured = {
        "s per step": seconds,
        "images/s": config.train.batch_size / seconds,
        "TFLOP per step": flops / 1e12,
        "MFU": flops / seconds / _stated_peak(),
        "peak GiB": peak,
    }
    del step
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    torch.compiler.reset()
    return {**row, **measured, "note": ""}


def _largest_batch(config: DistillConfig, options: Options) -> tuple[DistillConfig, float]:
    """The config with the largest batch of 2 to 64 rows that fits by the forecast, and its GiB."""

    def sized(rows: int) -> DistillConfig:
        return override(config, [f"train.batch_size={rows}"])

    def gib(rows: int) -> float:
        # Settings that the forecast does not look at.
        plain = override(sized(rows), ["engine.compile=", "engine.channels_last=auto"])
        return _forecast(plain)

    if options.tiny:
        return sized(2), gib(2)
    # The forecast grows linearly once activations are the peak.
    per_row = (gib(64) - gib(32)) / 32
    fitting = [n for n in (4, 8, 16, 24, 32, 48, 64) if gib(64) - (64 - n) * per_row <= 0.92 * _memory_gib()]
    rows = max(fitting, default=2)
    return sized(rows), gib(rows)


@cache
def _forecast(config: DistillConfig) -> float:
    return predict(config, 1).total + CONTEXT_GIB


def _memory_gib() -> float:
    """Memory of the GPU; on a CPU, where nothing is measured, as much as an H100 has."""
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if DEVICE.type == "cuda" else 80.0


# The metric


def metric(options: Options) -> Result:
    """A distance and its gradient: ours in fp32 and bf16, and a decoder of SD's size plus LPIPS."""
    cases = [(8, 1)] if options.tiny else [(64, 1), (64, 16), (128, 4)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = latent_lpips.checkpoints(Path(folder))
        ours = {"who": "ours", "weights": str(weights), "root": str(ROOT)}
        contestants: dict[str, dict[str, Any]] = {
            f"ours, {precision}": {"python": sys.executable, "open": {**ours, "precision": precision}}
            for precision in (("auto",) if options.tiny else ("fp32", "auto"))
        }
        decoded = {"who": "decoded", **({"blocks": [32] * 4} if options.tiny else {})}
        contestants["decode and LPIPS"] = {"python": sys.executable, "open": decoded}
        for case in cases:
            for name, row in latent_lpips.contest(
                case, contestants, 1 if options.tiny else 5, weights.parents[1]
            ).items():
                rows.append(
                    {
                        "latent": latent_lpips.latent(case),
                        "batch": case[1],
                        "who": name,
                        "ms": 1000 * row["wall"],
                        "extra MiB": row["extra_mib"],
                    }
                )
    note = "The authors' package: `benchmarks/latent_lpips.py --theirs PYTHON`."
    return {"rows": rows, "notes": [note]}


# Latency


def latency(options: Options) -> Result:
    """Milliseconds per image at batch 1, from prompt to pixels: one step, and the teacher's 50 steps."""
    name, steps = random_teacher("sd15", options), 2 if options.tiny else 50
    precision: Any = "fp32" if options.tiny else "fp16"
    teacher = load_teacher(name, DEVICE, precision)
    student = untrained_one_step(name, DEVICE)
    if not options.tiny:
        for network in (student.student, student.conditioner, student.vae):
            network.half()
    prompt, start = scene_captions(1, 0), noise(0, [0], teacher.latent_shape).to(DEVICE)
    start_half = start if options.tiny else start.half()

    def sample_teacher() -> None:
        latents = teacher.sample(start, prompt, steps, 8.0, "ddim")
        student.decode(latents.to(start_half.dtype))

    def sample_student() -> None:
        student.decode(student.latents(start_half, prompt))

    calls: dict[str, Callable[[], None]] = {
        f"teacher, {steps} steps": sample_teacher,
        "one step": sample_student,
    }
    ms = {who: milliseconds_per_image(call, repeats=3 if options.tiny else 20) for who, call in calls.items()}
    first = next(iter(ms.values()))
    rows = [{"who": who, "ms per image": value, "speed": first / value} for who, value in ms.items()]
    return {"rows": rows, "notes": [f"SD 1.5's size, random weights, {precision}, batch 1, guidance 8."]}


# FID statistics


def fid(options: Options) -> Result:
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
    rows = [{"part": name, "images/s": count / median(values)} for name, values in seconds.items()]
    return {"rows": rows, "notes": [f"Batches of {count} images of {size}x{size}, IEEE fp32."]}


# The miniature


def miniature_first_stage(options: Options) -> Result:
    """Pairs for a minute, then the first stage for five."""
    folder = options.out / "miniature"
    prompts = options.out / "miniature-prompts.txt"
    count = 64 if options.tiny else 20_000
    prompts.write_text("\n".join(dict.fromkeys(scene_captions(count, 3))) + "\n")
    config = PairConfig(
        teacher="miniature", prompts=str(prompts), steps=2 if options.tiny else 20, guidance=3.0
    )
    generated = generate_pairs(config, folder / "pairs")
    notes = [f"{generated.pairs} pairs, {generated.pairs_per_sec:.1f} pairs/s."]
    return _miniature("ode", options, notes)


def miniature_second_stage(options: Options) -> Result:
    """The second stage for five minutes, from the first one."""
    return _miniature("gan", options, [])


def _miniature(stage: str, options: Options, notes: list[str]) -> Result:
    from benchmarks.student_scores import score

    folder = options.out / "miniature"
    config = replace(DISTILL_PRESETS["miniature"][stage], pairs=str(folder / "pairs"))
    config = replace(config, init=str(folder / "ode") if stage == "gan" else "")
    length = (
        ["train.images=64", "train.batch_size=8"]
        if options.tiny
        else ["train.minutes=5", "train.images=10000000"]
    )
    summary = train(override(config, length), folder / stage)
    process_group.finish()
    row: dict[str, Any] = {
        "stage": stage,
        "images": summary.images,
        "images/s": summary.images_per_sec,
        **score(folder / stage, 32 if options.tiny else 1024),
    }
    return {
        "rows": [row],
        "notes": [*notes, "Frechet distances by network, precision and recall on test scenes."],
    }
