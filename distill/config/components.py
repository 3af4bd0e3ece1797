"""What is learnt and by which loss: settings of optimisers, regression, discriminator and student.

Sources: "A1" is Table A1 of the supplement, "4.2" and the like are sections of method.md, others are named. A
default that no source fixes says so.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from d2g.core.config import nearest
from d2g.core.errors import SettingError
from latent_lpips.config import AUGMENT_FAMILIES, are_augment_families

Optimizer = Literal["adamw", "adamw_fused", "radam"]
GanLoss = Literal["ns", "hinge", "rpgan"]
Penalty = Literal["single", "full", "approx", "r1r2", "none"]
Reduction = Literal["mean", "sum"]
RegressionKind = Literal["e_latent_lpips", "latent_lpips", "mse", "pseudo_huber", "lpips"]


def require(ok: bool, name: str, got: object, expected: str) -> None:
    """Raise the SettingError of a value that is not `ok`."""
    if not ok:
        raise SettingError(f"{name} is {got!r}; expected {expected}")


def check_values(config: Any, prefix: str) -> None:
    """Raise SettingError for a Literal field whose value is not one of its names, or a float that is no
    finite number."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise SettingError(f"{prefix}.{name} is {value!r}{nearest(str(value), get_args(hint))}")
        for part in value if isinstance(value, tuple) else (value,):
            finite = not isinstance(part, float) or math.isfinite(part)
            require(finite, f"{prefix}.{name}", value, "finite numbers")


