"""Settings of `d2g teacher train` and their presets."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from d2g.core.config import Presets, require, setting
from d2g.core.errors import SettingError
from d2g.data.captions import CLASS_TEMPLATE, check_template
from latent_lpips.config import LPIPS_PRESETS, LPIPSTrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """Length and optimizer (AdamW) of one training. Images count over all ranks."""

    images: int = setting(500_000, "Training images, repeats included")
    batch_size: int = setting(64, "Images per step, over all ranks")
    lr: float = setting(1.5e-3, "Peak learning rate; it falls to 0 along a cosine")
    warmup_images: int = setting(
        5_000, "Images over which the learning rate rises linearly, at most a tenth of the length"
    )
    weight_decay: float = setting(0.01, "Weight decay")
    ema: float = setting(0.999, "Decay per step of the weight average, at most (1 + n) / (10 + n) in step n")
    ema_halflife_images: int = setting(
        0, "Half-life of the weight average: weights this many images old count half; 0 takes ema"
    )
    clip_norm: float = setting(1.0, "Largest gradient norm")
    checkpoint_minutes: float = setting(3.0, "Minutes between checkpoints")

    def __post_init__(self) -> None:
        require(
            self,
            images=(self.images >= 1, "1 or more"),
            batch_size=(self.batch_size >= 1, "1 or more"),
            lr=(self.lr > 0, "a positive number"),
            ema=(0 <= self.ema < 1, "0 up to below 1"),
            ema_halflife_images=(self.ema_halflife_images >= 0, "0 or more"),
        )

    @property
    def ema_decay(self) -> float:
        """Decay of the weight average per step: `ema`, or from `ema_halflife_images`."""
        halflife = self.ema_halflife_images
        return 0.5 ** (self.batch_size / halflife) if halflife else self.ema

    @property
    def steps(self) -> int:
        """Steps of the training, the last one rounded up."""
        return -(-self.images // self.batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """Shape and training of the VAE. The number of levels fixes the downscaling: 2^(levels - 1)."""

    channels: tuple[int, ...] = setting((16, 32, 64, 64), "Channels of each level", recipe=True)
    latent_channels: int = setting(8, "Channels of the latents", recipe=True)
    kl_weight: float = setting(3e-5, "Weight of the KL term per latent element")
    square_weight: float = setting(10.0, "Weight of the squared pixel error, beside the absolute one")
    edge_weight: float = setting(0.5, "Weight of the error of pixel differences, which keeps edges sharp")
    perceptual_weight: float = setting(
        0.0,
        "Weight of the squared distance of EfficientNet-lite0's unit feature vectors, beside the pixel "
        "errors; 0: no such term",
        source="Zhang et al. 2018; Rombach et al. 2022, appendix G",
    )
    adversarial_weight: float = setting(
        0.0,
        "Size of the gradient from a discriminator of patches at the decoder's last layer, relative to that "
        "of the other errors; 0: no discriminator",
        source="Esser et al. 2021, eq. 5 to 7",
    )
    adversarial_start: float = setting(
        0.5, "Share of the training images after which the discriminator begins"
    )
    adversarial_lr: float = setting(
        5e-4, "Learning rate of the discriminator; it falls along the same cosine"
    )
    fit: FitConfig = setting(
        FitConfig(images=70_000, batch_size=16, lr=2e-3, warmup_images=2_000, ema=0.995),
        "Length and optimizer",
    )

    def __post_init__(self) -> None:
        multiples = len(self.channels) >= 2 and all(c % 8 == 0 for c in self.channels)
        require(
            self,
            channels=(multiples, "two or more multiples of 8"),
            perceptual_weight=(self.perceptual_weight >= 0, "0 or more"),
            adversarial_weight=(self.adversarial_weight >= 0, "0 or more"),
            adversarial_start=(0 <= self.adversarial_start < 1, "0 up to below 1"),
            adversarial_lr=(self.adversarial_lr > 0, "a positive number"),
        )

    @property
    def adversarial_from(self) -> int:
        """Training images after which the discriminator begins."""
        return round(self.adversarial_start * self.fit.images)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiserConfig:
    """Shape and training of the text encoder and the UNet, which are trained together."""

    in_pixels: ClassVar[bool] = False
    classes: ClassVar[bool] = False

    channels: tuple[int, ...] = setting((64, 96), "Channels of each level of the UNet", recipe=True)
    layers_per_block: int = setting(1, "Layers per block of the UNet")
    heads: int = setting(4, "Attention heads of the UNet")
    text_width: int = setting(96, "Width of the text encoder")
    text_layers: int = setting(3, "Layers of the text encoder")
    vocab_size: int = setting(512, "Tokens of the tokenizer")
    max_length: int = setting(24, "Largest number of tokens of a caption")
    caption_dropout: float = setting(0.1, "Share of captions replaced by the empty one, for guidance")
    min_snr_gamma: float = setting(
        5.0, "The epsilon loss is weighted by min(SNR, gamma) / SNR", source="Hang et al. 2023"
    )
    fit: FitConfig = setting(
        FitConfig(
            images=500_000, batch_size=64, lr=1.5e-3, warmup_images=10_000, weight_decay=0.0, ema=0.9993
        ),
        "Length and optimizer",
    )

    def __post_init__(self) -> None:
        require(
            self,
            channels=(all(c % 8 == 0 for c in self.channels), "multiples of 8"),
            caption_dropout=(0 <= self.caption_dropout < 1, "0 up to below 1"),
        )

    @property
    def downscale(self) -> int:
        """The sides of the latents must be multiples of this number."""
        return 1 << (len(self.channels) - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig:
    """Shape and training of a class-conditional DiT (Peebles and Xie 2023) on latents."""

    in_pixels: ClassVar[bool] = False
    classes: ClassVar[bool] = True

    layers: int = setting(6, "Transformer blocks", recipe=True)
    width: int = setting(128, "Width of the tokens", recipe=True)
    heads: int = setting(4, "Attention heads, a divisor of width")
    patch: int = setting(2, "Side of a patch of latents", recipe=True)
    class_dropout: float = setting(
        0.1, "Share of classes replaced by no class, for guidance", source="Peebles and Xie 2023"
    )
    min_snr_gamma: float = setting(
        5.0, "The epsilon loss is weighted by min(SNR, gamma) / SNR", source="Hang et al. 2023"
    )
    fit: FitConfig = setting(
        FitConfig(images=500_000, batch_size=64, lr=1e-3, warmup_images=10_000, weight_decay=0.0, ema=0.9993),
        "Length and optimizer",
    )

    def __post_init__(self) -> None:
        require(
            self,
            layers=(self.layers >= 1, "1 or more"),
            patch=(self.patch >= 1, "1 or more"),
            heads=(self.heads >= 1 and self.width % self.heads == 0, f"a divisor of width, {self.width}"),
            class_dropout=(0 < self.class_dropout < 1, "a number between 0 and 1"),
        )

    @property
    def downscale(self) -> int:
        """The sides of the latents must be multiples of this number."""
        return self.patch


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelNetworkConfig:
    """Shape and training of a U-Net in pixels, with or without classes."""

    in_pixels: ClassVar[bool] = True

    channels: tuple[int, ...] = setting((32, 64, 96), "Channels of each level", recipe=True)
    layers_per_block: int = setting(1, "Layers per block")
    head_width: int = setting(32, "Width of an attention head; the lowest level has attention")
    classes: bool = setting(True, "Take the classes of the pictures, if they have any")
    class_dropout: float = setting(
        0.0, "Share of classes replaced by no class; 0: the teacher has no guidance"
    )
    fit: FitConfig = setting(
        FitConfig(images=500_000, batch_size=64, lr=1e-3, warmup_images=10_000, weight_decay=0.0, ema=0.9993),
        "Length and optimizer",
    )

    def __post_init__(self) -> None:
        lowest = self.channels[-1] if self.channels else 0
        require(
            self,
            channels=(
                len(self.channels) >= 2 and all(c >= 8 and c % 8 == 0 for c in self.channels),
                "two or more multiples of 8",
            ),
            layers_per_block=(self.layers_per_block >= 1, "1 or more"),
            head_width=(
                self.head_width >= 1 and lowest % self.head_width == 0,
                f"a divisor of the last number of channels, {lowest}",
            ),
            class_dropout=(0 <= self.class_dropout < 1, "0 up to below 1"),
        )

    @property
    def downscale(self) -> int:
        """The sides of the pictures must be multiples of this number."""
        return 1 << (len(self.channels) - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelUNetConfig(PixelNetworkConfig):
    """The same, variance-preserving."""

    min_snr_gamma: float = setting(
        5.0, "The epsilon loss is weighted by min(SNR, gamma) / SNR", source="Hang et al. 2023"
    )


_EDM = "Karras et al. 2022, Table 1"


@dataclass(frozen=True, kw_only=True, slots=True)
class EDMConfig(PixelNetworkConfig):
    """The same, with the preconditioning of EDM (Karras et al. 2022)."""

    sigma_data: float = setting(0.5, "Standard deviation of the pixels in [-1, 1]", source=_EDM, recipe=True)
    log_sigma_mean: float = setting(-1.2, "Mean of ln sigma in training", source=_EDM, recipe=True)
    log_sigma_std: float = setting(
        1.2, "Standard deviation of ln sigma in training", source=_EDM, recipe=True
    )
    sigma_min: float = setting(0.002, "Lowest noise level of samplers", source=_EDM, recipe=True)
    sigma_max: float = setting(80.0, "Highest noise level of samplers", source=_EDM, recipe=True)
    rho: float = setting(7.0, "Exponent of the samplers' noise levels", source=_EDM, recipe=True)

    def __post_init__(self) -> None:
        PixelNetworkConfig.__post_init__(self)
        require(
            self,
            sigma_data=(self.sigma_data > 0, "a positive number"),
            log_sigma_std=(self.log_sigma_std > 0, "a positive number"),
            sigma_max=(self.sigma_max > 0, "a positive number"),
            sigma_min=(
                0 < self.sigma_min < self.sigma_max,
                f"a number between 0 and sigma_max, {self.sigma_max:g}",
            ),
            rho=(self.rho > 0, "a positive number"),
        )


NetworkName = Literal["unet_text", "dit", "unet", "edm"]
"""Names of the networks that can be trained; see teacher_training/networks/registry.py."""

NETWORK_GROUPS: dict[NetworkName, str] = {
    "unet_text": "unet",
    "dit": "dit",
    "unet": "pixel_unet",
    "edm": "edm",
}
"""Network -> the group of its settings, which is also the name of the stage that trains it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """Shape and training of a small CLIP: a ViT and a text transformer."""

    image_size: int = setting(64, "Side of the images in pixels; a teacher's CLIP takes the teacher's size")
    patch: int = setting(8, "Side of a ViT patch in pixels, a divisor of image_size")
    width: int = setting(128, "Width of the ViT")
    layers: int = setting(4, "Layers of the ViT")
    text_width: int = setting(96, "Width of the text transformer")
    text_layers: int = setting(3, "Layers of the text transformer")
    context: int = setting(32, "Largest number of tokens of a text")
    embed: int = setting(128, "Dimensions of the joint embedding")
    head: int = setting(32, "Width of an attention head, a divisor of both widths")
    images: int = setting(2_000_000, "Training images, repeats included")
    minutes: float = setting(
        0.0, "Stop after this many minutes, with the learning rate at zero by then; 0: no limit"
    )
    batch_size: int = setting(256, "Pairs of image and caption per step")
    lr: float = setting(1e-3, "Peak learning rate")
    weight_decay: float = setting(0.1, "Weight decay")
    warmup_images: int = setting(50_000, "Images over which the learning rate rises linearly")
    held_out: int = setting(1000, "Images held out for the retrieval score, at most a tenth of all")
    candidates: int = setting(100, "Captions among which the retrieval score chooses")
    seed: int = setting(0, "Seed of everything random")

    def __post_init__(self) -> None:
        require(
            self,
            patch=(self.image_size % self.patch == 0, f"a divisor of image_size, {self.image_size}"),
            head=(
                self.width % self.head == 0 and self.text_width % self.head == 0,
                f"a divisor of width, {self.width}, and text_width, {self.text_width}",
            ),
            images=(self.images >= 1, "1 or more"),
            batch_size=(self.batch_size >= 2, "2 or more"),
            held_out=(self.held_out >= 1, "1 or more"),
            candidates=(self.candidates >= 2, "2 or more"),
            minutes=(self.minutes >= 0, "0 or more"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """Training data of a teacher, and shape and training of each of its components."""

    network: NetworkName = setting(
        "unet_text",
        "unet_text: U-Net of latents and captions; dit: DiT of latents and classes; unet, edm: U-Net of "
        "pixels and classes, variance-preserving or preconditioned as in EDM",
        recipe=True,
    )
    data: str = setting("scenes", "scenes, an image folder, or image-parquet (option --data)", recipe=True)
    column: str | None = setting(
        None, "Column of the captions in the data; null: prompt, caption, text or TEXT"
    )
    size: int = setting(64, "Side of the images in pixels", recipe=True)
    images: int = setting(40_000, "Number of images to use, at most", recipe=True)
    seed: int = setting(1, "Seed of everything random (option --seed)")
    caption_template: str = setting(
        CLASS_TEMPLATE, "Caption of an image whose class name is all that is known"
    )
    pretrained_vae: str = setting(
        "",
        "Autoencoder that is used as it is, in place of a trained one: a folder, a hub id, or taesd (option "
        "--vae); empty: train one",
    )
    init: str = setting(
        "",
        "Teacher whose autoencoder, tokenizer, text encoder and U-Net the training starts from (option "
        "--init); empty: fresh weights",
    )
    preview_minutes: float = setting(
        3.0, "Minutes between sheets of reconstructions and samples in OUT/previews"
    )
    minutes: float = setting(
        0.0,
        "Minutes of all stages together on this machine, in place of the stages' own lengths (option "
        "--minutes); 0: those lengths",
    )
    precision: Literal["fp32", "bf16", "auto"] = setting(
        "fp32",
        "Precision of the network's training: bf16 is autocast, with weights and loss in fp32; auto: bf16 "
        "where the hardware has it. Autoencoder, LatentLPIPS and CLIP train in fp32",
    )
    vae: AutoencoderConfig = setting(AutoencoderConfig(), "The autoencoder")
    unet: DenoiserConfig = setting(DenoiserConfig(), "The text encoder and the UNet")
    dit: DiTConfig = setting(DiTConfig(), "The DiT")
    pixel_unet: PixelUNetConfig = setting(PixelUNetConfig(), "The U-Net of pixels")
    edm: EDMConfig = setting(EDMConfig(), "The U-Net of pixels with EDM's preconditioning")
    lpips: LPIPSTrainConfig = setting(LPIPS_PRESETS["small"], "LatentLPIPS in the latent space of the VAE")
    clip: ClipConfig = setting(ClipConfig(), "CLIP, for evaluations")

    def __post_init__(self) -> None:
        require(
            self,
            preview_minutes=(self.preview_minutes >= 0, "0 or more"),
            minutes=(self.minutes >= 0, "0 or more"),
        )
        check_template(self.caption_template)
        # The shapes of components that are taken from elsewhere are checked when these are opened.
        step, owners = self.denoiser.downscale, NETWORK_GROUPS[self.network]
        if not self.denoiser.in_pixels:
            step, owners = step * 2 ** (len(self.vae.channels) - 1), f"vae and {owners}"
        if self.size % step and not (self.pretrained_vae or self.init):
            raise SettingError(
                f"size is {self.size}; expected a multiple of {step}, the downscaling of {owners} together"
            )

    @property
    def denoiser(self) -> DenoiserConfig | DiTConfig | PixelNetworkConfig:
        """Settings of the network that is trained: the group of `network`."""
        settings: DenoiserConfig | DiTConfig | PixelNetworkConfig
        settings = getattr(self, NETWORK_GROUPS[self.network])
        return settings


def _lpips(images: int) -> LPIPSTrainConfig:
    small = LPIPS_PRESETS["small"]
    return replace(small, trunk=replace(small.trunk, images=images))


_GARMENT_VAE = AutoencoderConfig(
    channels=(16, 32, 64),
    latent_channels=4,
    fit=FitConfig(images=45_000, batch_size=16, lr=2e-3, warmup_images=2_000, ema=0.995),
)


_OWN_WORDS = DenoiserConfig(vocab_size=2048, max_length=48)
"""The default denoiser, for captions of any kind."""

TEACHER_PRESETS = Presets(
    {
        "quick": (
            "Your own pictures at 32 px in a quarter of an hour: whether the data work",
            TeacherConfig(
                size=32,
                minutes=15.0,
                precision="auto",
                vae=AutoencoderConfig(channels=(16, 32, 64), latent_channels=4),
                unet=replace(_OWN_WORDS, text_layers=1),
            ),
        ),
        "evening": (
            "Your own pictures at 64 px in an hour and a quarter",
            TeacherConfig(minutes=75.0, precision="auto", unet=_OWN_WORDS),
        ),
        "night": (
            "Your own pictures at 64 px in nine hours, with a larger U-Net",
            TeacherConfig(minutes=540.0, precision="auto", unet=replace(_OWN_WORDS, channels=(96, 160))),
        ),
        # The shipped miniature was trained with this; its scores are in weights/teacher/meta.json.
        "scenes": (
            "Rendered scenes at 64 px: the shipped miniature teacher",
            TeacherConfig(
                lpips=_lpips(50_000),
                clip=ClipConfig(patch=16, batch_size=128, images=400_000, minutes=7.0, warmup_images=5_000),
            ),
        ),
        # Latents of 4 x 8 x 8 (f = 4). Results: docs/LOG.md
        "fashion": (
            "28 x 28 garments enlarged to 32 px",
            TeacherConfig(
                size=32,
                images=60_000,
                vae=_GARMENT_VAE,
                unet=DenoiserConfig(
                    channels=(64, 96),
                    text_layers=1,
                    max_length=12,
                    fit=FitConfig(images=110_000, batch_size=64, lr=1.5e-3, weight_decay=0.0, ema=0.998),
                ),
                lpips=_lpips(40_000),
                clip=ClipConfig(
                    image_size=32, batch_size=128, images=200_000, minutes=7.0, warmup_images=5_000
                ),
            ),
        ),
        "fashion-edm": (
            "28 x 28 garments in pixels: a class-conditional EDM U-Net",
            TeacherConfig(
                network="edm",
                size=28,
                images=60_000,
                edm=EDMConfig(
                    sigma_data=0.7,
                    fit=FitConfig(
                        images=60_000,
                        batch_size=32,
                        lr=1.5e-3,
                        warmup_images=5_000,
                        weight_decay=0.0,
                        ema=0.998,
                    ),
                ),
            ),
        ),
        "fashion-dit": (
            "28 x 28 garments enlarged to 32 px: a class-conditional DiT",
            TeacherConfig(
                network="dit",
                size=32,
                images=60_000,
                vae=_GARMENT_VAE,
                dit=DiTConfig(
                    fit=FitConfig(images=200_000, batch_size=64, lr=1e-3, weight_decay=0.0, ema=0.998),
                ),
                lpips=_lpips(40_000),
            ),
        ),
    }
)
"""Presets of `d2g teacher train`."""
