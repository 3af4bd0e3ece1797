"""Settings of the student: its kind, sizes of a generator with styles, additions to a teacher's network."""

from dataclasses import dataclass
from typing import Literal

from d2g.core.config import check_values, require, setting
from d2g.core.errors import SettingError

StudentName = Literal["diffusion", "stylegan-t", "gigagan", "gigagan-upsampler"]
"""Kinds of students. `distill/models/NAME_student.py` defines each, with _ in place of -."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorConfig:
    """Sizes of a generator with styles, for students that are not the teacher's network."""

    channel_base: int = setting(
        32_768,
        "A block of h x w has channel_base / max(h, w) channels, at most channel_max",
        source="StyleGAN-T, table 4: 32768 light, 65536 full",
    )
    channel_max: int = setting(
        512, "Largest number of channels", source="StyleGAN-T, table 4: 512 light, 2048 full"
    )
    residual_blocks: int = setting(
        3, "Residual convolutions of a block", source="StyleGAN-T, table 4: 3 light, 4 full"
    )
    z_dim: int = setting(64, "Numbers of the latent code z", source="StyleGAN-T, table 4")
    w_dim: int = setting(
        64,
        "Width of the mapping network and its output; the papers' counts of parameters fix it",
        source='ours; method.md "GANs with styles as students"',
    )
    mapping_layers: int = setting(2, "Layers of the mapping network", source="StyleGAN-XL, section 3.1")
    residual: bool = setting(
        True,
        "Convolutions of a block are residual, with GroupNorm and layer scale; false: plain ones",
        source="StyleGAN-T, section 3.1",
    )
    second_order: bool = setting(
        True,
        "Styles are s1 * s2 + s3; false: affine, as in StyleGAN2",
        source="StyleGAN-T, eq. 1",
    )
    text_bypass: bool = setting(
        True,
        "The text bypasses the mapping network, w = [f(z), c]; false: w = f([z, c])",
        source="StyleGAN-T, section 3.1",
    )
    resolution: int = setting(
        0,
        "Height of the latents that the generator draws; they are enlarged to the teacher's, and real "
        "latents are reduced as much. 0: the teacher's. For progressive growing, give the run before "
        "with --init",
        source="StyleGAN-T, appendix A",
    )
    kernels: int = setting(
        4,
        "Kernels of each convolution, from whose bank the style selects (eq. 2)",
        source="GigaGAN, section 3.1; the number is ours",
    )
    attention_sizes: tuple[int, ...] = setting(
        (8, 16, 32),
        "Larger sides of the blocks that have attention",
        source="GigaGAN, section 3.2; the sizes are ours",
    )
    text_layers: int = setting(
        2,
        "Learned layers on the text encoder's tokens (T)",
        source="GigaGAN, section 3.3; the number is ours",
    )
    factor: int = setting(
        8, "How much the upsampler enlarges: a power of two", source="GigaGAN, section 3.4: 64 to 512 px"
    )

    def __post_init__(self) -> None:
        check_values(self)
        counts = ("channel_base", "channel_max", "z_dim", "w_dim", "mapping_layers", "kernels", "factor")
        require(
            self,
            **{name: (getattr(self, name) >= 1, "1 or more") for name in counts},
            residual_blocks=(self.residual_blocks >= 1, "1 or more"),
            resolution=(self.resolution >= 0, "a height in latents, or 0"),
            text_layers=(self.text_layers >= 0, "0 or more"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """What the student is, and how it differs from the teacher's network."""

    kind: StudentName = setting(
        "diffusion",
        "diffusion: the teacher's network; stylegan-t, gigagan: generators with styles, trained in "
        "`d2g distill gan` without regression; gigagan-upsampler: enlarges latents of a student",
        source='method.md "GANs with styles as students"',
    )
    generator: GeneratorConfig = setting(GeneratorConfig(), "Sizes of stylegan-t and gigagan")
    lora_rank: int = setting(
        0,
        "Rank of the adapters that are trained alone; 0 trains every weight, as the paper does. Adapters of "
        "the run `init` are trained further if rank and lora_alpha are the same, else merged",
        source="paper",
    )
    lora_alpha: float = setting(
        0.0, "Adapters are scaled by lora_alpha / lora_rank; 0 takes lora_alpha = lora_rank", source="ours"
    )
    guidance_conditioning: bool = setting(
        False,
        "Condition the student on the guidance scale of the pairs; the paper does not",
        source='method.md "Limitations and later work"',
    )
    dropout: float = setting(
        0.0, "Dropout probability in the student; the paper's CIFAR10 model: 0.1", source="Table A1"
    )
    freeze: tuple[str, ...] = setting(
        (),
        "Name patterns of parameters that are not trained, such as *.conv1.*: of the network, or in `d2g "
        "distill text` of the text encoders; D2O freezes 85 %",
        source="D2O, arXiv 2405.20750",
    )
    own_text_encoder: bool = setting(
        False,
        "Give the student its own text encoders, frozen here, to continue from a run of `d2g distill text`; "
        "students of that command always have them",
        source="StyleGAN-T, section 3.3 and table 5",
    )

    def __post_init__(self) -> None:
        check_values(self)
        require(
            self,
            lora_rank=(self.lora_rank >= 0, "0 or more"),
            lora_alpha=(self.lora_alpha >= 0, "0 or more"),
            dropout=(0 <= self.dropout < 1, "0 up to below 1"),
        )
        self._check_kind()
        if self.freeze and self.lora_rank:
            raise SettingError(
                f"freeze is {self.freeze!r}, but with lora_rank={self.lora_rank} the adapters alone are "
                "trained; set freeze=[] or lora_rank=0"
            )
        if self.lora_alpha and not self.lora_rank:
            raise SettingError(f"lora_alpha is {self.lora_alpha} but lora_rank is 0; set lora_rank")

    def _check_kind(self) -> None:
        """Raise SettingError for what is added to a teacher's network alone."""
        if self.is_diffusion:
            return
        for name in ("lora_rank", "dropout", "guidance_conditioning"):
            if value := getattr(self, name):
                raise SettingError(
                    f"{name} is {value}, but kind={self.kind} is no network of the teacher to add it to; "
                    f"leave {name} out"
                )

    @property
    def is_diffusion(self) -> bool:
        """Whether the student is the teacher's network; others are networks of their own."""
        return self.kind == "diffusion"

    @property
    def alpha(self) -> float:
        """The adapters' alpha."""
        return self.lora_alpha or self.lora_rank
