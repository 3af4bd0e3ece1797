"""The measurements of benchmarks/gpu.py.

Each adds rows {column: value} to its table as they are measured, and returns notes and goals.
"""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import latent_lpips, pairs
from benchmarks.common import compare, median
from benchmarks.training_step import RandomStep, fill_randomly, text_encoders_gib
from d2g.core.atomic_files import write_atomically
from d2g.core.config import digest, override, to_json
from d2g.core.distributed import process_group
from d2g.core.errors import first_line
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

Row = dict[str, Any]
Result = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where results and the random models go, whether sizes are tiny, and a Python with elatentlpips.

    memory_gib: of the GPU, where it is not this machine's.
    """

    out: Path
    tiny: bool
    theirs: str = ""
    memory_gib: float = 0.0


class Rows:
    """The table of an item, OUT/NAME.rows.json: a row is on disk as soon as it is measured, so that an item
    that is stopped loses nothing. A row that could not be measured has an `error`."""

    def __init__(self, out: Path, name: str) -> None:
        self.file = out / f"{name}.rows.json"

    def read(self) -> list[Row]:
        """All rows so far."""
        rows: list[Row] = json.loads(self.file.read_text()) if self.file.is_file() else []
        return rows

    def restart(self, rows: Sequence[Row]) -> None:
        """Begin with these rows, without those that have an error."""
        write_atomically(self.file, json.dumps([row for row in rows if not row.get("error")], indent=1))

    def measure(self, key: Row, measurement: Callable[[], Row]) -> None:
        """Add the row `key` with what `measurement` returns, or with the error that it raises; nothing if
        there is such a row already."""
        if any(key.items() <= row.items() for row in self.read()):
            return
        try:
            try:
                values = measurement()
            finally:
                free_memory()  # which fails too after some errors of a GPU
        except Exception as error:
            traceback.print_exc()
            values = {"error": f"{type(error).__name__}: {first_line(error)}"}
        print({**key, **values}, flush=True)
        write_atomically(self.file, json.dumps([*self.read(), {**key, **values}], indent=1))

    def finish(self, notes: Sequence[str], goals: Sequence[Row] = ()) -> Result:
        """The item's result. With `error` if rows could not be measured: then a goal is reached so far."""
        result: Result = {"notes": list(notes), "goals": list(goals)}
        if failed := [row for row in self.read() if row.get("error")]:
            result["error"] = f"{len(failed)} of {len(self.read())} rows: {failed[0]['error']}"
            reached = {"yes": "so far"}
            result["goals"] = [{**g, "reached": reached.get(g["reached"], g["reached"])} for g in goals]
        return result

    def values(self, column: str, **where: Any) -> list[float]:
        """A column of the rows with these values in other columns, without what was not measured."""
        rows = [row for row in self.read() if where.items() <= row.items()]
        return [row[column] for row in rows if row.get(column, NAN) == row.get(column, NAN)]


def goal(
    what: str, measured: float, *, at_least: float = -float("inf"), at_most: float = float("inf")
) -> Row:
    """A goal and whether it is reached; "" where nothing was measured."""
    aim = f">= {at_least:g}" if at_most == float("inf") else f"<= {at_most:g}"
    reached = "" if measured != measured else "yes" if at_least <= measured <= at_most else "no"
    return {"goal": what, "aim": aim, "measured": measured, "reached": reached}


