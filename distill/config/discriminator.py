"""Settings of the discriminator and the GAN loss."""

from dataclasses import dataclass
from typing import Literal

from d2g.core.config import check_values, require, setting
from d2g.core.errors import SettingError
from distill.config.optim import OptimConfig
from distill.config.regression import Reduction

GanLoss = Literal["ns", "hinge", "rpgan"]
Penalty = Literal["single", "full", "approx", "r1r2", "none"]
DiscriminatorName = Literal[
    "unet",
    "transformer",
    "cascade",
    "gigagan",
    "projected",
    "unet+projected",
    "transformer+projected",
    "gigagan+projected",
]
"""Discriminators; two names joined by + are both at once."""
WITHOUT_NOISE = ("gigagan", "projected")
"""Those that do not see the noise."""
ViewAugmentation = Literal["color", "translation", "cutout"]


def require_even_microbatch(rows: int, fraction: float) -> None:
    """Raise SettingError for micro-batches of a number of rows that does not divide into pairs."""
    if fraction > 0 and rows % 2:
        raise SettingError(
            f"gan.mix_fraction is {fraction}, but a micro-batch has {rows} row{'s'[: rows - 1]} per process; "
            "rows are mixed in pairs, each with its neighbor; expected an even number: change "
            "train.batch_size, engine.gradient_accumulation or the number of processes, or set "
            "gan.mix_fraction=0"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DiscriminatorConfig:
    """The discriminator and its losses. Defaults are the paper's, or docs/method.md's choices."""

    discriminator: DiscriminatorName = setting(
        "unet",
        "Network: unet starts as the teacher's U-Net, transformer as its transformer, cascade as a stage of "
        "Stable Cascade; gigagan reads a pyramid of the latents, with new weights; projected has heads on "
        "frozen features of decoded pixels; + takes both, each with its own loss",
        source='method.md "Discriminator architecture"; method.md "Discriminators of transformers"; '
        'method.md "Cascades"; method.md "Discriminators of GigaGAN"; '
        'method.md "Discriminator on frozen features"',
    )
    weight: float = setting(
        0.25,
        "Weight of the GAN loss in the student's loss (lambda_GAN); SDXL: 1",
        source="Table A1",
        recipe=True,
    )
    adaptive_weight: bool = setting(
        False,
        "Scale the GAN loss in each step so that the norm of its gradient is weight times that of the other "
        "losses, with respect to the student's latents; the paper's weight is constant",
        source="Esser et al. 2021, eq. 7",
    )
    loss: GanLoss = setting(
        "ns",
        "GAN loss: ns non-saturating, hinge (Lim and Ye 2017), rpgan relativistic pairs (R3GAN)",
        source='method.md "GAN losses"',
    )
    head_reduction: Reduction = setting(
        "mean",
        "How the losses of the heads are combined",
        source='ours; method.md "Discriminator architecture"',
    )
    d_steps_per_g_step: int = setting(
        1, "Discriminator updates per generator update; DMD2: 5 to 10", source="Table A1"
    )

    z_conditioning: bool = setting(
        True,
        "Condition the discriminator on the noise input",
        source='method.md "Discriminator architecture"',
    )
    multi_scale_input: bool = setting(
        True,
        "Feed resized latents to the lower levels of the discriminator",
        source='method.md "Discriminator architecture"',
    )
    multi_scale_output: bool = setting(
        True,
        "Three heads per decoder level (SD 1.5: 12, SDXL: 9), not one head after the last level",
        source='method.md "Discriminator architecture"',
    )
    output_head: bool = setting(
        False,
        "One more head on the U-Net's own output, as the paper's figure draws it",
        source='ours; method.md "Discriminator architecture"',
    )
    token_heads: int = setting(
        5,
        "Heads of a transformer discriminator, or on each network of feature_networks, after equally spaced "
        "blocks up to the last; StyleGAN-T: 5",
        source='method.md "Discriminators of transformers"',
    )
    token_scales: tuple[int, ...] = setting(
        (1,),
        "Scales of these heads: 1 reads each token, 2 and 4 averages of 2x2 and 4x4 tokens, with readouts of "
        "their own",
        source='ours; method.md "Discriminators of transformers"',
    )
    freeze_backbone: bool = setting(
        False,
        "Train the heads and the discriminator's own convolutions only; the paper trains everything",
        source='method.md "Discriminator architecture"',
    )

    channel_base: int = setting(
        16_384,
        "gigagan: features of h x w have channel_base / max(h, w) channels, at most channel_max",
        source='ours; method.md "Discriminators of GigaGAN"',
    )
    channel_max: int = setting(
        512, "gigagan: largest number of channels", source='ours; method.md "Discriminators of GigaGAN"'
    )

    feature_networks: tuple[str, ...] = setting(
        ("facebook/dino-vits16",),
        "Frozen networks that projected reads: folders or hub ids of a DINO, DINOv2, DINOv3, DeiT or CLIP in "
        "transformers' format, efficientnet-lite0, or squeezenet:FILE and vgg16_bn:FILE with torchvision's "
        "weights of squeezenet1_1 and vgg16_bn",
        source="StyleGAN-T, section 3.2; D2O takes two",
    )
    feature_size: int = setting(
        224,
        "Side in pixels of the images that feature_networks see: random crops of larger images (of latents, "
        "only the crop is decoded), smaller images are enlarged",
        source="StyleGAN-T, section 3.2",
    )
    feature_augment: tuple[ViewAugmentation, ...] = setting(
        ("color", "translation", "cutout"),
        "Differentiable augmentation of these images; D2O: []",
        source="StyleGAN-T, section 3.2; DiffAugment, arXiv 2006.10738",
    )
    feature_heads: Literal["tokens", "modulated"] = setting(
        "tokens",
        "Heads on these features. tokens: StyleGAN-T's, 1-D convolutions over tokens and a projection on the "
        "text; modulated: those of GigaGAN's vision-aided loss, a fixed random projection, 3x3 convolutions "
        "and 1x1 convolutions modulated by the text",
        source='method.md "Discriminator on frozen features"; method.md "Discriminators of GigaGAN"',
    )
    virtual_batch: int = setting(
        8,
        "Consecutive rows that heads of the kind tokens normalize together, each process for itself; with a "
        "divisor of a micro-batch's rows, results do not depend on the number of processes",
        source="StyleGAN-T, section 3.2; the number is ours",
    )
    projected_weight: float = setting(
        1.0,
        "Weight of projected's loss beside the other one's, as in unet+projected",
        source="ours",
    )

    timestep: int = setting(
        0,
        "Timestep input of the discriminator for clean latents",
        source='ours; method.md "Discriminator timestep and noise"',
    )
    timestep_mode: Literal["constant", "random"] = setting(
        "constant",
        "constant: always timestep; random: one per row",
        source='method.md "Discriminator timestep and noise"; APT 3.3',
    )
    timestep_shift: float = setting(
        1.0,
        "Shift s of random timesteps t = T s u / (1 + (s - 1) u) with u ~ U(0, 1); 1 is uniform",
        source="APT 3.3",
    )

    noise_augment: Literal["none", "uniform", "small"] = setting(
        "none",
        "Diffuse real and fake latents before the discriminator: uniform timesteps (the paper's SDXL), or "
        "small: t = max u^2, mostly little noise",
        source="Table A1",
        recipe=True,
    )
    noise_max_timestep: int = setting(
        1000, "Largest timestep of noise_augment, exclusive", source="ours; DMD2: 1000"
    )

    mix_fraction: float = setting(
        0.25,
        "Share of fake rows replaced by mismatched real rows",
        source='ours; method.md "Mix-and-match augmentation"',
        recipe=True,
    )
    mix_x: float = setting(
        1.0,
        "Relative share of mismatched rows with another row's latents",
        source='ours; method.md "Mix-and-match augmentation"',
    )
    mix_c: float = setting(
        1.0,
        "Relative share of mismatched rows with another row's text",
        source='ours; method.md "Mix-and-match augmentation"',
    )
    mix_z: float = setting(
        1.0,
        "Relative share of mismatched rows with another row's noise",
        source='ours; method.md "Mix-and-match augmentation"',
    )

    penalty: Penalty = setting(
        "single",
        "Gradient penalty: single R1 on r1_rows rows, full R1 on the batch, approx (APT's finite "
        "difference), r1r2 (R3GAN, on the batch), none (the paper's SDXL)",
        source='Table A1; method.md "Single-sample R1"',
        recipe=True,
    )
    r1_rows: int = setting(
        1,
        "Rows of the batch that penalty=single uses, one from each equal part; presets: one per GPU",
        source='method.md "Single-sample R1"',
    )
    r1_gamma: float = setting(
        0.01,
        "R1 weight; the loss adds gamma / 2 x r1_interval, StyleGAN's convention; 0 turns R1 off",
        source='Table A1; method.md "Single-sample R1"',
        recipe=True,
    )
    r1_interval: int = setting(16, "Steps between penalties; R3GAN: 1", source="Table A1")
    r1_reduction: Reduction = setting(
        "mean",
        "How a head's logits are reduced over positions before the gradient",
        source='ours; method.md "Single-sample R1"',
    )
    approx_sigma: float = setting(
        0.01,
        "Noise of penalty=approx, which adds approx_weight ||D(x) - D(x + N(0, sigma^2))||^2 every step",
        source="APT 3.3",
    )
    approx_weight: float = setting(100.0, "Weight of penalty=approx", source="APT 3.3")

    real: str = setting(
        "",
        "Folder of captioned images, or of images with classes, used as real rows",
        source='method.md "Limitations and later work"',
    )
    real_column: str | None = setting(
        None,
        "Column of the captions of these images; null: prompt, caption, text or TEXT, and label for a "
        "class-conditional teacher",
    )
    real_fraction: float = setting(
        0.0,
        "Share of the real rows that are such images; the paper: 0; 1 needs no pairs",
        source='method.md "Limitations and later work"',
    )

    optim: OptimConfig = setting(
        OptimConfig(lr=1e-5),
        "Optimizer of the discriminator",
        source='method.md "Schedule and hyperparameters"',
    )

    def __post_init__(self) -> None:
        check_values(self)
        # Choices and ranges of single settings.
        shares = (self.mix_x, self.mix_c, self.mix_z)
        require(
            self,
            mix_fraction=(0 <= self.mix_fraction < 1, "0 up to below 1"),
            r1_gamma=(self.r1_gamma >= 0, "0 or more"),
            r1_interval=(self.r1_interval >= 1, "1 or more"),
            weight=(self.weight >= 0, "0 or more"),
            timestep=(self.timestep >= 0, "0 or more"),
            mix_x=(self.mix_x >= 0, "0 or more"),
            mix_c=(self.mix_c >= 0, "0 or more"),
            mix_z=(self.mix_z >= 0, "0 or more"),
            d_steps_per_g_step=(self.d_steps_per_g_step >= 1, "1 or more"),
            token_heads=(self.token_heads >= 1, "1 or more"),
            token_scales=(
                bool(self.token_scales)
                and len(set(self.token_scales)) == len(self.token_scales)
                and set(self.token_scales) <= {1, 2, 4},
                "some of 1, 2 and 4, each once",
            ),
            feature_networks=(
                bool(self.feature_networks) and len(set(self.feature_networks)) == len(self.feature_networks),
                "one or more names, each once",
            ),
            channel_base=(self.channel_base >= 1, "1 or more"),
            channel_max=(self.channel_max >= 1, "1 or more"),
            feature_size=(self.feature_size >= 1, "1 or more"),
            virtual_batch=(self.virtual_batch >= 1, "1 or more"),
            projected_weight=(self.projected_weight > 0, "a positive number"),
            noise_max_timestep=(self.noise_max_timestep >= 1, "1 or more"),
            r1_rows=(self.r1_rows >= 1, "1 or more"),
            timestep_shift=(self.timestep_shift > 0, "a positive number"),
            approx_sigma=(self.approx_sigma > 0, "a positive number"),
            approx_weight=(self.approx_weight > 0, "a positive number"),
            real_fraction=(0 <= self.real_fraction <= 1, "0 to 1"),
        )
        # Settings that contradict each other.
        if self.mix_fraction > 0 and sum(shares) == 0:
            raise SettingError(
                f"mix_fraction is {self.mix_fraction}, but mix_x, mix_c and mix_z are 0; set one above 0"
            )
        self._check_noise_input()
        self._check_time_input()
        self._check_real_images()

    def _check_time_input(self) -> None:
        """Raise SettingError where the discriminator's time input has two sources."""
        if self.noise_augment != "none" and (self.timestep or self.timestep_mode != "constant"):
            raise SettingError(
                f"noise_augment is {self.noise_augment!r}, which gives the discriminator the sampled noise "
                "level; set timestep=0 and timestep_mode=constant"
            )
        if self.timestep and self.timestep_mode == "random":
            raise SettingError(
                f"timestep is {self.timestep}, but timestep_mode=random samples timesteps; set timestep=0"
            )

    def _check_real_images(self) -> None:
        """Raise SettingError for real images that the loss cannot take, or without a share."""
        if self.real and self.loss == "rpgan":
            raise SettingError(
                "real is set, but loss=rpgan compares each real row with the fake of the same noise "
                "and text, which such images don't have; set loss=ns"
            )
        # Real images are used only with a share. A preset may leave the folder to the user.
        if bool(self.real) != bool(self.real_fraction) and self.real_fraction != 1:
            raise SettingError(
                f"real is {self.real!r} and real_fraction {self.real_fraction}; expected both, or neither"
            )

    def _check_noise_input(self) -> None:
        """Raise SettingError where the discriminator's noise input, or its absence, contradicts its rows."""
        projected = "projected" in self.parts
        blind = [part for part in self.parts if part in WITHOUT_NOISE]
        if self.mix_fraction > 0 and self.mix_z > 0 and (blind or not self.z_conditioning):
            reason = f"{blind[-1]} does not see the noise" if blind else "z_conditioning is false"
            raise SettingError(
                f"mix_z is {self.mix_z:g}, but {reason}: rows with another row's noise would "
                "be real rows, counted as fake; set mix_z=0"
            )

        if projected and self.noise_augment != "none":
            raise SettingError(
                f"noise_augment is {self.noise_augment!r}, but discriminator={self.discriminator} decodes "
                "its inputs, and noisy latents decode to no image; set noise_augment=none"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The discriminators that are trained: one, or two at once."""
        return tuple(self.discriminator.split("+"))

    @property
    def sees_noise(self) -> bool:
        """Whether a discriminator is conditioned on the noise."""
        return self.z_conditioning and not set(self.parts) <= set(WITHOUT_NOISE)

    @property
    def part_weights(self) -> dict[str, float]:
        """Weights of the parts' losses by the prefix of their heads; a part that is missing weighs 1."""
        return {"projected": self.projected_weight}

    @property
    def active_penalty(self) -> Penalty:
        """The gradient penalty that has an effect: "none" when gamma is 0."""
        return "none" if self.penalty != "approx" and self.r1_gamma == 0 else self.penalty

    @property
    def penalty_interval(self) -> int:
        """Steps between penalties: `r1_interval`, or 1 for the approximation, which needs no second order."""
        return 1 if self.penalty == "approx" else self.r1_interval
