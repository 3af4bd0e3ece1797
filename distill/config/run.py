"""Settings of a run of either distillation stage. Presets: distill/config/presets.py."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from d2g.core.config import nearest
from d2g.core.errors import SettingError
from distill.config.components import DiscriminatorConfig as DiscriminatorConfig
from distill.config.components import OptimConfig as OptimConfig
from distill.config.components import RegressionConfig as RegressionConfig
from distill.config.components import StudentConfig as StudentConfig
from distill.config.components import check_values, require, require_even_microbatch

Logger = Literal["tensorboard", "wandb"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length, batch, averaging and reporting. `images` and `batch_size` count over all ranks."""

    images: int = 38_400_000
    minutes: float | None = None  # stop after so much time in this process, if that comes first
    batch_size: int = 256
    ema_beta: float = 0.9999  # A1
    ema_start_images: int = 0  # until then the average is a plain copy
    # Of the networks' arithmetic, LatentLPIPS' trunk among them; weights and losses are fp32.
    precision: Literal["fp32", "bf16"] = "bf16"  # A1
    loader_workers: int = 2
    report_images: int = 12_800
    checkpoint_images: int = 1_280_000
    keep_checkpoints: int = 2
    keep_best: bool = False  # beside them, the one of the best validation
    validate_images: int = 0  # images between validations; 0: none
    validate_pairs: int = 0  # the last pairs by number, kept out of training; 0: none
    preview_prompts: int = 0  # pairs drawn at each report, student beside teacher; 0: none
    loggers: tuple[Logger, ...] = ()  # beside stats.jsonl
    on_collapse: Literal["off", "warn", "stop"] = "warn"  # when D or G collapses

    def __post_init__(self) -> None:
        check_values(self, "train")
        for name in ("images", "batch_size", "report_images", "checkpoint_images", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        for name in ("loader_workers", "ema_start_images", "validate_images", "validate_pairs"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        require(self.preview_prompts >= 0, "train.preview_prompts", self.preview_prompts, "0 or more")
        require(0 <= self.ema_beta < 1, "train.ema_beta", self.ema_beta, "0 up to below 1")
        lasting = self.minutes is None or self.minutes > 0
        require(lasting, "train.minutes", self.minutes, "a positive number, or null for no limit")
        unknown = sorted(set(self.loggers) - set(get_args(Logger)))
        require(not unknown, "train.loggers", unknown, f"names of {', '.join(get_args(Logger))}")
        if bool(self.validate_images) != bool(self.validate_pairs):
            raise SettingError(
                f"train: validate_images {self.validate_images} and validate_pairs {self.validate_pairs}; "
                "expected both above 0, or both 0"
            )
        if self.keep_best and not self.validate_images:
            raise SettingError(
                "train.keep_best needs validation; set train.validate_images and validate_pairs"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How the work is spread over processes and memory. Nothing here changes a result beyond rounding."""

    parallel: Literal["ddp", "fsdp"] = "ddp"  # fsdp: weights, gradients and optimiser states in shards
    shard_size: int = 0  # of fsdp: ranks that share one copy, a divisor of their number; 0: all of them
    gradient_accumulation: int = 1  # micro-batches per step and rank (A1: 1)
    activation_checkpointing: bool = False  # recompute in the backward pass what the forward pass made
    compile: str = ""  # torch.compile's backend, "inductor" mostly; "": eager. The penalty is always eager
    async_checkpoints: bool = False  # write while the next steps run
    gpus: int = 0  # for --dry-run's bookkeeping: how many the run is meant for; 0: those it is started on

    def __post_init__(self) -> None:
        check_values(self, "engine")
        for name in ("shard_size", "gpus"):
            require(getattr(self, name) >= 0, f"engine.{name}", getattr(self, name), "0 or more")
        require(
            self.gradient_accumulation >= 1,
            "engine.gradient_accumulation",
            self.gradient_accumulation,
            "1 or more",
        )
        if self.compile:
            from torch.compiler import list_backends  # seconds: only for those who compile

            if self.compile not in list_backends(exclude_tags=()):  # the hint leaves out those for debugging
                hint = nearest(self.compile, list_backends())
                raise SettingError(f"engine.compile is {self.compile!r}{hint}")
        if self.shard_size and self.parallel != "fsdp":
            raise SettingError(
                f"engine.shard_size is {self.shard_size} but parallel {self.parallel}; set parallel=fsdp or 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How pairs are read: their order, what to do about damage, and copies of a store at a URL."""

    block: int = 0  # rows that stay together in the shuffle, for slow disks and URLs; 0: shuffle all rows
    window: int = 0  # blocks whose rows are shuffled among themselves; with `block` only
    skip_bad: bool = False  # read the next sound shard's rows in place of damaged ones, with a warning
    cache: str = ""  # folder for copies of a URL's shards; "": $XDG_CACHE_HOME/diffusion2gan/pairs
    cache_gib: float = 0.0  # bound of that folder, the longest unused make room; 0: none
    text_cache: int = 0  # prompts whose encodings are kept in memory; 0: encode every batch anew

    def __post_init__(self) -> None:
        check_values(self, "data")
        require(self.text_cache >= 0, "data.text_cache", self.text_cache, "0 or more")
        if min(self.block, self.window) < 0 or bool(self.block) != bool(self.window):
            raise SettingError(
                f"data: block {self.block} and window {self.window}; expected both above 0, or both 0"
            )
        if self.cache_gib < 0:
            raise SettingError(f"data.cache_gib is {self.cache_gib}; expected GiB, or 0 for no bound")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """One run of one stage: `ode` regresses the pairs, `gan` adds the discriminator."""

    stage: Literal["ode", "gan"] = "ode"
    pairs: str = ""  # a store, or several, separated by commas, that differ in guidance
    teacher: str = ""
    lpips: str = ""  # folder of LatentLPIPS weights; "": TEACHER/latent_lpips
    init: str = ""  # gan: the run or exported student to start from
    student_timestep: int = -1  # -1: the schedule's last (999)
    seed: int = 0
    student: StudentConfig = field(default_factory=StudentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    regression: RegressionConfig = field(default_factory=RegressionConfig)
    gan: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    data: DataConfig = DataConfig()

    def __post_init__(self) -> None:
        check_values(self, "distill")
        microbatch_size(self, 1)
        size, rows = self.train.batch_size, self.gan.r1_rows
        if self.stage == "gan" and self.gan.active_penalty == "single" and size % rows:
            raise SettingError(
                f"gan.r1_rows is {rows}; expected a divisor of train.batch_size, {size}; set gan.r1_rows or "
                "train.batch_size"
            )


def microbatch_size(config: DistillConfig, processes: int) -> int:
    """Rows of a micro-batch on each of so many processes. Raises SettingError where the batch does not
    divide, or leaves lone rows to mix-and-match.
    """
    size, accumulate = config.train.batch_size, config.engine.gradient_accumulation
    if size % (processes * accumulate):
        raise SettingError(
            f"train.batch_size {size} does not divide over {processes} process{'es' * (processes > 1)}"
            + (f" x {accumulate} micro-batches (engine.gradient_accumulation)" if accumulate > 1 else "")
        )
    rows = size // processes // accumulate
    if config.stage == "gan":
        require_even_microbatch(rows, config.gan.mix_fraction)
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """One `d2g sample`: which student draws what."""

    student: str = "miniature"
    prompt: tuple[str, ...] = ()
    prompts: str | None = None  # a prompt file, after `prompt`
    num: int = 1  # images per prompt
    teacher: str | None = None  # instead of the one the student names
    batch_size: int = 32
    seed: int = 0  # image i uses the noise of (seed, i)
    guidance: float | None = None  # told to a student that is told a scale; None: 8

    def __post_init__(self) -> None:
        if self.num < 1 or self.batch_size < 1:
            raise SettingError(f"num is {self.num} and batch_size {self.batch_size}; expected 1 or more")
        if self.guidance is not None and not 1 <= self.guidance < math.inf:
            raise SettingError(f"guidance is {self.guidance}; expected 1 (no guidance) or more")


SAMPLE_PRESETS = {"default": SampleConfig()}
"""Presets of `d2g sample`."""