def free_memory() -> None:
    """Give the GPU's memory back: a training state holds itself in a circle of references."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def gpu_tests(options: Options, rows: Rows) -> Result:
    """The tests with the mark gpu. Without a GPU two of them run on the CPU, to show that they do."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib"]
    command += ["-v", "-rfE", "-m", "gpu"]
    # Warnings of other versions of packages are no failure here. The files are named, because others need
    # packages for tests that such a machine may lack.
    command += ["-W", "default", "-p", "no:cacheprovider"]
    on_cpu = {} if DEVICE.type == "cuda" else {"D2G_GPU_TESTS_ON_CPU": "1"}
    command += ["tests/test_on_a_gpu.py", "-k", "metric"] if on_cpu else gpu_test_files()
    environment, lines = {**os.environ, **on_cpu}, []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pytest:
        assert pytest.stdout is not None
        for line in pytest.stdout:  # at once, so that the log of a test that hangs names it
            print(line, end="", flush=True)
            lines.append(line.strip())
    if pytest.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise RuntimeError(f"pytest: {'; '.join([*failed, lines[-1]])}")
    return rows.finish([f"`{' '.join(command[1:])}`: {lines[-1]}"])


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
    return rows.finish([f"By the data sheet for bf16: {_stated_peak() / 1e12:.0f} TFLOP/s."])


def _stated_peak() -> float:
    """FLOP/s of the card in bf16 by its data sheet; NaN on a CPU and for an unknown card."""
    peak = peak_flops(torch.cuda.get_device_name(), "bf16") if DEVICE.type == "cuda" else None
    return NAN if peak is None else peak


# Teachers with random weights


def random_teacher(kind: str, options: Options) -> str:
    """A pipeline folder of SD 1.5's or SDXL's size in fp16 under OUT/models."""
    folder = options.out / "models" / (f"tiny-{kind}" if options.tiny else kind)
    if not (folder / "model_index.json").is_file():  # written last
        _save_random_pipeline(kind, folder, options.tiny)
    return str(folder)


TINY: dict[str, dict[str, Any]] = {
    "vae": {"block_out_channels": [32] * 4, "layers_per_block": 1},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 1000},
    "text_encoder_2": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 1000,
    },
}
TINY_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 8, "block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 32},
    "sdxl": {
        "sample_size": 8,
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [2, 2, 2],
        "cross_attention_dim": 64,
        "transformer_layers_per_block": [1, 1, 1],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
}


def random_configs(kind: str, folder: Path, tiny: bool) -> str:
    """A pipeline folder of a key of distill.planning.reference_models.NAMES, without weights."""
    configs_only(kind, folder)
    for part, smaller in {**TINY, "unet": {**TINY_UNETS[kind], "layers_per_block": 1}}.items():
        file = folder / part / "config.json"
        if not tiny or not file.is_file():
            continue
        config = json.loads(file.read_text())
        heads = {"num_attention_heads": 2, "projection_dim": 32} if part.startswith("text") else {}
        file.write_text(json.dumps({**config, **smaller, **heads}))
    return str(folder)


def _save_random_pipeline(kind: str, folder: Path, tiny: bool) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    with tempfile.TemporaryDirectory() as scratch:
        configs = random_configs(kind, Path(scratch) / "configs", tiny)
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


# Training steps


@dataclass(frozen=True)
class Variant:
    """A step to time. `like`: the variant that it is compared with, whose batch it takes if that was
    measured. Otherwise it takes the largest one that fits by the forecast of `sized_by`, or of its own
    settings."""

    name: str
    stage: str
    settings: tuple[str, ...] = ()
    like: str = ""
    sized_by: tuple[str, ...] | None = None

    def config(self, preset: str, teacher: str, common: tuple[str, ...]) -> DistillConfig:
        """The step's config, of any batch."""
        base = replace(TABLE_A1[preset][self.stage], teacher=teacher)
        return override(base, [*common, *self.settings])

    def largest_batch(
        self, preset: str, teacher: str, common: tuple[str, ...], options: "Options"
    ) -> tuple[int, float]:
        """Rows, and GiB by the forecast; 0 rows if not even two fit."""
        for settings in [*([] if self.sized_by is None else [self.sized_by]), self.settings]:
            sized = replace(self, settings=settings)
            rows, gib = largest_batch(sized.config(preset, teacher, common), options)
            if rows:
                break
        return rows, gib


