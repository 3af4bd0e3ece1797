"""Settings of a run of either distillation stage. Presets: distill/config/presets.py.

The groups have files of their own beside this one. Sources are a table of the paper's supplement, a section
of docs/method.md, or another paper. A default that no source fixes says so.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from d2g.core.config import Presets, check_values, nearest, require, setting
from d2g.core.errors import SettingError
from d2g.data.columns import require_prompts
from distill.config.clip_guidance import ClipGuidanceConfig
from distill.config.consistency import ConsistencyConfig
from distill.config.discriminator import DiscriminatorConfig, require_even_microbatch
from distill.config.optim import OptimConfig
from distill.config.regression import RegressionConfig
from distill.config.student import StudentConfig

Logger = Literal["tensorboard", "wandb", "trackio"]

FROM_TEACHER = "teacher"
"""The value of `init` for a student that starts with the weights of the teacher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length, batch, averaging and reporting. `images` and `batch_size` count over all ranks."""

    images: int = setting(
        38_400_000, "Length of the run in training images, over all ranks", source="Table A1", recipe=True
    )
    minutes: float | None = setting(
        None, "Stop after this many minutes of this process, if that comes before images; null: no limit"
    )
    batch_size: int = setting(
        256, "Rows per optimizer step, over all ranks and micro-batches", source="Table A1", recipe=True
    )
    ema_beta: float = setting(
        0.9999, "Decay per step of the student's weight average", source="Table A1", recipe=True
    )
    ema_halflife_images: int = setting(
        0,
        "Half-life of the weight average: weights this many images old count half; sets the decay for any "
        "batch size; 0 takes ema_beta",
        source="EDM2, arXiv 2312.02696",
    )
    ema_start_images: int = setting(
        0,
        "Images until which the average is a copy of the weights",
        source='method.md "Schedule and hyperparameters"',
    )
    precision: Literal["fp32", "bf16", "auto"] = setting(
        "bf16",
        "Arithmetic of the networks, LatentLPIPS' trunk included; weights and losses are fp32. auto: bf16 "
        "where the hardware has it, else fp32",
        source="Table A1",
    )
    loader_workers: int = setting(2, "Processes per rank that read pairs; 0 reads in the training loop")
    report_images: int = setting(12_800, "Images between reports in stats.jsonl")
    checkpoint_images: int = setting(1_280_000, "Images between checkpoints")
    keep_checkpoints: int = setting(2, "Number of latest checkpoints to keep")
    keep_best: bool = setting(False, "Keep the checkpoint with the best validation too")
    validate_images: int = setting(0, "Images between validations; 0: none")
    validate_pairs: int = setting(0, "Pairs held out for validation, the last ones by row number; 0: none")
    preview_prompts: int = setting(0, "Pairs drawn as images at each report, student beside teacher; 0: none")
    plot: bool = setting(True, "Draw the curves as RUN/health.png when the run ends")
    loggers: tuple[Logger, ...] = setting(
        (), "Loggers in addition to stats.jsonl: tensorboard, wandb, trackio"
    )
    on_collapse: Literal["off", "warn", "stop"] = setting(
        "warn", "What to do when the discriminator or the student collapses"
    )

    def __post_init__(self) -> None:
        check_values(self)
        unknown = sorted(set(self.loggers) - set(get_args(Logger)))
        require(
            self,
            images=(self.images >= 1, "1 or more"),
            batch_size=(self.batch_size >= 1, "1 or more"),
            report_images=(self.report_images >= 1, "1 or more"),
            checkpoint_images=(self.checkpoint_images >= 1, "1 or more"),
            keep_checkpoints=(self.keep_checkpoints >= 1, "1 or more"),
            loader_workers=(self.loader_workers >= 0, "0 or more"),
            ema_start_images=(self.ema_start_images >= 0, "0 or more"),
            validate_images=(self.validate_images >= 0, "0 or more"),
            validate_pairs=(self.validate_pairs >= 0, "0 or more"),
            preview_prompts=(self.preview_prompts >= 0, "0 or more"),
            ema_halflife_images=(self.ema_halflife_images >= 0, "0 or more"),
            ema_beta=(0 <= self.ema_beta < 1, "0 up to below 1"),
            minutes=(self.minutes is None or self.minutes > 0, "a positive number, or null for no limit"),
            loggers=(not unknown, f"names of {', '.join(get_args(Logger))}"),
        )
        # The best checkpoint is the best one that was validated.
        if self.keep_best and not self.validate_images:
            raise SettingError("keep_best needs validation; set validate_images and validate_pairs")

    @property
    def bf16(self) -> bool:
        """Whether the networks compute in bf16. First `decide_precision` decides what auto means."""
        assert self.precision != "auto", "train.precision is auto; call decide_precision first"
        return self.precision == "bf16"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How the work is spread over processes and memory. Nothing here changes a result beyond rounding."""

    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp", "ddp: a copy of everything per rank; fsdp: weights, gradients and optimizer states in shards"
    )
    shard_size: int = setting(
        0, "Ranks that share one sharded copy with fsdp, a divisor of their number; 0: all of them"
    )
    gradient_accumulation: int = setting(1, "Micro-batches per step and rank", source="Table A1")
    own_generator_passes: bool = setting(
        False,
        "Evaluate the student once for the discriminator's update and once for its own: five evaluations per "
        "row, as the paper counts, not four. Its weights do not change in between. Saves the memory of its "
        "activations while the discriminator is updated",
        source='method.md "Mix-and-match augmentation"',
    )
    activation_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass to save memory"
    )
    compile: str = setting(
        "", "Backend of torch.compile, such as inductor; empty runs eagerly. The penalty is always eager"
    )
    compile_blocks: bool = setting(
        False,
        "Compile each repeated block by itself, in place of the whole network; blocks of the same shapes "
        "share one compilation. With compile",
    )
    channels_last: Literal["auto", "on", "off"] = setting(
        "auto",
        "Convolution weights in channels-last memory format, which CUDA's matrix units read; not with fsdp. "
        "auto: on a GPU with ddp",
    )
    frozen_weights: Literal["fp32", "bf16"] = setting(
        "fp32",
        "Storage of the linear and convolution weights that are not trained (with student.lora_rank or "
        "gan.freeze_backbone). bf16 takes half the memory, and a bf16 step rounds them anyway; not with fsdp",
    )
    offload_optimizer: bool = setting(
        False,
        "Keep the moments of adamw and adamw_8bit in CPU memory; they cross the bus twice per step. Not with "
        "fsdp",
    )
    async_checkpoints: bool = setting(False, "Write checkpoints while the next steps run")
    gpus: int = setting(
        0,
        "GPUs for which --dry-run plans; 0: those it is started on. In several processes a preset's number "
        "does not count",
    )

    def __post_init__(self) -> None:
        check_values(self)
        require(
            self,
            shard_size=(self.shard_size >= 0, "0 or more"),
            gpus=(self.gpus >= 0, "0 or more"),
            gradient_accumulation=(self.gradient_accumulation >= 1, "1 or more"),
        )
        if self.compile:
            from torch.compiler import list_backends  # takes seconds, so only when compiling

            if self.compile not in list_backends(exclude_tags=()):  # the hint leaves out debugging backends
                raise SettingError(f"compile is {self.compile!r}{nearest(self.compile, list_backends())}")
        if self.compile_blocks and not self.compile:
            raise SettingError(
                "compile_blocks is true but compile names no backend; set compile=inductor, or "
                "compile_blocks=false"
            )
        if self.channels_last == "on" and self.parallel == "fsdp":
            raise SettingError(
                "channels_last is 'on' but parallel is fsdp, which shards contiguous tensors only; set "
                "channels_last=auto or parallel=ddp"
            )
        if self.parallel == "fsdp" and (self.offload_optimizer or self.frozen_weights == "bf16"):
            name = "offload_optimizer" if self.offload_optimizer else "frozen_weights"
            raise SettingError(
                f"{name} is {getattr(self, name)} but parallel is fsdp, which shards weights and optimizer "
                f"states; set parallel=ddp, or leave {name} out"
            )
        if self.shard_size and self.parallel != "fsdp":
            raise SettingError(
                f"shard_size is {self.shard_size} but parallel is {self.parallel}; set parallel=fsdp or "
                "shard_size=0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How pairs are read: their order, what to do about damage, and the local copy of a store at a URL."""

    block: int = setting(
        0, "Consecutive rows that stay together in the shuffle, for slow disks and URLs; 0 shuffles all rows"
    )
    window: int = setting(0, "Blocks whose rows are shuffled among themselves; used with block")
    skip_bad: bool = setting(False, "Replace damaged rows by rows of the next intact shard, with a warning")
    cache: str = setting(
        "", "Folder for copies of a URL's shards; empty: $XDG_CACHE_HOME/diffusion2gan/pairs"
    )
    cache_gib: float = setting(
        0.0, "Bound of the cache folder in GiB, least recently used shards are removed; 0: no bound"
    )
    max_pairs: int = setting(
        0, "Train on the first N pairs only, to learn how many a student needs; 0: on all pairs"
    )
    rewire: bool = setting(
        False,
        "An experiment: give the latents the noise of other rows, so that there is nothing to learn from it",
        source="paper, supplement E",
    )
    text_cache: int = setting(0, "Prompts whose text embeddings stay in memory; 0 encodes every batch again")
    text_precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto",
        "Arithmetic of the text encoders; networks get their output in fp32. auto: bf16 on a GPU if "
        "train.precision is bf16, else fp32",
    )

    def __post_init__(self) -> None:
        check_values(self)
        require(
            self,
            text_cache=(self.text_cache >= 0, "0 or more"),
            block=(self.block >= 0, "0 or more"),
            window=(self.window >= 0, "0 or more"),
            max_pairs=(self.max_pairs >= 0, "0 or more"),
            cache_gib=(self.cache_gib >= 0, "GiB, or 0 for no bound"),
        )
        if bool(self.block) != bool(self.window):
            raise SettingError(
                f"block is {self.block} and window {self.window}; expected both above 0, or both 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """A run of one stage.

    - ode: the regression stage.
    - gan: adds the discriminator.
    - text: trains the student's text encoders with a discriminator and CLIP guidance.
    - cd: consistency distillation, for comparison.
    """

    stage: Literal["ode", "gan", "text", "cd"] = setting(
        "ode",
        "ode: regression on the pairs; gan: regression and discriminator; text: the losses of gan, but the "
        "text encoders are trained and the network is frozen; cd: consistency distillation",
    )
    pairs: str = setting(
        "",
        "Pair store, or several separated by commas that differ in guidance (option --pairs); empty with "
        "regression.losses=[] and gan.real_fraction=1, or in stage cd with gan.real_fraction=1",
    )
    teacher: str = setting("", "Teacher folder, hub id or shipped name (option --teacher)")
    lpips: str = setting("", "Folder of LatentLPIPS weights; empty: TEACHER/latent_lpips (option --lpips)")
    init: str = setting(
        "",
        "Run or exported student that the stages gan and text start from, or `teacher` for the teacher's own "
        "weights (option --init)",
    )
    student_timestep: int = setting(
        -1,
        "Timestep input of the student; -1: the last one of the schedule (999)",
        source='method.md "Student generator"',
    )
    seed: int = setting(0, "Seed of everything random (option --seed)")
    student: StudentConfig = setting(StudentConfig(), "The student")
    optim: OptimConfig = setting(OptimConfig(), "Optimizer of the student")
    regression: RegressionConfig = setting(RegressionConfig(), "The regression loss")
    gan: DiscriminatorConfig = setting(DiscriminatorConfig(), "The discriminator")
    consistency: ConsistencyConfig = setting(ConsistencyConfig(), "Consistency distillation")
    clip_guidance: ClipGuidanceConfig = setting(ClipGuidanceConfig(), "Guidance by CLIP, in both stages")
    train: TrainConfig = setting(TrainConfig(), "Length and reporting")
    engine: EngineConfig = setting(EngineConfig(), "Processes and memory")
    data: DataConfig = setting(DataConfig(), "Reading pairs")

    def __post_init__(self) -> None:
        check_values(self)
        if not self.adversarial and not self.regression.losses:
            raise SettingError(f"regression.losses is (); expected one or more names in stage {self.stage}")
        # Validation needs an interval and pairs; a run without pairs can validate with --validate alone.
        interval, held_out = self.train.validate_images, self.train.validate_pairs
        alone = self.without_pairs or not self.student.is_diffusion
        if bool(interval) != bool(held_out) and not (interval and alone):
            raise SettingError(
                f"train.validate_images is {interval} and train.validate_pairs {held_out}; expected both "
                "above 0, or both 0"
            )
        for name in ("lora_rank", "dropout"):
            if self.stage == "text" and (value := getattr(self.student, name)):
                raise SettingError(
                    f"student.{name} is {value:g}, but stage text keeps the student's network as it is; set "
                    "it to 0"
                )
        gan = self.gan
        if self.adversarial and gan.real_fraction == 1 and gan.sees_noise:
            raise SettingError(
                "gan.real_fraction is 1, but gan.z_conditioning is true: no real image belongs to its noise, "
                "and the discriminator would know the student's images by theirs; set "
                "gan.z_conditioning=false"
            )
        guidance = self.clip_guidance
        if guidance.weight and guidance.form == "contrastive" and self.train.batch_size < 2:
            raise SettingError(
                f"train.batch_size is {self.train.batch_size}, but clip_guidance.form is contrastive, which "
                "compares with the texts of other rows; expected 2 or more, or clip_guidance.form=spherical"
            )
        microbatch_size(self, 1)
        self._check_memory_savers()
        size, rows = self.train.batch_size, self.gan.r1_rows
        if self.adversarial and self.gan.active_penalty == "single" and size % rows:
            raise SettingError(
                f"gan.r1_rows is {rows}; expected a divisor of train.batch_size, {size}; set gan.r1_rows or "
                "train.batch_size"
            )

    def _check_memory_savers(self) -> None:
        """Raise SettingError where an optimizer or the arithmetic does not go with the engine."""
        gan, engine = self.gan, self.engine
        optimizers = {"optim": self.optim, **({"gan.optim": gan.optim} if self.adversarial else {})}
        for name, options in optimizers.items():
            if engine.offload_optimizer and options.name not in ("adamw", "adamw_8bit"):
                raise SettingError(
                    f"engine.offload_optimizer is true, but {name}.name is {options.name}; set it to adamw "
                    "or adamw_8bit, or engine.offload_optimizer=false"
                )
        if engine.frozen_weights == "fp32":
            return
        if self.train.precision != "bf16":
            raise SettingError(
                f"engine.frozen_weights is bf16, but train.precision is {self.train.precision}; set "
                "train.precision=bf16, or engine.frozen_weights=fp32"
            )
        exact = gan.active_penalty not in ("none", "approx")
        if self.adversarial and gan.freeze_backbone and exact:
            raise SettingError(
                f"engine.frozen_weights is bf16, but gan.penalty={gan.penalty} computes in fp32; set "
                "gan.penalty=approx or none, or engine.frozen_weights=fp32"
            )

    def encodes_text_in_bf16(self, on_gpu: bool) -> bool:
        """Whether the text encoders run in bf16."""
        choice = self.data.text_precision
        return choice == "bf16" or (choice == "auto" and on_gpu and self.train.bf16)

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return self.stage in ("gan", "text")

    @property
    def ema_decay(self) -> float:
        """Decay of the average per update of the student: `ema_beta`, or from `ema_halflife_images`."""
        images = self.train.batch_size * (self.gan.d_steps_per_g_step if self.adversarial else 1)
        halflife = self.train.ema_halflife_images
        return 0.5 ** (images / halflife) if halflife else self.train.ema_beta

    @property
    def own_text(self) -> bool:
        """Whether the student has text encoders of its own."""
        return self.stage == "text" or self.student.own_text_encoder

    @property
    def without_pairs(self) -> bool:
        """Whether it trains on real images alone: a GAN without regression and without pairs, or consistency
        distillation without pairs."""
        alone = self.stage == "cd" or (self.adversarial and not self.regression.losses)
        return alone and self.gan.real_fraction == 1 and not self.pairs


def microbatch_size(config: DistillConfig, processes: int) -> int:
    """Rows of a micro-batch on each of `processes` processes.

    Raises SettingError for a batch that does not divide evenly, and for an odd number of rows with
    mix-and-match.
    """
    size, accumulate = config.train.batch_size, config.engine.gradient_accumulation
    if size % (processes * accumulate):
        raise SettingError(
            f"train.batch_size {size} does not divide over {processes} process{'es' * (processes > 1)}"
            + (f" x {accumulate} micro-batches (engine.gradient_accumulation)" if accumulate > 1 else "")
            + f"; expected a multiple of {processes * accumulate}"
            + (", or another number of processes (--gpus of `d2g launch`)" if processes > 1 else "")
        )
    rows = size // processes // accumulate
    if config.adversarial:
        require_even_microbatch(rows, config.gan.mix_fraction)
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """One `d2g sample`: which student or teacher draws what."""

    student: str | None = setting(
        None, "Run folder, exported student, or a shipped name; null: miniature, unless teacher is set"
    )
    prompt: tuple[str, ...] = setting((), "Texts, or class numbers")
    prompts: str | None = setting(None, "Prompt file, read after prompt; - is standard input")
    column: str | None = setting(
        None, "Column of the prompts in the prompt file; null: prompt, caption, text or TEXT"
    )
    num: int = setting(1, "Images per prompt")
    prior: str | None = setting(
        None,
        "Stage C of a cascade (option --prior): a student for a student of stage B, else a teacher for a "
        "teacher of stage B; where both draw, a student, whose teacher draws too",
    )
    teacher: str | None = setting(
        None,
        "Teacher to draw; with student both draw, from the same noise, and the student is loaded with this "
        "teacher",
    )
    steps: int | None = setting(None, "Solver steps of the teacher; null: 50")
    prior_steps: int | None = setting(None, "Solver steps of the prior's teacher in a cascade; null: 60")
    prior_guidance: float | None = setting(
        None, "Guidance scale of the prior's teacher in a cascade; null: 3"
    )
    batch_size: int = setting(32, "Images per forward pass")
    seed: int = setting(0, "Image i uses the noise of (seed, i)")
    psi: float | None = setting(
        None,
        "Truncation of the styles of a student that has some, 0 to 1: smaller is more typical and less "
        "diverse; null: 1, none",
        source="StyleGAN-T, section 3.3",
    )
    guidance: float | None = setting(
        None,
        "Guidance scale of the teacher (null: beside a student that of its pairs, else 3), or to imitate, "
        "for a student with guidance conditioning (null: 8, or the nearest scale in the range of its pairs)",
    )

    def __post_init__(self) -> None:
        require(
            self,
            num=(self.num >= 1, "1 or more"),
            batch_size=(self.batch_size >= 1, "1 or more"),
            guidance=(_is_scale(self.guidance), "1 (no guidance) or more"),
            steps=(self.steps is None or self.steps >= 1, "1 or more"),
            prior_steps=(self.prior_steps is None or self.prior_steps >= 1, "1 or more"),
            prior_guidance=(_is_scale(self.prior_guidance), "1 (no guidance) or more"),
            psi=(self.psi is None or 0 <= self.psi <= 1, "0 (the mean style) to 1 (no truncation)"),
        )
        require_prompts(self.column, self.prompts)
        if self.prior is not None and self.student is None and self.teacher is None:
            raise SettingError(
                f"prior is {self.prior!r}, but there is nothing to draw with; give --student or --teacher"
            )
        if self.psi is not None and self.teacher is not None:
            raise SettingError(
                f"psi is {self.psi:g}, which truncates a student, but teacher is {self.teacher!r}; leave one "
                "out"
            )
        for name in ("prior_steps", "prior_guidance"):
            if getattr(self, name) is not None and (self.teacher is None or self.prior is None):
                raise SettingError(
                    f"{name} is {getattr(self, name)}, which goes with --teacher and --prior; leave it out"
                )
        if self.steps is not None and self.teacher is None:
            raise SettingError(
                f"steps is {self.steps}, but a student takes one step; give --teacher, or leave --steps out"
            )


def _is_scale(guidance: float | None) -> bool:
    """Whether a guidance scale is none, or one that a teacher can sample with."""
    return guidance is None or 1 <= guidance < math.inf


SAMPLE_PRESETS = Presets({"default": ("The shipped miniature student", SampleConfig())})
"""Presets of `d2g sample`."""
