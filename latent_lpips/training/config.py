"""Settings of `d2g lpips train`, `calibrate`, `score`, `overfit` and `triplets`, and their presets."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from d2g.core.config import Presets, require, setting
from d2g.core.errors import SettingError
from latent_lpips.config import AugmentConfig, CalibrateConfig


def require_set(config: Any, *names: str) -> None:
    """Raise SettingError for the first of `names` that is not set."""
    for name in names:
        if not getattr(config, name):
            raise SettingError(f"{name} is not set; give --{name}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyConfig:
    """Trunk training: classify the latents of labeled images. Defaults: the ImageNet recipe that the paper's
    supplement names (pytorch/examples/imagenet)."""

    data: str = setting(
        "",
        "Labeled images (option --data): one subfolder per class, optionally inside train/ and val/, or "
        "image-parquet with a label column. Anything named val, validation or test is never trained on",
        recipe=True,
    )
    val: str = setting(
        "", "Labeled images to score on; empty: val/ or validation files of data, else held_out of data"
    )
    latents: str = setting(
        "",
        "Autoencoder folder, or pipeline with one: folder, hub id or shipped name (option --latents)",
        recipe=True,
    )
    seed: int = setting(0, "Seed of everything random (option --seed)")
    size: int = setting(
        224, "Side of a training crop in pixels", source="pytorch/examples/imagenet", recipe=True
    )
    area: tuple[float, float] = setting(
        (0.08, 1.0),
        "Smallest and largest share of the image that a training crop covers; aspect ratio 3/4 to 4/3",
        source="pytorch/examples/imagenet",
    )
    mirror: bool = setting(
        True,
        "Mirror half of the training crops before encoding, because a VAE does not commute with mirroring",
        source="pytorch/examples/imagenet",
    )
    posterior: Literal["sample", "mean"] = setting(
        "sample", "Latent of a training crop: sample or mean of the posterior; scoring uses the mean"
    )
    crops: int = setting(
        0,
        "0 encodes fresh crops every epoch; n encodes n crops per image once, stores their latents in fp16 "
        "and uses one per epoch in turn",
    )
    cache: str = setting("", "Folder for stored latents; empty: OUT/run/latents")
    shift: float = setting(
        0.0,
        "Translate training latents by whole positions up to this fraction of the size, reflected at the "
        "border",
    )
    held_out: float = setting(0.1, "Share of data to score on when there is no validation data")
    width: float = setting(1.0, "Factor on the 64/128/256/512/512 feature channels and the classifier's 4096")
    norm: Literal["batch", "group", "none"] = setting(
        "batch",
        "Normalization layers: batch; group, for batches too small for batch statistics; none, plain VGG16,"
        " which a batch-norm trunk becomes when its norms are folded into the convolutions",
        source="supplement C.2",
    )
    dropout: float = setting(0.5, "Dropout probability in the classifier", source="pytorch/examples/imagenet")
    grid: int = setting(
        7, "The classifier sees features pooled to grid x grid", source="pytorch/examples/imagenet"
    )
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "Optimizer", source="pytorch/examples/imagenet")
    lr: float = setting(0.1, "Learning rate", source="pytorch/examples/imagenet", recipe=True)
    schedule: Literal["step", "onecycle"] = setting(
        "step",
        "step: x0.1 after each third; onecycle: linear rise over 10 %, cosine to 0",
        source="pytorch/examples/imagenet",
    )
    momentum: float = setting(0.9, "Momentum of sgd", source="pytorch/examples/imagenet")
    weight_decay: float = setting(1e-4, "Weight decay", source="pytorch/examples/imagenet")
    batch: int = setting(
        256,
        "Crops per optimizer step, over all processes; batch statistics are taken over all of them",
        source="pytorch/examples/imagenet",
        recipe=True,
    )
    epochs: int = setting(90, "Training epochs", source="pytorch/examples/imagenet", recipe=True)
    precision: Literal["fp32", "bf16"] = setting(
        "fp32", "bf16: autocast in the classifier; weights, statistics and the autoencoder stay in fp32"
    )
    minutes: float | None = setting(
        None,
        "Stop this many minutes after the start, encoding included, with a checkpoint; the same command "
        "resumes; null: no limit",
    )
    workers: int = setting(0, "Threads that decode images; 0: two more than cores")
    score_epochs: int = setting(1, "Epochs between scores and checkpoints")

    def __post_init__(self) -> None:
        # Limits that do not depend on the autoencoder; `check_image_size` checks the others.
        low, high = self.area
        require(
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
    """How patches of a BAPPS folder are loaded and encoded to latents."""

    load: int = setting(
        0,
        "Resize patches to this side first, for every measure (LPIPS: 64); 0 keeps their size",
        source="Zhang et al. 2018",
    )
    upsample: int = setting(
        0, "Enlarge patches to this side before encoding, bicubic; 0 does not", source="supplement C.2"
    )
    batch: int = setting(50, "Patches per forward pass")

    def __post_init__(self) -> None:
        require(
            self,
            load=(self.load >= 0, "0 or more"),
            upsample=(self.upsample >= 0, "0 or more"),
            batch=(self.batch >= 1, "1 or more"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadsConfig:
    """Calibration on two-alternative judgments, LPIPS' protocol (Zhang et al. 2018)."""

    data: str = setting(
        "",
        "BAPPS folder (option --data): train/ and val/ with one folder per kind, or one folder with ref/ "
        "p0/ p1/ judge/",
        recipe=True,
    )
    latents: str = setting(
        "",
        "Autoencoder folder, or pipeline with one: folder, hub id or shipped name (option --latents)",
        recipe=True,
    )
    weights: str = setting(
        "",
        "LatentLPIPS folder (of `d2g lpips train`) or the authors' file, whose heads are fitted again",
        recipe=True,
    )
    seed: int = setting(0, "Seed of everything random (option --seed)")
    patch: PatchConfig = setting(PatchConfig(), "How patches become latents")
    heads: CalibrateConfig = setting(CalibrateConfig(), "Training of the heads")
    unrelated: float | None = setting(
        None, "Scale the heads until two unrelated patches are this far apart on average; null: as fitted"
    )

    def __post_init__(self) -> None:
        unrelated = self.unrelated is None or self.unrelated > 0
        require(self, unrelated=(unrelated, "positive or null"), seed=(self.seed >= 0, "0 or more"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """Agreement with human judgments: 2AFC and JND, by split."""

    data: str = setting("", "BAPPS folder (option --data)", recipe=True)
    latents: str = setting(
        "",
        "Autoencoder folder, or pipeline with one: folder, hub id or shipped name (option --latents)",
        recipe=True,
    )
    weights: str = setting("", "LatentLPIPS folder or the authors' file", recipe=True)
    seed: int = setting(0, "Seed of the bootstrap")
    patch: PatchConfig = setting(PatchConfig(), "How patches become latents")
    baselines: tuple[str, ...] = setting((), "Measures to score too, in pixels: l2, ssim")
    lpips: Literal["", "vgg", "alex", "squeeze"] = setting(
        "", "Network of LPIPS to score too, in pixels; empty: none"
    )
    lpips_weights: str = setting("", "Torchvision's weight file of that network; empty: PyTorch's hub folder")
    resamples: int = setting(1000, "Bootstrap resamples; 0: no intervals")

    def __post_init__(self) -> None:
        # Each baseline at most once.
        known = set(self.baselines) <= {"l2", "ssim"}
        require(
            self,
            baselines=(known and len(set(self.baselines)) == len(self.baselines), "some of l2, ssim"),
            lpips=(self.lpips in ("", "vgg", "alex", "squeeze"), "vgg, alex or squeeze"),
            resamples=(self.resamples == 0 or self.resamples >= 20, "0, or 20 or more"),
            seed=(self.seed >= 0, "0 or more"),
        )
        if self.lpips_weights and not self.lpips:
            raise SettingError("lpips_weights is set but lpips is not; say vgg, alex or squeeze")


@dataclass(frozen=True, kw_only=True, slots=True)
class OverfitConfig:
    """Optimization of random latents towards target latents with the distance alone (supplement C.1)."""

    data: str = setting(
        "", "Folder of images, or one image; the first count in order of name are used", recipe=True
    )
    latents: str = setting(
        "",
        "Autoencoder folder, or pipeline with one: folder, hub id or shipped name (option --latents)",
        recipe=True,
    )
    weights: str = setting("", "LatentLPIPS folder or the authors' file", recipe=True)
    seed: int = setting(0, "Seed of everything random (option --seed)")
    families: tuple[str, ...] = setting(
        ("none", "b", "bg", "bgc", "bgco"),
        "Augmentations to compare, one optimization each",
        source="supplement C.1",
        recipe=True,
    )
    count: int = setting(4, "Number of images", source="supplement C.1")
    size: int = setting(512, "Images are cropped square and resized to this side", source="supplement C.1")
    steps: int = setting(15_000, "Optimizer steps", source="supplement C.1", recipe=True)
    lr: float = setting(1e-2, "Learning rate of the latents", source="ours")
    draws: int = setting(1, "Random transforms averaged over in each step", source="supplement C.1")
    report_steps: int = setting(250, "Steps between reports")
    checkpoint_steps: int = setting(1_000, "Steps between checkpoints")

    def __post_init__(self) -> None:
        # AugmentConfig checks the letters of each entry.
        for families in self.families:
            AugmentConfig(families=families)
        distinct = len(set(self.families)) == len(self.families) > 0
        require(
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
    """Triplets with a known answer: one kind of distortion at two strengths."""

    data: str = setting("", "Folder of images, or image-parquet (option --data)", recipe=True)
    decoders: tuple[str, ...] = setting(
        (), "Autoencoders, such as undertrained ones, whose reconstructions are the distortion decoder"
    )
    kinds: tuple[str, ...] = setting(
        (),
        f"Distortions, some of {', '.join(DISTORTION_KINDS)}; empty: all that the inputs allow",
        recipe=True,
    )
    seed: int = setting(0, "Seed of everything random (option --seed)")
    size: int = setting(64, "Side of a patch in pixels", recipe=True)
    patches: int = setting(1, "Patches cut from each image")
    ratio: float = setting(1.3, "The stronger distortion is at least this many times the weaker one")
    val: float = setting(0.1, "Share of the images whose patches go to val/")

    def __post_init__(self) -> None:
        require(
            self,
            kinds=(set(self.kinds) <= set(DISTORTION_KINDS), f"some of {', '.join(DISTORTION_KINDS)}"),
            size=(self.size >= 16, "16 or more"),
            patches=(self.patches >= 1, "1 or more"),
            ratio=(1.25 <= self.ratio <= 10, "1.25 to 10: closer ones can be one JPEG quality"),
            val=(0 <= self.val < 1, "0 up to below 1"),
            seed=(self.seed >= 0, "0 or more"),
        )
        if "decoder" in self.kinds and not self.decoders:
            raise SettingError("kinds has decoder, but no decoder is given; give --decoder")

    @property
    def selected_kinds(self) -> tuple[str, ...]:
        """The kinds of distortion to apply, in order."""
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
TRAIN_PRESETS = Presets(
    {
        "paper": ("The supplement's recipe: ImageNet at 224 pixels", ClassifyConfig()),
        "small": ("Thousands of images, minutes on a CPU", _SMALL),
    }
)
"""Presets of `d2g lpips train`."""

LPIPS_HEADS = HeadsConfig(patch=PatchConfig(load=64, upsample=512))
HEADS_PRESETS = Presets(
    {
        "paper": ("BAPPS patches loaded as by LPIPS, enlarged to 512 pixels", LPIPS_HEADS),
        "small": (
            "Patches in their own size, a larger learning rate",
            HeadsConfig(heads=CalibrateConfig(lr=3e-3, epochs=20)),
        ),
    }
)
"""Presets of `d2g lpips calibrate`."""

SCORE_PRESETS = Presets(
    {
        "paper": (
            "BAPPS patches loaded as by LPIPS, enlarged to 512 pixels",
            ScoreConfig(patch=LPIPS_HEADS.patch),
        ),
        "small": ("Patches in their own size", ScoreConfig()),
    }
)
"""Presets of `d2g lpips score`."""

OVERFIT_PRESETS = Presets(
    {
        "paper": ("512 pixels, 15,000 steps", OverfitConfig()),
        "small": (
            "128 pixels, 2,000 steps",
            replace(OverfitConfig(), size=128, steps=2_000, report_steps=50),
        ),
    }
)
"""Presets of `d2g lpips overfit`."""

TRIPLETS_PRESETS = Presets(
    {
        "patches": ("Patches of 64 pixels", TripletsConfig()),
        "pictures": ("Patches of 128 pixels", TripletsConfig(size=128)),
    }
)
"""Presets of `d2g lpips triplets`."""