R1_ON = ("gan.penalty=single", "gan.r1_gamma=1", "gan.r1_rows=1", "gan.r1_interval=1")
WITH_R1 = Variant("stage 2, R1 of one row in each step", "gan", R1_ON)
WITHOUT_R1 = Variant("stage 2, no R1", "gan", ("gan.penalty=none",), like=WITH_R1.name, sized_by=R1_ON)
STEPS = (
    Variant("stage 1", "ode"),
    WITH_R1,
    WITHOUT_R1,
    Variant("stage 1, contiguous weights", "ode", ("engine.channels_last=off",)),
    Variant("stage 1, recomputation", "ode", ("engine.activation_checkpointing=true",)),
)
BLOCKS = ("engine.compile=inductor", "engine.compile_blocks=true")
COMPILED = (
    Variant("stage 1, inductor, block by block", "ode", BLOCKS),
    Variant("stage 2, R1 of one row, inductor, block by block", "gan", (*BLOCKS, *R1_ON)),
    Variant("stage 1, inductor", "ode", ("engine.compile=inductor",)),
)
COMPILED_SDXL = (
    COMPILED[0],
    Variant("stage 2, no R1, inductor, block by block", "gan", (*BLOCKS, "gan.penalty=none")),
)
SDXL_ENGINE = ("engine.activation_checkpointing=true", "engine.parallel=ddp")
"""SDXL does not fit without recomputation."""
SD15_ENGINE = ("engine.activation_checkpointing=false",)
R1_EVERY = 16
"""Steps from one R1 to the next in the recipes."""


@dataclass(frozen=True)
class StepItem:
    """Steps of one preset. At tiny sizes SD 1.5's item has every eager variant, the others have fewer."""

    preset: str
    variants: tuple[Variant, ...]
    tiny: tuple[Variant, ...]
    common: tuple[str, ...]
    label: str

    def __call__(self, options: Options, rows: Rows) -> Result:
        """Time them."""
        return _steps(self, options, rows)


STEP_ITEMS = {
    "steps-sd15": StepItem("sd15-cfg3", STEPS, STEPS, SD15_ENGINE, "sd15"),
    # SDXL's recipe has no R1; here it is measured all the same, where it fits.
    "steps-sdxl": StepItem("sdxl-cfg7", STEPS[:3], STEPS[:2], SDXL_ENGINE, "sdxl"),
    # At tiny sizes compilation takes all the time, so each item compiles one stage.
    "compile-sd15": StepItem("sd15-cfg3", COMPILED, COMPILED[1:2], SD15_ENGINE, "sd15 compiled"),
    "compile-sdxl": StepItem("sdxl-cfg7", COMPILED_SDXL, COMPILED[2:], SDXL_ENGINE, "sdxl compiled"),
}


def plan(options: Options) -> None:
    """Write the forecasts and FLOP that the steps will need to OUT/plan.json, and print them: they take
    minutes, in which a GPU would wait."""
    with tempfile.TemporaryDirectory() as folder:
        for name, item in STEP_ITEMS.items():
            teacher = _step_teacher(item, Path(folder) / name, options)
            for variant in item.tiny if options.tiny else item.variants:
                count, gib = variant.largest_batch(item.preset, teacher, item.common, options)
                if not count:
                    print(f"{name}, {variant.name}: needs {gib:.1f} GiB for 2 rows, left out", flush=True)
                    continue
                config = variant.config(item.preset, teacher, item.common)
                config = override(config, [f"train.batch_size={count}"])
                gib, flops = _forecast(config, options), _flops(config, options)
                line = f"{name}, {variant.name}: {count} rows, {gib:.2f} GiB, {flops / 1e12:.4g} TFLOP a row"
                print(line, flush=True)


def _step_teacher(item: StepItem, folder: Path, options: Options) -> str:
    kind = DISTILL_PRESETS[item.preset].model
    return random_configs(kind, folder / (f"tiny-{kind}" if options.tiny else kind), options.tiny)


