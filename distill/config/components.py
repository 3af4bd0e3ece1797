"""Settings of the optimizers, the regression loss, the discriminator and the student.

Sources are a table of the paper's supplement, a section of docs/method.md, or another paper. A default that
no source fixes says so.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from d2g.core.config import check_values, nearest, require, setting
from d2g.core.errors import SettingError
from latent_lpips.config import AUGMENT_FAMILIES, are_augment_families

Optimizer = Literal["adamw", "adamw_fused", "adamw_8bit", "adam", "radam"]
GanLoss = Literal["ns", "hinge", "rpgan"]
Penalty = Literal["single", "full", "approx", "r1r2", "none"]
Reduction = Literal["mean", "sum"]
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
StudentName = Literal["diffusion", "stylegan-t", "gigagan", "gigagan-upsampler"]
"""Kinds of students. `distill/models/NAME_student.py` defines each, with _ in place of -."""
ViewAugmentation = Literal["color", "translation", "cutout"]
RegressionName = Literal[
    "mse", "l1", "pseudo_huber", "lpips", "latent_lpips", "e_latent_lpips", "decoder_features"
]
"""Regression losses, in the order of docs. `distill/losses/regression/NAME.py` defines each."""


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
class OptimConfig:
    """The optimizer of one network and its learning rate schedule. Schedules count images, not steps."""

    name: Optimizer = setting(
        "adamw",
        "Optimizer. The paper says Adam with weight decay 1e-2, read as decoupled (adamw); adam adds the "
        "decay to the gradient; the paper's CIFAR10 model uses radam. On a GPU adamw and adam are fused; "
        "adamw_fused also on a CPU; adamw_8bit keeps its moments in 8 bits, a quarter of the memory",
        source='Table A1; method.md "Schedule and hyperparameters"',
    )
    lr: float = setting(1e-4, "Learning rate after warm-up", source="Table A1", recipe=True)
    betas: tuple[float, float] = setting(
        (0.9, 0.999), "Adam betas; the paper uses (0, 0.99) for SDXL's discriminator", source="Table A1"
    )
    weight_decay: float = setting(1e-2, "Weight decay outside attention layers", source="Table A1")
    attention_weight_decay: float = setting(
        1e-5, "Weight decay of all parameters inside attention layers", source="Table A1"
    )
    warmup_images: int = setting(
        0,
        "Images over which the learning rate rises linearly from 0",
        source="not in the paper; DMD: 500 steps",
    )
    decay_images: int = setting(
        0,
        "Images over which the learning rate falls to final_lr; 0 keeps it constant; -1 is the length of the "
        "run, train.images, which may be longer when the run resumes",
        source="ours",
    )
    decay: Literal["cosine", "linear", "step"] = setting(
        "cosine", "Shape of the decay; step changes the rate at once after decay_images", source="ours"
    )
    final_lr: float = setting(
        0.0,
        "Learning rate after decay_images. Table A1's arrow 1e-4 -> 1e-5 for the discriminator may mean this",
        source='method.md "Schedule and hyperparameters"',
    )
    clip_norm: float = setting(
        0.0, "Largest gradient norm; 0 does not clip", source="not in the paper; DMD: 10"
    )

    def __post_init__(self) -> None:
        check_values(self)
        require(
            self,
            lr=(self.lr > 0, "a positive number"),
            weight_decay=(self.weight_decay >= 0, "0 or more"),
            attention_weight_decay=(self.attention_weight_decay >= 0, "0 or more"),
            clip_norm=(self.clip_norm >= 0, "0 or more"),
            betas=(all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            warmup_images=(self.warmup_images >= 0, "0 or more"),
            decay_images=(self.decay_images >= -1, "0 or more, or -1 for the length of the run"),
            final_lr=(0 <= self.final_lr <= self.lr, f"0 to lr, {self.lr}"),
        )
        if self.final_lr and not self.decay_images:
            raise SettingError(
                f"final_lr is {self.final_lr} but decay_images is 0: the rate is constant; set decay_images"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RegressionConfig:
    """The distance between student and teacher latents: a weighted sum of losses."""

    losses: tuple[tuple[RegressionName, float], ...] = setting(
        (("e_latent_lpips", 1.0),),
        "Losses and weights, as `name:weight,name:weight`. lpips compares decoded images (the paper uses it "
        "for CIFAR10, in pixels); the paper's SD-CFG-3 adds latent_lpips with weight 1; the others "
        "reproduce the comparison of losses or come from later work. [] trains a GAN without regression: on "
        "the latents of pairs (ADM, arXiv 2507.18569), or on real images without pairs (D2O, arXiv "
        "2405.20750)",
        source='Table A1; method.md "Comparison of regression losses"',
        recipe=True,
    )
    augment: str = setting(
        "bgco",
        "Augmentation families of e_latent_lpips: b blitting, g geometry, c color, o cutout, or none; the "
        "paper uses bgo for SD-CFG-3",
        source='Table A1; method.md "E-LatentLPIPS"',
        recipe=True,
    )
    draws: int = setting(
        1,
        "Random transforms per row and step that e_latent_lpips averages over",
        source='method.md "E-LatentLPIPS"',
    )
    huber_c: float = setting(
        0.00054,
        "Pseudo-Huber constant per dimension: c = huber_c sqrt(C h w)",
        source="Song and Dhariwal 2024, section 3.3",
    )
    lpips_net: Literal["vgg", "alex", "squeeze"] = setting("vgg", "Network of lpips", source="DMD, B.1")
    lpips_weights: str = setting(
        "", "Torchvision's weight file of the lpips network; empty takes it from PyTorch's hub folder"
    )
    lpips_resize: int = setting(
        0,
        "Side in pixels to which images are enlarged for lpips; 0 keeps their size",
        source="DMD, B.1: 224 on CIFAR10",
    )
    decoder_blocks: int = setting(
        3,
        "Up blocks of the VAE's decoder that decoder_features compares, after the middle block",
        source="LPL, arXiv 2411.04873, section 4",
    )

    def __post_init__(self) -> None:
        # Names first: `check_values` does not look into pairs.
        names = [name for name, _ in self.losses]
        for name in names:
            if name not in get_args(RegressionName):
                raise SettingError(f"losses has {name!r}{nearest(name, get_args(RegressionName))}")
        positive = all(0 < weight < math.inf for _, weight in self.losses)
        # A repeated name would hide one of its weights.
        require(
            self,
            losses=(
                len(set(names)) == len(names) and positive,
                "names, each once, with positive weights, such as e_latent_lpips:1,latent_lpips:1",
            ),
        )
        # Types and choices, then ranges.
        check_values(self)
        require(
            self,
            augment=(
                are_augment_families(self.augment),
                f"'none' or letters of {AUGMENT_FAMILIES!r}, each once",
            ),
            draws=(self.draws >= 1, "1 or more"),
            huber_c=(self.huber_c > 0, "a positive number"),
            lpips_resize=(self.lpips_resize >= 0, "pixels, or 0"),
            decoder_blocks=(self.decoder_blocks >= 0, "0 or more"),
        )

    @property
    def names(self) -> tuple[RegressionName, ...]:
        """The names of the losses."""
        return tuple(name for name, _ in self.losses)


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
        "Patterns of names of parameters that are not trained, such as *.conv1.*; D2O freezes 85 %. Names "
        "of the network's, in `d2g distill text` of the text encoders'",
        source="D2O, arXiv 2405.20750",
    )
    own_text_encoder: bool = setting(
        False,
        "The student reads with text encoders of its own, frozen here: to go on from a run of `d2g distill "
        "text`, whose student always has them",
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsistencyConfig:
    """Consistency distillation (method.md "Consistency distillation")."""

    levels: int = setting(
        18,
        "Noise levels N between which the teacher takes its steps",
        source="Song et al. 2023, section 6.1: 18 for CIFAR10",
    )

    def __post_init__(self) -> None:
        check_values(self)
        require(self, levels=(self.levels >= 2, "2 or more"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipGuidanceConfig:
    """A loss that draws the student's images toward their texts, by a frozen CLIP."""

    weight: float = setting(
        0.0,
        "Weight of CLIP's loss in the student's loss; 0: none. StyleGAN-T: 0.2, spherical; too much costs "
        "FID and diversity",
        source="StyleGAN-T, section 3.3 and table 4",
    )
    form: Literal["spherical", "contrastive"] = setting(
        "spherical",
        "spherical: arccos(image . text)^2 (StyleGAN-T); contrastive: the cross entropy of the own text "
        "among those of the batch, over all processes (GigaGAN)",
        source='method.md "Guidance by CLIP"',
    )
    model: str = setting(
        "openai/clip-vit-large-patch14",
        "CLIP in transformers' format, with its tokenizer: a folder or a hub id. Use another CLIP "
        "to score the student",
        source="StyleGAN-T, section 3: ViT-L/14",
    )
    crop: int = setting(
        64,
        "Side in pixels of the random crops that it sees of larger images",
        source="StyleGAN-T, section 3.3",
    )

    def __post_init__(self) -> None:
        check_values(self)
        require(
            self,
            weight=(self.weight >= 0, "0 or more"),
            crop=(self.crop >= 1, "1 or more"),
        )