def require_even_microbatch(rows: int, fraction: float) -> None:
    """Raise SettingError for micro-batches of a number of rows that does not divide into pairs."""
    if fraction > 0 and rows % 2:
        raise SettingError(
            f"gan.mix_fraction is {fraction}, but a micro-batch has {rows} row{'s'[: rows - 1]} per process; "
            "rows are mixed in pairs, each with its neighbour; expected an even number: change "
            "train.batch_size, engine.gradient_accumulation or the number of processes, or set gan.mix_fraction=0"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimiser of one network, and its learning rate over the images seen."""

    name: Optimizer = "adamw"  # "Adam" with weight decay 1e-2 (A1) is read as decoupled (5); CIFAR10: RAdam
    lr: float = 1e-4  # A1
    betas: tuple[float, float] = (0.9, 0.999)  # A1; SDXL's discriminator (0, 0.99)
    weight_decay: float = 1e-2  # A1
    attention_weight_decay: float = 1e-5  # A1: of everything inside attention layers
    warmup_images: int = 0  # linear; not in the paper, DMD: 500 steps
    decay_images: int = 0  # the rate falls to `final_lr` over so many images; 0: constant
    decay: Literal["cosine", "linear", "step"] = "cosine"  # step: falls at once when `decay_images` are seen
    final_lr: float = 0.0  # A1's arrow of D's rate, 1e-4 -> 1e-5, may mean such a fall (5)
    clip_norm: float = 0.0  # 0: off, as in the paper; DMD: 10

    def __post_init__(self) -> None:
        check_values(self, "optim")
        if self.lr <= 0 or min(self.weight_decay, self.attention_weight_decay, self.clip_norm) < 0:
            raise SettingError(f"optim: lr {self.lr} must be positive; decays and clip_norm not negative")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        for name in ("warmup_images", "decay_images"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "0 or more")
        require(0 <= self.final_lr <= self.lr, "optim.final_lr", self.final_lr, f"0 to lr, {self.lr}")
        if self.final_lr and not self.decay_images:
            raise SettingError(
                f"optim.final_lr is {self.final_lr} but decay_images 0, so the rate stays; set decay_images"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RegressionConfig:
    """The distance between student and teacher latents: one kind, and what may stand beside it."""

    weight: float = 1.0  # A1
    kind: RegressionKind = "e_latent_lpips"  # the others: the comparison of 8; CIFAR10 (A1): lpips, in pixels
    augment: str = "bgco"  # of e_latent_lpips: families of 3.3; A1 "bgc+cutout"; SD-CFG-3 "bgo"
    draws: int = 1  # of e_latent_lpips: transforms per sample and step; the paper draws one (3.3)
    latent_lpips_weight: float = (
        0.0  # weight of un-augmented LatentLPIPS beside it; A1: SD-CFG-3's ensemble, 1
    )
    l1_weight: float = (
        0.0  # weight of mean absolute error on un-augmented latents; authors' package 1, paper off
    )
    huber_c: float = 0.00054  # of pseudo_huber: c = huber_c sqrt(C h w) (Song and Dhariwal 2024, eq. 7 ff.)
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"  # of lpips; DMD B.1: VGG
    lpips_weights: str = ""  # of lpips: torchvision's file of that network; "": PyTorch's hub folder
    lpips_resize: int = (
        0  # of lpips: side the images are enlarged to; 0: as they are; DMD B.1 on CIFAR10: 224
    )

    def __post_init__(self) -> None:
        check_values(self, "regression")
        known = f"'none' or letters of {AUGMENT_FAMILIES!r}, each once"
        require(are_augment_families(self.augment), "regression.augment", self.augment, known)
        if min(self.weight, self.latent_lpips_weight, self.l1_weight) < 0 or self.draws < 1:
            raise SettingError("regression: weights must not be negative and draws at least 1")
        require(self.huber_c > 0, "regression.huber_c", self.huber_c, "a positive number")
        require(self.lpips_resize >= 0, "regression.lpips_resize", self.lpips_resize, "pixels, or 0")
        if self.kind == "latent_lpips" and self.latent_lpips_weight:
            raise SettingError(
                "regression.latent_lpips_weight adds what regression.kind is already; set weight instead"
            )

    @property
    def needs_latent_lpips(self) -> bool:
        """Whether the weights of LatentLPIPS are read."""
        return self.kind in ("e_latent_lpips", "latent_lpips") or self.latent_lpips_weight > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DiscriminatorConfig:
    """Discriminator and its loss. Defaults are the paper's, or method.md's where no source fixes them."""

    weight: float = 0.25  # lambda_GAN of the student's loss; A1: SD-CFG-3 and -8 0.25, SDXL 1
    loss: GanLoss = "ns"  # 4.1; hinge: Lim and Ye 2017; rpgan: R3GAN's relativistic pairs
    head_reduction: Reduction = "mean"  # of the heads' losses; no source (4.2)
    d_steps_per_g_step: int = 1  # of D for one of G (A1); DMD2: 5 to 10

    z_conditioning: bool = True  # 4.2
    multi_scale_input: bool = True  # 4.2
    multi_scale_output: bool = True  # 4.2: 12 heads for SD 1.5, 9 for SDXL, against the last one alone
    freeze_backbone: bool = False  # train the heads and D's own convolutions only; the paper trains all (4.2)

    timestep: int = 0  # D's time input for clean latents; no source (4.2)
    timestep_mode: Literal["constant", "random"] = "constant"  # random, per sample: APT 3.3 (4.2)
    timestep_shift: float = 1.0  # of random: t = T s u / (1 + (s - 1) u), u ~ U(0, 1); APT 3.3, 1: uniform

    noise_augment: Literal["none", "uniform", "small"] = "none"  # real and fake diffused first; A1: SDXL's
    noise_max_timestep: int = 1000  # exclusive; no source, DMD2 1000. small: t = max u^2, mostly little noise

    mix_fraction: float = 0.25  # of fake rows replaced by mismatched real triples; no source (4.4)
    mix_x: float = 1.0  # relative shares of rows with another row's target, ...
    mix_c: float = 1.0  # ... text, ...
    mix_z: float = 1.0  # ... or noise (4.4); no source for their proportions

    penalty: Penalty = (
        "single"  # 4.3; A1: SDXL none. approx: APT; r1r2: R3GAN, whole batch; full: whole batch
    )
    r1_rows: int = 1  # of single: one from each of so many equal parts of the batch (4.3; presets: one a GPU)
    r1_gamma: float = 0.01  # A1; counted as gamma / 2 x interval, StyleGAN's convention (4.3). 0: no R1
    r1_interval: int = 16  # A1; R3GAN: 1
    r1_reduction: Reduction = "mean"  # of a head's logits over positions before the gradient; no source (4.3)
    approx_sigma: float = 0.01  # of approx, every step: weight ||D(x) - D(x + N(0, sigma^2))||^2, APT 3.3
    approx_weight: float = 100.0  # APT 3.3

    real: str = ""  # folder of captioned images that count as real beside the pairs (limitation 1 of 9: F)
    real_fraction: float = 0.0  # of the real rows that are such images; the paper 0

    optim: OptimConfig = OptimConfig(lr=1e-5)  # 5

    def __post_init__(self) -> None:
        check_values(self, "gan")
        require(0 <= self.mix_fraction < 1, "gan.mix_fraction", self.mix_fraction, "0 up to below 1")
        if self.r1_gamma < 0 or self.r1_interval < 1 or self.weight < 0 or self.timestep < 0:
            raise SettingError(
                "gan: r1_gamma, weight and timestep must not be negative, r1_interval at least 1"
            )
        shares = (self.mix_x, self.mix_c, self.mix_z)
        if min(shares) < 0 or (self.mix_fraction > 0 and sum(shares) == 0):
            raise SettingError(f"gan: mix_x, mix_c, mix_z are {shares}; expected 0 or more, one above 0")
        for name in ("d_steps_per_g_step", "noise_max_timestep", "r1_rows"):
            require(getattr(self, name) >= 1, f"gan.{name}", getattr(self, name), "1 or more")
        for name in ("timestep_shift", "approx_sigma", "approx_weight"):
            require(getattr(self, name) > 0, f"gan.{name}", getattr(self, name), "a positive number")
        if self.noise_augment != "none" and (self.timestep or self.timestep_mode != "constant"):
            raise SettingError(
                "gan.noise_augment tells D the drawn noise level; set timestep=0 and timestep_mode=constant"
            )
        if self.timestep and self.timestep_mode == "random":
            raise SettingError(f"gan.timestep is {self.timestep}, but timestep_mode random draws it; set 0")
        require(0 <= self.real_fraction < 1, "gan.real_fraction", self.real_fraction, "0 up to below 1")
        if self.real and self.loss == "rpgan":
            raise SettingError("gan.real rows have no fake of their own to be compared with; set gan.loss=ns")
        if bool(self.real) != bool(self.real_fraction):
            raise SettingError(
                f"gan.real is {self.real!r} and real_fraction {self.real_fraction}; expected both, or neither"
            )

    @property
    def active_penalty(self) -> Penalty:
        """The gradient penalty that acts: none where gamma is 0."""
        return "none" if self.penalty != "approx" and self.r1_gamma == 0 else self.penalty

    @property
    def penalty_interval(self) -> int:
        """Steps between penalties: `r1_interval`, or 1 for the approximation, which needs no second order."""
        return 1 if self.penalty == "approx" else self.r1_interval


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """What the student is beside the teacher's network."""

    lora_rank: int = 0  # train low-rank adapters of so many columns only; 0: every weight, as the paper
    lora_alpha: float = 0.0  # of LoRA: adapters are scaled by alpha / rank; 0: alpha = rank
    guidance_conditioning: bool = False  # told the pairs' guidance scale (limitation 1); the paper: no
    dropout: float = 0.0  # A1: CIFAR10 0.1

    def __post_init__(self) -> None:
        check_values(self, "student")
        require(self.lora_rank >= 0, "student.lora_rank", self.lora_rank, "0 or more")
        require(self.lora_alpha >= 0, "student.lora_alpha", self.lora_alpha, "0 or more")
        require(0 <= self.dropout < 1, "student.dropout", self.dropout, "0 up to below 1")
        if self.lora_alpha and not self.lora_rank:
            raise SettingError(f"student.lora_alpha is {self.lora_alpha} but lora_rank 0; set lora_rank")

    @property
    def alpha(self) -> float:
        """The adapters' alpha."""
        return self.lora_alpha or self.lora_rank
