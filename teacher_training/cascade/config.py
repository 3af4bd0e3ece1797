"""Settings of `d2g teacher cascade` and their presets."""

from dataclasses import dataclass, replace

from d2g.core.config import Presets, require, setting
from d2g.core.errors import SettingError
from d2g.data.captions import CLASS_TEMPLATE, check_template
from teacher_training.config import FitConfig

CASCADE_PARTS = ("vqgan", "stage_b", "stage_c")


@dataclass(frozen=True, kw_only=True, slots=True)
class VQGANConfig:
    """Shape and training of stage A, a VQGAN with 4 pixels per latent."""

    channels: int = setting(64, "Channels at the size of the latents", recipe=True)
    bottleneck_blocks: int = setting(2, "Residual blocks of the decoder at the size of the latents")
    latent_channels: int = setting(4, "Channels of the latents", recipe=True)
    codes: int = setting(256, "Entries of the codebook")
    quantization_dropout: float = setting(
        0.1, "Share of images that are decoded without quantization", source="Wuerstchen, E.1"
    )
    codebook_weight: float = setting(0.1, "Weight of the errors of quantization")
    square_weight: float = setting(10.0, "Weight of the squared pixel error, beside the absolute one")
    edge_weight: float = setting(0.5, "Weight of the error of pixel differences, which keeps edges sharp")
    fit: FitConfig = setting(
        FitConfig(images=24_000, batch_size=16, lr=2e-3, warmup_images=1_000, weight_decay=0.0, ema=0.995),
        "Length and optimizer",
    )

    def __post_init__(self) -> None:
        require(
            self,
            channels=(self.channels >= 2 and self.channels % 2 == 0, "a multiple of 2"),
            codes=(self.codes >= 2, "2 or more"),
            quantization_dropout=(0 <= self.quantization_dropout <= 1, "0 to 1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressorConfig:
    """Shape of the semantic compressor; it trains with stage B. Each level halves the image."""

    channels: tuple[int, ...] = setting((16, 32, 64, 96), "Channels of each level", recipe=True)
    layers_per_block: int = setting(1, "Blocks of each level")
    latent_channels: int = setting(16, "Channels of the latents of stage C", recipe=True)

    def __post_init__(self) -> None:
        multiples = len(self.channels) >= 2 and all(c % 8 == 0 for c in self.channels)
        require(self, channels=(multiples, "two or more multiples of 8"))


@dataclass(frozen=True, kw_only=True, slots=True)
class StageBConfig:
    """Shape and training of stage B, from the compressor's latents and text to latents of the VQGAN."""

    channels: tuple[int, ...] = setting((64, 128), "Channels of each level", recipe=True)
    blocks: tuple[int, ...] = setting((2, 2), "Blocks of each level, on the way down and up")
    head_width: int = setting(32, "Channels of an attention head; the first level has no attention")
    condition_width: int = setting(64, "Channels of text and of stage C's latents inside the network")
    caption_dropout: float = setting(
        0.05, "Share of rows without text and stage C's latents, for guidance", source="Wuerstchen, 3.2"
    )
    condition_noise: float = setting(
        0.3,
        "Largest standard deviation of noise on stage C's latents, which half of the rows get",
        source="Wuerstchen, 3.1",
    )
    fit: FitConfig = setting(
        FitConfig(images=90_000, batch_size=64, lr=1.5e-3, warmup_images=4_000, weight_decay=0.0, ema=0.998),
        "Length and optimizer",
    )

    def __post_init__(self) -> None:
        fits = len(self.channels) == len(self.blocks) and all(
            c % self.head_width == 0 for c in self.channels[1:]
        )
        require(
            self,
            channels=(fits, "as many numbers as blocks, multiples of head_width from the second on"),
            caption_dropout=(0 <= self.caption_dropout < 1, "0 up to below 1"),
            condition_noise=(self.condition_noise >= 0, "0 or more"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCConfig:
    """Shape and training of stage C, from text to the compressor's latents."""

    width: int = setting(128, "Channels", recipe=True)
    depth: int = setting(6, "Blocks", recipe=True)
    heads: int = setting(4, "Attention heads")
    caption_dropout: float = setting(
        0.05, "Share of rows without text, for guidance", source="Wuerstchen, 3.2"
    )
    fit: FitConfig = setting(
        FitConfig(images=300_000, batch_size=64, lr=1.5e-3, warmup_images=8_000, weight_decay=0.0, ema=0.999),
        "Length and optimizer",
    )

    def __post_init__(self) -> None:
        require(
            self,
            width=(self.width % self.heads == 0, f"a multiple of heads, {self.heads}"),
            caption_dropout=(0 <= self.caption_dropout < 1, "0 up to below 1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CascadeConfig:
    """Training data of a cascade, and shape and training of each of its stages."""

    data: str = setting("scenes", "scenes, an image folder, or image-parquet (option --data)", recipe=True)
    column: str | None = setting(
        None, "Column of the captions in the data; null: prompt, caption, text or TEXT"
    )
    size: int = setting(64, "Side of the images in pixels", recipe=True)
    images: int = setting(12_000, "Number of images to use, at most", recipe=True)
    seed: int = setting(1, "Seed of everything random (option --seed)")
    caption_template: str = setting(
        CLASS_TEMPLATE, "Caption of an image whose class name is all that is known"
    )
    text: str = setting(
        "miniature", "Teacher whose tokenizer and text encoder, a CLIP, both stages take, frozen"
    )
    vqgan: VQGANConfig = setting(VQGANConfig(), "Stage A")
    compressor: CompressorConfig = setting(CompressorConfig(), "The semantic compressor")
    stage_b: StageBConfig = setting(StageBConfig(), "Stage B")
    stage_c: StageCConfig = setting(StageCConfig(), "Stage C")

    def __post_init__(self) -> None:
        check_template(self.caption_template)
        # Stage B's patches hold 2 x 2 latents of 4 pixels, and each further level halves them.
        step = max(self.downscale, 4 * 2 ** len(self.stage_b.channels))
        if self.size % step:
            raise SettingError(
                f"size is {self.size}; expected a multiple of {step}, the downscaling of the stages"
            )

    @property
    def downscale(self) -> int:
        """Pixels per latent of stage C along a side."""
        return int(2 ** len(self.compressor.channels))


def _short(fit: FitConfig, images: int) -> FitConfig:
    return replace(fit, images=images)


_SCENES = CascadeConfig()
CASCADE_PRESETS = Presets(
    {
        # Results: docs/LOG.md
        "scenes": ("Rendered scenes at 64 px, under an hour on one CPU core", _SCENES),
        "quick": (
            "A smoke run of a minute; its pictures mean little",
            replace(
                _SCENES,
                images=512,
                vqgan=replace(_SCENES.vqgan, fit=_short(_SCENES.vqgan.fit, 1_024)),
                stage_b=replace(_SCENES.stage_b, fit=_short(_SCENES.stage_b.fit, 2_048)),
                stage_c=replace(_SCENES.stage_c, fit=_short(_SCENES.stage_c.fit, 2_048)),
            ),
        ),
    }
)
"""Presets of `d2g teacher cascade`."""