def _steps(item: StepItem, options: Options, rows: Rows) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        teacher = _step_teacher(item, Path(folder), options)
        for variant in item.tiny if options.tiny else item.variants:

            def timed() -> Row:
                config = variant.config(item.preset, teacher, item.common)  # noqa: B023
                same = rows.values("batch", variant=variant.like)  # noqa: B023
                if same:
                    count = int(same[0])
                else:
                    sizes = (item.preset, teacher, item.common, options)
                    count, gib = variant.largest_batch(*sizes)  # noqa: B023
                    if not count:
                        return {"note": f"needs {gib:.1f} GiB for 2 rows, left out"}
                if options.tiny:
                    backend = {"inductor": "eager"}.get(config.engine.compile, "")
                    config = override(config, [f"engine.compile={backend}"])
                return _time_steps(config, count, Path(folder), options)

            rows.measure({"variant": variant.name}, timed)
    notes = [
        "Weights are random. Text encoders are not part of the step, nor of its memory. MFU: FLOP of the "
        "forward and backward passes of networks, losses and R1, without recomputation "
        f"(distill/planning/flops.py), against {_stated_peak() / 1e12:.0f} TFLOP/s.",
    ]
    if (share := _share_of_r1(rows)) == share:
        when = f"every {R1_EVERY} steps, as sd15-cfg3 has it on 16 GPUs"
        notes.append(f"R1 of one row, {when}, takes {share:.1%} of the mean step.")
    return rows.finish(notes, _step_goals(item.label, rows))


def _share_of_r1(rows: Rows) -> float:
    """Share of the mean step that R1 takes where it comes every R1_EVERY steps; NaN if not measured, or not
    with the same batch."""
    both = [variant.name for variant in (WITHOUT_R1, WITH_R1)]
    times, batches = (
        [rows.values(column, variant=name) for name in both] for column in ("s per step", "batch")
    )
    if not all(times) or batches[0] != batches[1]:
        return NAN
    (without,), (with_r1,) = times
    extra = (with_r1 - without) / R1_EVERY
    return extra / (without + extra)


def _step_goals(label: str, rows: Rows) -> list[Row]:
    """The goals of the steps that this item has measured."""
    measured = rows.read()
    stage_1 = [row.get("MFU", NAN) for row in measured if row["variant"].startswith("stage 1")]
    misses = [abs(ratio - 1) for ratio in rows.values("forecast / peak")]
    goals = [
        goal(f"{label} stage 1, MFU", max(stage_1, default=NAN), at_least=0.45),
        goal(f"{label} memory forecast, largest miss", max(misses, default=NAN), at_most=0.1),
    ]
    if any(row["variant"] == WITHOUT_R1.name for row in measured):
        goals.append(goal(f"{label} R1, share of the mean step", _share_of_r1(rows), at_most=0.15))
    return goals


def _time_steps(config: DistillConfig, count: int, folder: Path, options: Options) -> Row:
    """Time and memory of steps of `count` rows, or of half as many as long as they do not fit."""
    while True:
        sized = override(config, [f"train.batch_size={count}"])
        try:
            return _time_steps_of(sized, folder, options)
        except torch.OutOfMemoryError as error:
            if count <= 2:
                raise
            print(f"{count} rows: {first_line(error)}", flush=True)
        count //= 2
        free_memory()


def _time_steps_of(config: DistillConfig, folder: Path, options: Options) -> Row:
    set_training_arithmetic(DEVICE, config.train.bf16)
    step = RandomStep(config, DEVICE, folder)
    step(at_once=True)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # Several steps in a row, as in a training: the host prepares one while the device computes another.
    in_a_row, repeats, warm_up = (1, 1, 1) if options.tiny else (4, 3, 1)

    def run() -> None:
        for _ in range(in_a_row):
            step()

    seconds = median(compare({"step": run}, repeats, warm_up)["step"]) / in_a_row
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else NAN
    rows, flops, forecast = (
        config.train.batch_size,
        _flops(config, options) * config.train.batch_size,
        _forecast(config, options),
    )
    return {
        "batch": rows,
        "s per step": seconds,
        "images/s": rows / seconds,
        "TFLOP per step": flops / 1e12,
        "MFU": flops / seconds / _stated_peak(),
        "peak GiB": peak,
        "forecast GiB": forecast,
        "forecast / peak": forecast / peak,
    }


