"""What can be set about the perceptual distance: network, augmentation, training."""

from dataclasses import dataclass, field
from typing import Literal

from d2g.core.errors import SettingError

Precision = Literal["fp32", "bf16", "auto"]
"""Of a frozen trunk's convolutions. `auto`: bf16 where the hardware multiplies it, else fp32."""

AUGMENT_FAMILIES = "bgco"
"""b: pixel blitting, g: general geometry, c: color, o: cutout."""


def are_augment_families(families: str) -> bool:
    """Whether these are `none`, or letters of `FAMILIES`, each once."""
    letters = set(families)
    return families == "none" or (0 < len(families) == len(letters) and letters <= set(AUGMENT_FAMILIES))


def require_settings(config: object, **rules: tuple[bool, str]) -> None:
    """Raise SettingError for the first setting of `config` whose rule (holds, what is expected) fails."""
    for name, (ok, expected) in rules.items():
        if not ok:
            raise SettingError(f"setting {name!r} is {getattr(config, name)!r}, expected {expected}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LPIPSConfig:
    """The trunk: VGG16 for latents, its first three max-pools removed (Diffusion2GAN, supplement C.2)."""

    channels: int = 4
    """Channels of the latent: 4 for SD 1.5, 2.1 and SDXL, 16 for SD3 and FLUX."""
    width: float = 1.0
    """Multiplies 64/128/256/512/512 feature channels and the classifier's 4096."""
    norm: Literal["batch", "group", "none"] = "batch"
    """`group`: GroupNorm, for batches too small for statistics. `none` is plain VGG16, and what a batch-norm
    trunk becomes when its norms are folded."""

    def __post_init__(self) -> None:
        require_settings(
            self,
            channels=(self.channels > 0, "a positive number"),
            width=(1 / 64 <= self.width <= 4, "1/64 to 4"),
            norm=(self.norm in ("batch", "group", "none"), "'batch', 'group' or 'none'"),
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Feature channels of the five taps."""
        return tuple(max(1, round(c * self.width)) for c in (64, 128, 256, 512, 512))


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """E-LatentLPIPS' random transforms: every op of a chosen family is drawn for every sample."""

    families: str = "bgco"
    """Letters of `bgco`, or `none`. The paper: `bgo` (SD-CFG-3), `bgco` (SD-CFG-8, SDXL)."""
    flip: bool = True
    """b: mirror left-right, for half of the samples."""
    quarter_turns: bool = True
    """b: rotate by 0, 90, 180 or 270 degrees."""
    integer_shift: float = 0.125
    """b: translate by U(-s, s) of the size, rounded to whole positions."""
    scale_std: float = 0.2
    """g: isotropic scale 2^N(0, s^2)."""
    rotation: float = 180.0
    """g: one rotation before and one after the stretch, each U(-r, r) degrees."""
    stretch_std: float = 0.2
    """g: anisotropic scale (s, 1/s) with s = 2^N(0, std^2)."""
    shift_std: float = 0.125
    """g: translate by N(0, s^2) of the size."""
    brightness: float = 0.5
    """c: add U(-b, b) to all channels."""
    contrast: float = 0.5
    """c: scale about the sample's mean by U(1 - c, 1 + c)."""
    saturation: float = 1.0
    """c: scale about each position's channel mean by U(1 - s, 1 + s)."""
    cutout: float = 0.5
    """o: side of the zeroed square, as a fraction of the size."""

    def __post_init__(self) -> None:
        require_settings(self, families=(are_augment_families(self.families), "'none' or letters of 'bgco'"))
        for name in ("integer_shift", "scale_std", "stretch_std", "shift_std", "brightness"):
            require_settings(self, **{name: (getattr(self, name) >= 0, "0 or more")})
        for name in ("contrast", "saturation", "cutout"):
            require_settings(self, **{name: (0 <= getattr(self, name) <= 1, "0 to 1")})
        require_settings(self, rotation=(0 <= self.rotation <= 180, "0 to 180 degrees"))

    @property
    def letters(self) -> str:
        """The families in the order in which they act; empty for `none`."""
        return "".join(c for c in AUGMENT_FAMILIES if self.families != "none" and c in self.families)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkTrainConfig:
    """Classification in latent space. Defaults: the ImageNet recipe that the paper's supplement names."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    schedule: Literal["step", "onecycle"] = "step"
    """step: x0.1 after each third; onecycle: linear rise over 10 %, cosine to 0."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch: int = 256
    images: int = 90 * 1_281_167
    """Samples to see, repeats included."""
    minutes: float | None = None
    """Stop after so much time, if that comes first; the schedule follows."""
    dropout: float = 0.5
    """In the classifier."""
    grid: int = 7
    """The classifier sees features pooled to grid x grid."""
    shift: float = 0.125
    """Random translation, whole positions, fraction of the size."""
    flip: bool = False
    """Off: captions say left and right."""
    held_out: float = 0.05

    def __post_init__(self) -> None:
        require_settings(
            self,
            lr=(self.lr > 0, "a positive number"),
            batch=(self.batch >= 2, "2 or more, for the batch statistics"),
            images=(self.images >= 1, "1 or more"),
            minutes=(self.minutes is None or self.minutes > 0, "a positive number"),
            dropout=(0 <= self.dropout < 1, "0 up to below 1"),
            grid=(self.grid >= 1, "1 or more"),
            held_out=(0 < self.held_out < 1, "between 0 and 1"),
            shift=(0 <= self.shift < 1, "0 up to below 1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig:
    """Linear heads on a frozen trunk, LPIPS protocol: constant rate for half of the epochs, then to 0."""

    lr: float = 1e-4
    batch: int = 50
    epochs: int = 10
    dropout: float = 0.5
    held_out: float = 0.1

    def __post_init__(self) -> None:
        require_settings(
            self,
            lr=(self.lr > 0, "a positive number"),
            batch=(self.batch >= 1, "1 or more"),
            epochs=(self.epochs >= 1, "1 or more"),
            dropout=(0 <= self.dropout < 1, "0 up to below 1"),
            held_out=(0 < self.held_out < 1, "between 0 and 1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LPIPSTrainConfig:
    """A LatentLPIPS for a new latent space: trunk, then calibration."""

    network: LPIPSConfig = field(default_factory=LPIPSConfig)
    trunk: TrunkTrainConfig = field(default_factory=TrunkTrainConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    triplets: int = 20_000
    """Synthetic two-alternative judgments to calibrate on; at most one per image."""
    unrelated: float | None = 1.0
    """Scale the heads until two unrelated latents are this far apart on average, so that loss weights
    carry over between latent spaces. null keeps the scale that calibration found."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_settings(
            self,
            triplets=(self.triplets >= 2, "2 or more"),
            unrelated=(self.unrelated is None or self.unrelated > 0, "positive or null"),
            seed=(self.seed >= 0, "0 or more"),
        )


_SMALL = TrunkTrainConfig(
    optimizer="adamw", lr=2e-3, schedule="onecycle", weight_decay=0.05, batch=128, images=150_000, grid=2
)
LPIPS_PRESETS: dict[str, LPIPSTrainConfig] = {
    "paper": LPIPSTrainConfig(),
    "small": LPIPSTrainConfig(
        network=LPIPSConfig(width=0.25),
        trunk=_SMALL,
        calibrate=CalibrateConfig(lr=3e-3, epochs=20),
        triplets=4_000,
    ),
}
"""`paper`: the published recipe at ImageNet's size. `small`: minutes on a CPU, for 8x8 to 16x16 latents."""
