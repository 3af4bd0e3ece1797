"""What `d2g lpips train`, `calibrate`, `score`, `overfit` and `triplets` are told."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from d2g.core.errors import SettingError
from latent_lpips.config import AugmentConfig, CalibrateConfig, require_settings


def require_given(config: Any, *names: str) -> None:
    """Raise SettingError for the first of `names` that nobody set."""
    for name in names:
        if not getattr(config, name):
            raise SettingError(f"{name} is not set; give --{name}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyConfig:
    """Trunk training: classify the latents of labeled images. Defaults: the ImageNet recipe that the paper's
    supplement names (pytorch/examples/imagenet)."""

    data: str = ""
    """Subfolders for the classes, these perhaps in train/ and val/; or image-parquet with `label`. What is
    named val, validation or test is never trained on."""
    val: str = ""
    """The same, to score on [val/ or validation files in data, else `held_out` of data]."""
    latents: str = ""
    """Autoencoder folder, or pipeline (folder, hub id, shipped name) with one."""
    seed: int = 0
    size: int = 224
    """Side of a crop in pixels."""
    area: tuple[float, float] = (0.08, 1.0)
    """A training crop's share of the picture, from and to; its sides are 3/4 to 4/3 of each other."""
    mirror: bool = True
    """Mirror half of the training crops, before they are encoded: a VAE doesn't commute with mirrors."""
    posterior: Literal["sample", "mean"] = "sample"
    """Of a training crop's latent; scoring takes the mean. Some autoencoders have but one answer."""
    crops: int = 0
    """0: encode fresh crops in every epoch. n: encode n crops of each picture once, keep their latents on
    disk in fp16, and take one after the other, epoch by epoch."""
    cache: str = ""
    """Folder for these latents [OUT/run/latents]."""
    shift: float = 0.0
    """Move training latents by whole positions, up to this fraction of the size (reflected at the border)."""
    held_out: float = 0.1
    """Share of data to score on where nothing else is given."""
    width: float = 1.0
    norm: Literal["batch", "group", "none"] = "batch"
    dropout: float = 0.5
    grid: int = 7
    """The classifier sees features pooled to grid x grid."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    schedule: Literal["step", "onecycle"] = "step"
    """step: x0.1 after each third; onecycle: linear rise over 10 %, cosine to 0."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch: int = 256
    """Over all processes, whose batch statistics are taken together."""
    epochs: int = 90
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast in the classifier; weights, statistics and the autoencoder stay in fp32."""
    minutes: float | None = None
    """Stop so long after the start, encoding included, with a checkpoint; the same command goes on."""
    workers: int = 0
    """Threads that decode pictures; 0: two more than cores."""
    score_epochs: int = 1
    """Score and write a checkpoint after each so many epochs."""

    def __post_init__(self) -> None:
        low, high = self.area
        require_settings(
            self,
            size=(self.size >= 1, "1 or more"),
            area=(0 < low <= high <= 1, "two shares, 0 < from <= to <= 1"),
            crops=(self.crops >= 0, "0 or more"),
            shift=(0 <= self.shift < 1, "0 up to below 1"),
            held_out=(0 < self.held_out < 1, "between 0 and 1"),
            dropout=(0 <= self.dropout < 1, "0 up to below 1"),
            grid=(self.grid >= 1, "1 or more"),
            lr=(self.lr > 0, "a positive number"),
            momentum=(0 <= self.momentum < 1, "0 up to below 1"),
            weight_decay=(self.weight_decay >= 0, "0 or more"),
            batch=(self.batch >= 2, "2 or more, for the batch statistics"),
            epochs=(self.epochs >= 1, "1 or more"),
            minutes=(self.minutes is None or self.minutes > 0, "a positive number"),
            workers=(self.workers >= 0, "0 or more"),
            score_epochs=(self.score_epochs >= 1, "1 or more"),
            seed=(self.seed >= 0, "0 or more"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchConfig:
    """How the patches of a BAPPS folder become latents."""

    load: int = 0
    """Resize patches to this side first (LPIPS: 64), for every measure; 0: as they are."""
    upsample: int = 0
    """Enlarge them to this side before they are encoded, bicubic; 0: not."""
    batch: int = 50

    def __post_init__(self) -> None:
        require_settings(
            self,
            load=(self.load >= 0, "0 or more"),
            upsample=(self.upsample >= 0, "0 or more"),
            batch=(self.batch >= 1, "1 or more"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadsConfig:
    """Calibration on two-alternative judgments, LPIPS' protocol (Zhang et al. 2018)."""

    data: str = ""
    """BAPPS: train/ and val/ with a folder for each kind, or one folder with ref/ p0/ p1/ judge/."""
    latents: str = ""
    weights: str = ""
    """LatentLPIPS folder (of `lpips train`) or authors' file, whose heads are fitted anew."""
    seed: int = 0
    patch: PatchConfig = field(default_factory=PatchConfig)
    heads: CalibrateConfig = field(default_factory=CalibrateConfig)
    """`held_out` counts where the data has no val/."""
    unrelated: float | None = None
    """Scale the heads until two unrelated patches are this far apart on average; null: as fitted."""

    def __post_init__(self) -> None:
        unrelated = self.unrelated is None or self.unrelated > 0
        require_settings(self, unrelated=(unrelated, "positive or null"), seed=(self.seed >= 0, "0 or more"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """Agreement with human judgments: 2AFC and JND, by split."""

    data: str = ""
    latents: str = ""
    weights: str = ""
    """LatentLPIPS folder or authors' file."""
    seed: int = 0
    """Of the bootstrap."""
    patch: PatchConfig = field(default_factory=PatchConfig)
    baselines: tuple[str, ...] = ()
    """Scored beside it: l2 and ssim, in pixels."""
    lpips: Literal["", "vgg", "alex", "squeeze"] = ""
    """Score LPIPS in pixels too, with this network."""
    lpips_weights: str = ""
    """Torchvision's file of its trunk ["": PyTorch's hub folder]."""
    resamples: int = 1000
    """Of the bootstrap; 0: no intervals."""

    def __post_init__(self) -> None:
        known = set(self.baselines) <= {"l2", "ssim"}
        require_settings(
            self,
            baselines=(known and len(set(self.baselines)) == len(self.baselines), "some of l2, ssim"),
            lpips=(self.lpips in ("", "vgg", "alex", "squeeze"), "vgg, alex or squeeze"),
            resamples=(self.resamples == 0 or self.resamples >= 20, "0, or 20 or more"),
            seed=(self.seed >= 0, "0 or more"),
        )
        if self.lpips_weights and not self.lpips:
            raise SettingError("setting 'lpips_weights' is set but 'lpips' is not; say vgg, alex or squeeze")


@dataclass(frozen=True, kw_only=True, slots=True)
class OverfitConfig:
    """Can the distance alone bring random latents to given ones? Supplement C.1 and its Fig. A1."""

    data: str = ""
    """Folder of pictures, or one; the first `count` in order of name are taken."""
    latents: str = ""
    weights: str = ""
    seed: int = 0
    families: tuple[str, ...] = ("none", "b", "bg", "bgc", "bgco")
    count: int = 4
    size: int = 512
    """Pictures are cropped square and resized to this side."""
    steps: int = 15_000
    lr: float = 1e-2
    draws: int = 1
    """Transforms averaged over in each step; the paper takes one."""
    report_steps: int = 250
    checkpoint_steps: int = 1_000

    def __post_init__(self) -> None:
        for families in self.families:
            AugmentConfig(families=families)
        distinct = len(set(self.families)) == len(self.families) > 0
        require_settings(
            self,
            families=(distinct, "one or more, each once"),
            count=(self.count >= 1, "1 or more"),
            size=(self.size >= 1, "1 or more"),
            steps=(self.steps >= 1, "1 or more"),
            lr=(self.lr > 0, "a positive number"),
            draws=(self.draws >= 1, "1 or more"),
            report_steps=(self.report_steps >= 1, "1 or more"),
            checkpoint_steps=(self.checkpoint_steps >= 1, "1 or more"),
            seed=(self.seed >= 0, "0 or more"),
        )


DISTORTION_KINDS = ("blur", "noise", "jpeg", "warp", "color", "decoder")


@dataclass(frozen=True, kw_only=True, slots=True)
class TripletsConfig:
    """Triplets whose order is known: one kind of distortion at two strengths."""

    data: str = ""
    """Folder of pictures, or image-parquet."""
    decoders: tuple[str, ...] = ()
    """Autoencoders, say undertrained ones, whose reconstructions are the kind `decoder`."""
    kinds: tuple[str, ...] = ()
    """Some of blur, noise, jpeg, warp, color, decoder; none: all that can be made."""
    seed: int = 0
    size: int = 64
    """Side of a patch in pixels."""
    patches: int = 1
    """Patches cut from each picture."""
    ratio: float = 1.3
    """The stronger distortion is at least so many times the weaker."""
    val: float = 0.1
    """Share of pictures whose patches go to val/."""

    def __post_init__(self) -> None:
        require_settings(
            self,
            kinds=(set(self.kinds) <= set(DISTORTION_KINDS), f"some of {', '.join(DISTORTION_KINDS)}"),
            size=(self.size >= 16, "16 or more"),
            patches=(self.patches >= 1, "1 or more"),
            ratio=(1.25 <= self.ratio <= 10, "1.25 to 10: closer ones can be one JPEG quality"),
            val=(0 <= self.val < 1, "0 up to below 1"),
            seed=(self.seed >= 0, "0 or more"),
        )
        if "decoder" in self.kinds and not self.decoders:
            raise SettingError("setting 'kinds' has decoder, but no decoder is given; give --decoder")

    @property
    def made(self) -> tuple[str, ...]:
        """The kinds that are made, in order."""
        return self.kinds or tuple(kind for kind in DISTORTION_KINDS if kind != "decoder" or self.decoders)


_SMALL = ClassifyConfig(
    optimizer="adamw",
    lr=2e-3,
    schedule="onecycle",
    weight_decay=0.05,
    batch=64,
    size=112,
    area=(0.25, 1.0),
    crops=4,
    posterior="mean",
    shift=0.125,
    width=0.25,
    grid=3,
    epochs=40,
    score_epochs=4,
)
TRAIN_PRESETS = {"paper": ClassifyConfig(), "small": _SMALL}
"""`paper`: ImageNet, 224 pixels. `small`: thousands of pictures, minutes on a CPU."""

LPIPS_HEADS = HeadsConfig(patch=PatchConfig(load=64, upsample=512))
HEADS_PRESETS = {
    "paper": LPIPS_HEADS,
    "small": HeadsConfig(heads=CalibrateConfig(lr=3e-3, epochs=20)),
}
"""`paper`: BAPPS as LPIPS loads it, enlarged to 512 pixels. `small`: patches as they are, larger steps."""

SCORE_PRESETS = {
    "paper": ScoreConfig(patch=LPIPS_HEADS.patch),
    "small": ScoreConfig(),
}

OVERFIT_PRESETS = {
    "paper": OverfitConfig(),
    "small": replace(OverfitConfig(), size=128, steps=2_000, report_steps=50),
}

TRIPLETS_PRESETS = {"patches": TripletsConfig(), "pictures": TripletsConfig(size=128)}