def largest_batch(config: DistillConfig, options: Options) -> tuple[int, float]:
    """The largest batch of up to 32 rows whose forecast takes 80 % of the memory at most, and its GiB; 0 if
    two rows need more. Tiny: 2 rows."""
    limit = 0.8 * (options.memory_gib or _memory_gib())

    def gib(rows: int) -> float:
        return _forecast(override(config, [f"train.batch_size={rows}"]), options) + CONTEXT_GIB

    if options.tiny:
        return 2, gib(2)
    if gib(2) > limit:
        return 0, gib(2)
    # The forecast grows linearly once activations are the peak; before, something else is.
    per_row = (gib(32) - gib(16)) / 16
    likely = [n for n in (32, 24, 16, 8, 4, 2) if gib(32) - (32 - n) * per_row <= limit]
    fitting = next((n for n in likely if gib(n) <= limit), 2)
    return fitting, gib(fitting)


def _forecast(config: DistillConfig, options: Options) -> float:
    """The forecast in GiB without text encoders and CUDA's context."""
    return _planned("GiB", config, options, lambda c: predict(c, 1).total - text_encoders_gib(c))


def _flops(config: DistillConfig, options: Options) -> float:
    """FLOP of a row."""
    return _planned("FLOP", config, options, flop_per_image)


def _planned(
    what: str, config: DistillConfig, options: Options, compute: Callable[[DistillConfig], float]
) -> float:
    """A number of OUT/plan.json, computed if it is not there."""
    # Settings that neither number depends on, and the teacher by its size.
    config = override(config, ["engine.compile_blocks=false", "engine.compile=", "engine.channels_last=auto"])
    key = f"{what} {digest(to_json(replace(config, teacher=Path(config.teacher).name)))}"
    file = options.out / "plan.json"
    numbers: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    if key not in numbers:
        numbers[key] = float(compute(config))
        write_atomically(file, json.dumps(numbers, indent=1))
    return numbers[key]


def _memory_gib() -> float:
    """Memory of the GPU; on a CPU, where nothing is measured, as much as an H100 has."""
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if DEVICE.type == "cuda" else 80.0


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
    """The trunk's FLOP/s in bf16 on 16 latents of 64x64, as a share of a matrix product's."""
    from latent_lpips import load_lpips

    network = load_lpips(weights, precision="bf16", device=DEVICE)
    pred, target = (torch.randn(16, latent_lpips.CHANNELS, 64, 64, device=DEVICE) for _ in range(2))

    def run() -> None:
        for _ in range(5):
            latent_lpips.with_gradient(network, pred, target)

    seconds = median(compare({"ours": run}, repeats=5, warm_up=2)["ours"]) / 5
    flops = 3 * 1e9 * latent_lpips.GFLOP * pred[:, 0].numel()
    peak = pairs.matmul_peak(torch.bfloat16, 8192)
    return {
        "batch": 16,
        "trunk, TFLOP/s": flops / seconds / 1e12,
        "share of the bf16 peak": flops / seconds / peak,
    }


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
    notes = [f"{generated.pairs} pairs, {generated.pairs_per_sec:.1f} pairs/s."]
    return _miniature("ode", options, rows, notes)


def miniature_second_stage(options: Options, rows: Rows) -> Result:
    """The second stage for five minutes, from the first one."""
    return _miniature("gan", options, rows, [])


def _miniature(stage: str, options: Options, rows: Rows, notes: list[str]) -> Result:
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
        scores = score(folder / stage, 32 if options.tiny else 1024)
        return {"images": summary.images, "images/s": summary.images_per_sec, **scores}

    rows.measure({"stage": stage}, trained)
    scores = "Frechet distances by network, precision and recall on test scenes."
    rate = "The learning rate does not fall in five minutes: these are no scores of a finished recipe."
    return rows.finish([*notes, scores, rate])
