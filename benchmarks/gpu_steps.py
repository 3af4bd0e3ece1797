"""Training steps for benchmarks/gpu.py: their variants, batches, times and forecasts."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.common import compare, median
from benchmarks.gpu_models import random_configs
from benchmarks.gpu_rows import DEVICE, NAN, Options, Result, Row, Rows, free_memory, goal, stated_peak
from benchmarks.training_step import RandomStep, text_encoders_gib
from d2g.core.atomic_files import write_atomically
from d2g.core.config import digest, override, to_json
from d2g.core.errors import first_line
from d2g.core.precision import set_training_arithmetic
from distill.config.presets import DISTILL_PRESETS, TABLE_A1
from distill.config.run import DistillConfig
from distill.planning.flops import flop_per_image
from distill.planning.memory import CONTEXT_GIB, predict


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
        self, preset: str, teacher: str, common: tuple[str, ...], options: Options
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
        f"(distill/planning/flops.py), against {stated_peak() / 1e12:.0f} TFLOP/s."
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
        "MFU": flops / seconds / stated_peak(),
        "peak GiB": peak,
        "forecast GiB": forecast,
        "forecast / peak": forecast / peak,
    }


def largest_batch(config: DistillConfig, options: Options) -> tuple[int, float]:
    """The largest batch of up to 32 rows whose forecast takes 80 % of the memory at most, and its GiB; 0 if
    two rows need more. Tiny: 2 rows."""

    def gib(rows: int) -> float:
        return _forecast(override(config, [f"train.batch_size={rows}"]), options) + CONTEXT_GIB

    rows = 2 if options.tiny else largest_rows(gib, 0.8 * (options.memory_gib or _memory_gib()))
    return rows, gib(rows or 2)


def largest_rows(gib: Callable[[int], float], limit: float) -> int:
    """The largest batch of 2 to 32 rows whose forecast `gib` is at most `limit`; 0 if 2 rows need more."""
    if gib(2) > limit:
        return 0
    # A forecast takes seconds. It grows linearly once activations are the peak; before, something else is.
    per_row = (gib(32) - gib(16)) / 16
    likely = [n for n in (32, 24, 16, 8, 4, 2) if gib(32) - (32 - n) * per_row <= limit]
    return next((n for n in likely if gib(n) <= limit), 2)


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
