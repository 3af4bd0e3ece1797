"""Settings of both distillation stages, and presets (Table A1 of the supplement; the miniature)."""

from dataclasses import dataclass, field, replace
from typing import Literal

from core.config import pick
from core.errors import SettingError


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW for one network. The supplement's "Adam" with weight decay 1e-2 is read as decoupled (method.md
    5).
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    attention_weight_decay: float = 1e-5  # of everything inside attention layers
    warmup_images: int = 0
    decay_images: int = 0  # 0: constant; else a cosine to zero over so many images
    clip_norm: float = 0.0  # 0: off

    def __post_init__(self) -> None:
        if self.lr <= 0 or min(self.weight_decay, self.attention_weight_decay, self.clip_norm) < 0:
            raise SettingError(f"optim: lr {self.lr} must be positive; decays and clip_norm not negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class RegressionConfig:
    """E-LatentLPIPS between student and teacher latents, with its options."""

    weight: float = 1.0
    augment: str = "bgco"  # families of method.md 3.3; "none" is plain LatentLPIPS
    draws: int = 1  # transforms per sample and step
    latent_lpips: float = 0.0  # weight of un-augmented LatentLPIPS beside it (SD-CFG-3's ensemble: 1)
    l1: float = 0.0  # weight of mean absolute error on un-augmented latents (off in the paper)

    def __post_init__(self) -> None:
        if min(self.weight, self.latent_lpips, self.l1) < 0 or self.draws < 1:
            raise SettingError("regression: weights must not be negative and draws at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DiscriminatorConfig:
    """Discriminator and its loss. Defaults are the paper's, or method.md's where no source fixes them."""

    weight: float = 0.25  # lambda_GAN of the student's loss
    timestep: int = 0  # constant time input of D (not fixed by any source)
    z_conditioning: bool = True
    multi_scale_input: bool = True
    multi_scale_output: bool = True
    mix_fraction: float = 0.25  # of fake rows replaced by mismatched real triples; x, c, z share it
    r1_gamma: float = 0.01  # 0: no R1
    r1_interval: int = 16
    optim: OptimConfig = OptimConfig(lr=1e-5)

    def __post_init__(self) -> None:
        if not 0 <= self.mix_fraction < 1:
            raise SettingError(f"gan.mix_fraction is {self.mix_fraction}; expected 0 up to below 1")
        if self.r1_gamma < 0 or self.r1_interval < 1 or self.weight < 0 or self.timestep < 0:
            raise SettingError(
                "gan: r1_gamma, weight and timestep must not be negative, r1_interval at least 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length, batch, averaging and reporting. `images` and `batch_size` count over all ranks."""

    images: int = 38_400_000
    minutes: float | None = None  # stop after so much time in this process, if that comes first
    batch_size: int = 256
    ema_beta: float = 0.9999
    ema_start_images: int = 0  # until then the average is a plain copy
    # Of the networks' arithmetic, LatentLPIPS' trunk among them; weights and losses are fp32.
    precision: Literal["fp32", "bf16"] = "bf16"
    loader_workers: int = 2
    report_images: int = 12_800
    checkpoint_images: int = 1_280_000
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "report_images", "checkpoint_images", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise SettingError(f"train.{name} is {getattr(self, name)}; expected 1 or more")
        if not 0 <= self.ema_beta < 1 or (self.minutes is not None and self.minutes <= 0):
            raise SettingError(
                f"train: ema_beta {self.ema_beta} must be in [0, 1), minutes {self.minutes} positive"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How pairs are read: their order, what to do about damage, and copies of a store at a URL."""

    block: int = 0  # rows that stay together in the shuffle, for slow disks and URLs; 0: shuffle all rows
    window: int = 0  # blocks whose rows are shuffled among themselves; with `block` only
    skip_bad: bool = False  # read the next sound shard's rows in place of damaged ones, with a warning
    cache: str = ""  # folder for copies of a URL's shards; "": $XDG_CACHE_HOME/diffusion2gan/pairs
    cache_gib: float = 0.0  # bound of that folder, the longest unused make room; 0: none

    def __post_init__(self) -> None:
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
    pairs: str = ""
    teacher: str = ""
    lpips: str = ""  # folder of LatentLPIPS weights; "": TEACHER/latent_lpips
    init: str = ""  # gan: the run or exported student to start from
    student_timestep: int = -1  # -1: the schedule's last (999)
    seed: int = 0
    optim: OptimConfig = OptimConfig()
    regression: RegressionConfig = RegressionConfig()
    gan: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()

    def __post_init__(self) -> None:
        if self.stage == "gan" and self.gan.mix_fraction > 0 and self.train.batch_size < 2:
            raise SettingError("mix-and-match needs train.batch_size of 2 or more; or set gan.mix_fraction=0")


_SD15 = TrainConfig(batch_size=2048, images=50_000 * 2048, ema_start_images=4_000 * 2048)
_TRIAL = TrainConfig(images=64, batch_size=8, ema_start_images=16, report_images=16, checkpoint_images=32)
_MINIATURE = TrainConfig(
    images=24_000,
    batch_size=64,
    ema_beta=0.99,
    precision="fp32",
    loader_workers=0,
    report_images=640,
    checkpoint_images=6_400,
)


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

    def __post_init__(self) -> None:
        if self.num < 1 or self.batch_size < 1:
            raise SettingError(f"num is {self.num} and batch_size {self.batch_size}; expected 1 or more")


SAMPLE_PRESETS = {"default": SampleConfig()}
"""Presets of `d2g sample`."""

PRESETS: dict[str, dict[str, DistillConfig]] = {
    "sd15-cfg3": {
        "ode": DistillConfig(
            regression=RegressionConfig(augment="bgo", latent_lpips=1.0),
            train=replace(_SD15, batch_size=256, images=150_000 * 256, ema_start_images=4_000 * 256),
        ),
        "gan": DistillConfig(
            stage="gan",
            optim=OptimConfig(lr=1e-5),
            regression=RegressionConfig(augment="bgo", latent_lpips=1.0),
            train=replace(_SD15, batch_size=256, images=10_000 * 256, ema_start_images=4_000 * 256),
        ),
    },
    "sd15-cfg8": {
        "ode": DistillConfig(train=_SD15),
        "gan": DistillConfig(
            stage="gan",
            optim=OptimConfig(lr=1e-5),
            train=replace(_SD15, batch_size=1024, images=10_000 * 1024, ema_start_images=4_000 * 1024),
        ),
    },
    # Every command of a run, small enough for a laptop: to see that all is in place before the real one
    "trial": {
        "ode": DistillConfig(
            regression=RegressionConfig(augment="bgo", latent_lpips=1.0),
            train=_TRIAL,
        ),
        "gan": DistillConfig(
            stage="gan",
            optim=OptimConfig(lr=1e-5),
            regression=RegressionConfig(augment="bgo", latent_lpips=1.0),
            gan=DiscriminatorConfig(r1_interval=2),
            train=_TRIAL,
        ),
    },
    # Two CPU cores; results: docs/LOG.md
    "miniature": {
        "ode": DistillConfig(teacher="miniature", optim=OptimConfig(lr=5e-4), train=_MINIATURE),
        "gan": DistillConfig(
            stage="gan",
            teacher="miniature",
            optim=OptimConfig(lr=1e-4, betas=(0.5, 0.99)),
            gan=DiscriminatorConfig(r1_interval=8, optim=OptimConfig(lr=3e-4, betas=(0.5, 0.99))),
            train=replace(_MINIATURE, images=12_000, batch_size=32, checkpoint_images=3_200),
        ),
    },
}


def preset(name: str, stage: str) -> DistillConfig:
    """The preset `name` of a stage. Raises SettingError naming the nearest preset."""
    return pick(PRESETS, name, "preset")[stage]


def plan(config: DistillConfig) -> dict[str, int]:
    """Steps and network evaluations of a run, for --dry-run. Stage 2 evaluates G once and D three times a
    sample.
    """
    images = config.train.images
    return {
        "steps": -(-images // config.train.batch_size),
        "evaluations": images * (1 if config.stage == "ode" else 4),
    }
