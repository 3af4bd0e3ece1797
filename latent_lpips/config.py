"""Settings of the perceptual distance: network, augmentation and training."""

from dataclasses import dataclass
from typing import Literal

from d2g.core.config import require, setting

Precision = Literal["fp32", "bf16", "auto"]
"""Precision of a frozen trunk's convolutions. `auto` is bf16 where the hardware supports it, else fp32."""

AUGMENT_FAMILIES = "bgco"
"""Families of transforms: b pixel blitting, g general geometry, c color, o cutout."""


def are_augment_families(families: str) -> bool:
    """Whether `families` is `none`, or distinct letters of `AUGMENT_FAMILIES`."""
    letters = set(families)
    return families == "none" or (0 < len(families) == len(letters) and letters <= set(AUGMENT_FAMILIES))


@dataclass(frozen=True, kw_only=True, slots=True)
class LPIPSConfig:
    """The trunk: a VGG16 for latents without the first three max-pools (Diffusion2GAN, supplement C.2)."""

    channels: int = setting(
        4,
        "Latent channels: 4 for SD 1.5, 2.1 and SDXL, 16 for SD3 and FLUX",
        source="supplement C.2",
        recipe=True,
    )
    width: float = setting(1.0, "Factor on the 64/128/256/512/512 feature channels and the classifier's 4096")
    norm: Literal["batch", "group", "none"] = setting(
        "batch",
        "Normalization layers: batch; group, for batches too small for batch statistics; none, plain VGG16,"
        " which a batch-norm trunk becomes when its norms are folded into the convolutions",
        source="supplement C.2",
    )

    def __post_init__(self) -> None:
        require(
            self,
            channels=(self.channels > 0, "a positive number"),
            width=(1 / 64 <= self.width <= 4, "1/64 to 4"),
            norm=(self.norm in ("batch", "group", "none"), "'batch', 'group' or 'none'"),
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the five tapped feature maps."""
        return tuple(max(1, round(c * self.width)) for c in (64, 128, 256, 512, 512))


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """E-LatentLPIPS' random transforms. Every operation of a chosen family is sampled for every sample."""

    families: str = setting(
        "bgco",
        "Letters of bgco, or none: b blitting, g geometry, c color, o cutout. The paper: bgo for SD-CFG-3, "
        "bgco for SD-CFG-8 and SDXL",
        source="Table A1",
    )
    flip: bool = setting(True, "b: mirror half of the rows left-right", source='method.md "E-LatentLPIPS"')
    quarter_turns: bool = setting(
        True, "b: rotate by 0, 90, 180 or 270 degrees", source='method.md "E-LatentLPIPS"'
    )
    integer_shift: float = setting(
        0.125,
        "b: translate by U(-s, s) of the size, rounded to whole positions",
        source='method.md "E-LatentLPIPS"',
    )
    scale_std: float = setting(0.2, "g: isotropic scale 2^N(0, s^2)", source='method.md "E-LatentLPIPS"')
    rotation: float = setting(
        180.0,
        "g: one rotation before and one after the stretch, each U(-r, r) degrees",
        source='method.md "E-LatentLPIPS"',
    )
    stretch_std: float = setting(
        0.2, "g: anisotropic scale (s, 1/s) with s = 2^N(0, std^2)", source='method.md "E-LatentLPIPS"'
    )
    shift_std: float = setting(
        0.125, "g: translate by N(0, s^2) of the size", source='method.md "E-LatentLPIPS"'
    )
    brightness: float = setting(0.5, "c: add U(-b, b) to all channels", source='method.md "E-LatentLPIPS"')
    contrast: float = setting(
        0.5, "c: scale about the mean of the row by U(1 - c, 1 + c)", source='method.md "E-LatentLPIPS"'
    )
    saturation: float = setting(
        1.0,
        "c: scale about the channel mean at each position by U(1 - s, 1 + s)",
        source='method.md "E-LatentLPIPS"',
    )
    cutout: float = setting(
        0.5, "o: side of the zeroed square as a fraction of the size", source='method.md "E-LatentLPIPS"'
    )

    def __post_init__(self) -> None:
        require(self, families=(are_augment_families(self.families), "'none' or letters of 'bgco'"))
        for name in ("integer_shift", "scale_std", "stretch_std", "shift_std", "brightness"):
            require(self, **{name: (getattr(self, name) >= 0, "0 or more")})
        for name in ("contrast", "saturation", "cutout"):
            require(self, **{name: (0 <= getattr(self, name) <= 1, "0 to 1")})
        require(self, rotation=(0 <= self.rotation <= 180, "0 to 180 degrees"))

    @property
    def letters(self) -> str:
        """The families in the order in which they are applied; empty for `none`."""
        return "".join(c for c in AUGMENT_FAMILIES if self.families != "none" and c in self.families)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkTrainConfig:
    """Training of the trunk by classification. Defaults: the ImageNet recipe of the paper's supplement."""

    optimizer: Literal["sgd", "adamw"] = setting(
        "sgd", "Optimizer of the trunk", source="pytorch/examples/imagenet"
    )
    lr: float = setting(0.1, "Learning rate", source="pytorch/examples/imagenet", recipe=True)
    schedule: Literal["step", "onecycle"] = setting(
        "step",
        "step: x0.1 after each third; onecycle: linear rise over 10 %, cosine to 0",
        source="pytorch/examples/imagenet",
    )
    momentum: float = setting(0.9, "Momentum of sgd", source="pytorch/examples/imagenet")
    weight_decay: float = setting(1e-4, "Weight decay", source="pytorch/examples/imagenet")
    batch: int = setting(256, "Images per optimizer step", source="pytorch/examples/imagenet")
    images: int = setting(
        90 * 1_281_167, "Training images, repeats included", source="pytorch/examples/imagenet"
    )
    minutes: float | None = setting(
        None, "Stop after this many minutes, if that comes first; the schedule follows; null: no limit"
    )
    dropout: float = setting(0.5, "Dropout probability in the classifier", source="pytorch/examples/imagenet")
    grid: int = setting(
        7, "The classifier sees features pooled to grid x grid", source="pytorch/examples/imagenet"
    )
    shift: float = setting(
        0.125, "Random translation of latents by whole positions, as a fraction of the size"
    )
    flip: bool = setting(False, "Mirror half of the latents; off because captions say left and right")
    held_out: float = setting(0.05, "Share of the images kept for scoring")

    def __post_init__(self) -> None:
        require(
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
    """Linear heads on a frozen trunk by LPIPS' protocol: constant learning rate, then linear to 0."""

    lr: float = setting(1e-4, "Learning rate of the heads", source="Zhang et al. 2018", recipe=True)
    batch: int = setting(50, "Judgments per optimizer step", source="Zhang et al. 2018")
    epochs: int = setting(
        10,
        "Epochs: constant learning rate for the first half, linear decay to 0 in the second",
        source="Zhang et al. 2018",
        recipe=True,
    )
    dropout: float = setting(0.5, "Dropout probability before the heads", source="Zhang et al. 2018")
    held_out: float = setting(
        0.1,
        "Share of the pictures held out for scoring, with all their judgments; unused if the data has val/",
    )

    def __post_init__(self) -> None:
        require(
            self,
            lr=(self.lr > 0, "a positive number"),
            batch=(self.batch >= 1, "1 or more"),
            epochs=(self.epochs >= 1, "1 or more"),
            dropout=(0 <= self.dropout < 1, "0 up to below 1"),
            held_out=(0 < self.held_out < 1, "between 0 and 1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LPIPSTrainConfig:
    """Training of a LatentLPIPS for a new latent space: trunk, then calibration."""

    network: LPIPSConfig = setting(LPIPSConfig(), "The trunk")
    trunk: TrunkTrainConfig = setting(TrunkTrainConfig(), "Training of the trunk")
    calibrate: CalibrateConfig = setting(CalibrateConfig(), "Training of the heads")
    triplets: int = setting(
        20_000, "Synthetic two-alternative judgments to calibrate on; at most one per image"
    )
    unrelated: float | None = setting(
        1.0,
        "Scale the heads until two unrelated latents are this far apart on average, so that loss weights "
        "carry over between latent spaces; null keeps the scale of the calibration",
    )
    seed: int = setting(0, "Seed of everything random (option --seed)")

    def __post_init__(self) -> None:
        require(
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
