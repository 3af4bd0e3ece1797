"""Presets of `d2g distill`: the paper's recipes, its ablations and comparisons, and small sizes to try."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from d2g.core.config import Presets, pick
from d2g.core.errors import SettingError
from distill.config.clip_guidance import ClipGuidanceConfig
from distill.config.discriminator import DiscriminatorConfig
from distill.config.optim import OptimConfig
from distill.config.regression import RegressionConfig, RegressionName
from distill.config.run import FROM_TEACHER, DistillConfig, EngineConfig, TrainConfig
from distill.config.student import GeneratorConfig, StudentConfig, StudentName

TeacherModel = Literal[
    "sd15",
    "sdxl",
    "edm-cifar10",
    "miniature",
    "dit-xl-256",
    "pixart-sigma-512",
    "sd35-medium",
    "flux-dev",
    "sana-600m",
    "wuerstchen",
    "wuerstchen-b",
]
"""Teachers that presets are made for."""


@dataclass(frozen=True, eq=False)
class Recipe(Mapping[str, DistillConfig]):
    """A preset: a config for each stage that it has, of `ode`, `gan`, `text` and `cd`; equal if its configs
    are."""

    about: str
    """One line for `--help`."""
    model: TeacherModel
    """The teacher that the preset is made for; memory is predicted for it when no teacher is given."""
    stages: Mapping[str, DistillConfig]

    def __getitem__(self, stage: str) -> DistillConfig:
        return self.stages[stage]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)


def _train(batch: int, iterations: int, ema_start: int = 4_000) -> TrainConfig:
    return TrainConfig(batch_size=batch, images=iterations * batch, ema_start_images=ema_start * batch)


def _recompute(gpus: int) -> EngineConfig:
    """With activation checkpointing: without it these do not fit 80 GB (tests/distill/test_presets.py)."""
    return EngineConfig(gpus=gpus, activation_checkpointing=True)


def _falling(images: int, betas: tuple[float, float] = (0.9, 0.999)) -> OptimConfig:
    """D's learning rate as Table A1 prints it, "1e-4 -> 1e-5", read as a fall over stage 2. For a constant
    rate set gan.optim.lr=1e-5, gan.optim.final_lr=0 and gan.optim.decay_images=0.
    """
    return OptimConfig(lr=1e-4, final_lr=1e-5, decay="linear", decay_images=images, betas=betas)


_CFG3 = RegressionConfig(augment="bgo", losses=(("e_latent_lpips", 1.0), ("latent_lpips", 1.0)))
_GAN = DistillConfig(stage="gan", optim=OptimConfig(lr=1e-5))

TABLE_A1: dict[str, Recipe] = {
    "cifar10": Recipe(
        "The paper's CIFAR10 model: pixels of EDM's class-conditional teacher, regression only",
        "edm-cifar10",
        {
            "ode": DistillConfig(
                student=StudentConfig(dropout=0.1),
                optim=OptimConfig(name="radam", lr=4e-4, weight_decay=0.0, attention_weight_decay=0.0),
                regression=RegressionConfig(losses=(("lpips", 1.0),), lpips_resize=224),
                train=_train(512, 150_000, ema_start=20_000),
                engine=EngineConfig(gpus=8),
            ),
        },
    ),
    "sd15-cfg3": Recipe(
        "The paper's SD 1.5 at guidance 3, on 16 GPUs",
        "sd15",
        {
            "ode": DistillConfig(regression=_CFG3, train=_train(256, 150_000), engine=EngineConfig(gpus=16)),
            "gan": replace(
                _GAN,
                regression=_CFG3,
                gan=DiscriminatorConfig(r1_rows=16, optim=_falling(10_000 * 256)),
                train=_train(256, 10_000),
                engine=_recompute(16),
            ),
        },
    ),
    "sd15-cfg8": Recipe(
        "The paper's SD 1.5 at guidance 8, on 64 GPUs",
        "sd15",
        {
            "ode": DistillConfig(train=_train(2048, 50_000), engine=EngineConfig(gpus=64)),
            "gan": replace(
                _GAN,
                gan=DiscriminatorConfig(r1_rows=64, optim=_falling(10_000 * 1024)),
                train=_train(1024, 10_000),
                engine=_recompute(64),
            ),
        },
    ),
    "sdxl-cfg7": Recipe(
        "The paper's SDXL at guidance 7, on 128 GPUs",
        "sdxl",
        {
            "ode": DistillConfig(train=_train(1024, 20_000), engine=_recompute(128)),
            "gan": replace(
                _GAN,
                gan=DiscriminatorConfig(
                    weight=1.0,
                    penalty="none",
                    noise_augment="uniform",
                    optim=_falling(30_000 * 512, (0.0, 0.99)),
                ),
                train=_train(512, 30_000),
                engine=replace(_recompute(128), parallel="fsdp"),
            ),
        },
    ),
}
"""One recipe per column of the supplement's Table A1."""


_CIFAR10_GAN = replace(
    _GAN,
    optim=OptimConfig(name="radam", lr=4e-5, weight_decay=0.0, attention_weight_decay=0.0),
    regression=TABLE_A1["cifar10"]["ode"].regression,
    gan=DiscriminatorConfig(r1_rows=8, optim=_falling(10_000 * 512)),
    train=_train(512, 10_000),
    engine=EngineConfig(gpus=8),
)
"""The paper's stage 2 at the size of its CIFAR10 model."""

_CIFAR10_CD = replace(
    TABLE_A1["cifar10"]["ode"], stage="cd", student=StudentConfig(), train=_train(512, 150_000, ema_start=0)
)
"""Consistency distillation as supplement A.2 compares with it: its batch and length; rate, optimizer and
distance of Song et al. 2023, table 3, are those of the paper's own CIFAR10 model.
"""

_D2O_OPTIM = OptimConfig(name="adam", weight_decay=0.0, attention_weight_decay=0.0)
_D2O = DistillConfig(
    stage="gan",
    init=FROM_TEACHER,
    student=StudentConfig(freeze=("*.resnets.*.conv1.*", "*.resnets.*.conv2.*", "*samplers.*")),
    optim=_D2O_OPTIM,
    regression=RegressionConfig(losses=()),
    gan=DiscriminatorConfig(
        discriminator="projected",
        feature_networks=("efficientnet-lite0",),
        feature_augment=(),
        weight=1.0,
        real_fraction=1.0,
        mix_fraction=0.0,
        mix_z=0.0,
        r1_gamma=1e-4,
        r1_rows=4,
        optim=_D2O_OPTIM,
    ),
    train=TrainConfig(batch_size=256, images=5_000_000, ema_halflife_images=500_000),
    engine=EngineConfig(gpus=4),
)
"""D2O's published command for CIFAR10 (Zyriix/D2O, train.sh): batch, rates, R1, length, average, loss. One
feature network in place of its two, and lazy R1; the betas and the choice of frozen layers are ours.
"""

PIXEL_RECIPES: dict[str, Recipe] = {
    "cifar10": Recipe(
        f"{TABLE_A1['cifar10'].about}; its gan stage is ours, not trained yet",
        "edm-cifar10",
        {"ode": TABLE_A1["cifar10"]["ode"], "gan": _CIFAR10_GAN, "cd": _CIFAR10_CD},
    ),
    "cifar10-real": Recipe(
        "CIFAR10 without pairs, as D2O: a GAN on the images of gan.real alone, on 8 GPUs; not trained yet",
        "edm-cifar10",
        {
            "gan": replace(
                _CIFAR10_GAN,
                init=FROM_TEACHER,
                regression=RegressionConfig(losses=()),
                gan=replace(_CIFAR10_GAN.gan, weight=1.0, real_fraction=1.0, z_conditioning=False, mix_z=0.0),
            )
        },
    ),
    "d2o": Recipe(
        "D2O's CIFAR10 model: a GAN on the images of gan.real alone, heads on frozen features, convolutions "
        "of the student frozen, on 4 GPUs; not trained yet",
        "edm-cifar10",
        {"gan": _D2O},
    ),
}
"""Recipes with a GAN stage for CIFAR10, for which the paper trains none."""


def _transformer(model: TeacherModel, about: str, gpus: int, batch: int, **engine: Any) -> Recipe:
    """Both stages for a transformer teacher, with the lengths of SD-CFG-3."""
    gan = DiscriminatorConfig(discriminator="transformer", r1_rows=gpus, optim=_falling(10_000 * batch))
    if model in ("sd35-medium", "flux-dev"):  # as SDXL: exact R1 on 4,429 tokens needs 220 GiB a row
        gan = replace(gan, penalty="none", r1_rows=1, noise_augment="uniform")
    settings = replace(_recompute(gpus), **engine)
    return Recipe(
        f"{about}, on {gpus} GPUs; sizes only, not trained yet",
        model,
        {
            "ode": DistillConfig(train=_train(batch, 150_000), engine=settings),
            "gan": replace(_GAN, gan=gan, train=_train(batch, 10_000), engine=settings),
        },
    )


TRANSFORMER_RECIPES: dict[str, Recipe] = {
    "dit-xl-256": _transformer("dit-xl-256", "DiT-XL/2 at 256 px, class-conditional", 8, 256),
    "pixart-sigma-512": _transformer("pixart-sigma-512", "PixArt-Sigma at 512 px", 16, 256, parallel="fsdp"),
    "sd35-medium": _transformer("sd35-medium", "SD 3.5 Medium at 1024 px", 64, 256, parallel="fsdp"),
    "flux-dev": _transformer("flux-dev", "FLUX.1-dev at 1024 px", 128, 256, parallel="fsdp"),
    "sana-600m": _transformer("sana-600m", "SANA 600M at 1024 px", 16, 256, parallel="fsdp"),
}
"""Recipes for transformer teachers, with the published sizes of their networks."""


def _cascade(model: TeacherModel, about: str, gpus: int, batch: int) -> Recipe:
    """Both stages of training for one stage of a cascade, with the lengths of SD-CFG-3."""
    gan = DiscriminatorConfig(discriminator="cascade", r1_rows=gpus, optim=_falling(10_000 * batch))
    engine = replace(_recompute(gpus), parallel="fsdp")
    return Recipe(
        f"{about}, on {gpus} GPUs; sizes only, not trained yet",
        model,
        {
            "ode": DistillConfig(train=_train(batch, 150_000), engine=engine),
            "gan": replace(_GAN, gan=gan, train=_train(batch, 10_000), engine=engine),
        },
    )


_CLIP_50 = ClipGuidanceConfig(weight=50.0)
"""StyleGAN-T's weight of the secondary phase (table 4); the primary phase has 0.2."""


def _text(base: DistillConfig, images: int, lr: float) -> DistillConfig:
    """StyleGAN-T's secondary phase with the discriminator of a GAN stage: no regression, no weight decay."""
    return replace(
        base,
        stage="text",
        optim=replace(base.optim, lr=lr, weight_decay=0.0, attention_weight_decay=0.0, betas=(0.0, 0.99)),
        regression=RegressionConfig(losses=()),
        clip_guidance=_CLIP_50,
        train=replace(base.train, images=images, ema_start_images=0),
    )


def _text_recipe(paper: str, about: str) -> Recipe:
    """The secondary phase after a recipe of Table A1, 20,000 steps as in StyleGAN-T's table 5."""
    gan = TABLE_A1[paper]["gan"]
    text = _text(gan, 20_000 * gan.train.batch_size, 1e-5)
    return Recipe(
        f"Text-encoder phase of StyleGAN-T after {paper}: {about}; not trained yet",
        TABLE_A1[paper].model,
        {"text": text},
    )


TEXT_RECIPES: dict[str, Recipe] = {
    "sd15-text": _text_recipe("sd15-cfg8", "the text encoder of SD 1.5, on 64 GPUs"),
    "sdxl-text": _text_recipe("sdxl-cfg7", "both text encoders of SDXL, on 128 GPUs"),
}
"""Recipes that train text encoders."""

CASCADE_RECIPES: dict[str, Recipe] = {
    "wuerstchen": _cascade("wuerstchen", "Stage C of Wuerstchen v2 at 1024 px", 16, 256),
    "wuerstchen-b": _cascade("wuerstchen-b", "Stage B of Wuerstchen v2 at 1024 px", 32, 256),
}
"""Recipes for the stages of a cascade, with the published sizes of their networks."""


def _small_card(paper: str, about: str, rows: int, microbatches: int) -> Recipe:
    """Both stages of a recipe of Table A1 for one GPU with 24 GB: LoRA with frozen weights in bf16, and heads
    of the discriminator on a frozen trunk.

    Exact R1 computes in fp32, so that the discriminator has APT's approximated R1, or none as in its recipe.
    """
    base = TABLE_A1[paper]
    size = rows * microbatches
    # Little memory: recomputation, frozen weights in bf16, adapters, moments in 8 bits.
    engine = replace(_recompute(1), frozen_weights="bf16", gradient_accumulation=microbatches)
    student, optim = StudentConfig(lora_rank=64), OptimConfig(name="adamw_8bit", lr=1e-4)
    # The recipe's discriminator with a frozen trunk, without exact R1.
    gan = base["gan"].gan
    gan = replace(
        gan,
        freeze_backbone=True,
        penalty="none" if gan.penalty == "none" else "approx",
        r1_rows=1,
        optim=replace(gan.optim, name="adamw_8bit", decay_images=20_000 * size),
    )
    return Recipe(
        f"{about} with LoRA on one GPU of 24 GB; sizes only, not trained yet",
        base.model,
        {
            "ode": replace(
                base["ode"], student=student, optim=optim, train=_train(size, 50_000), engine=engine
            ),
            "gan": replace(
                base["gan"],
                student=student,
                optim=replace(optim, lr=1e-5),
                gan=gan,
                train=_train(size, 20_000),
                engine=engine,
            ),
        },
    )


SMALL_CARD_RECIPES: dict[str, Recipe] = {
    "sd15-24gb": _small_card("sd15-cfg8", "SD 1.5", 16, 2),
    "sdxl-24gb": _small_card("sdxl-cfg7", "SDXL", 4, 4),
}
"""Recipes for one GPU with 24 GB."""

_SHORT = TrainConfig(images=64, batch_size=16, ema_start_images=16, report_images=16, checkpoint_images=32)
_MINIATURE = TrainConfig(
    images=24_000,
    batch_size=64,
    ema_beta=0.98,
    precision="auto",  # bf16 is 1.5 times as fast on a CPU that has it
    loader_workers=0,
    report_images=640,
    checkpoint_images=6_400,
)


def _small_gan_optim(lr: float) -> OptimConfig:
    """Optimizers of a short stage 2: their rates fall over the whole run."""
    return OptimConfig(lr=lr, betas=(0.5, 0.99), warmup_images=640, decay_images=-1)


SMALL_RECIPES: dict[str, Recipe] = {
    "trial": Recipe(
        "64 images with any SD teacher, to check that every command of a run works before the real one",
        "sd15",
        {
            "ode": DistillConfig(regression=_CFG3, train=_SHORT),
            "gan": replace(_GAN, regression=_CFG3, gan=DiscriminatorConfig(r1_interval=2), train=_SHORT),
        },
    ),
    "miniature": Recipe(
        "The shipped miniature teacher on two CPU cores: pseudo-Huber, then E-LatentLPIPS and GAN",
        "miniature",
        {
            "ode": DistillConfig(
                teacher="miniature",
                regression=RegressionConfig(losses=(("pseudo_huber", 1.0),)),
                optim=OptimConfig(lr=1e-3, warmup_images=1_280, decay_images=-1),
                train=_MINIATURE,
            ),
            "gan": DistillConfig(
                stage="gan",
                teacher="miniature",
                optim=_small_gan_optim(1e-4),
                gan=DiscriminatorConfig(r1_interval=8, optim=_small_gan_optim(3e-4)),
                train=replace(_MINIATURE, images=12_000, batch_size=32, checkpoint_images=3_200),
            ),
        },
    ),
}

_SMALL_GAN = SMALL_RECIPES["miniature"]["gan"]
SMALL_RECIPES["miniature-text"] = Recipe(
    "Text-encoder phase of StyleGAN-T for the miniature's students",
    "miniature",
    {"text": _text(_SMALL_GAN, 6_400, 1e-4)},
)
SMALL_RECIPES["small-transformer"] = Recipe(
    "A transformer teacher of under 100 million parameters; the lengths of miniature; trained on garments",
    "dit-xl-256",
    {
        "ode": replace(SMALL_RECIPES["miniature"]["ode"], teacher=""),
        "gan": replace(
            _SMALL_GAN, teacher="", gan=replace(_SMALL_GAN.gan, discriminator="transformer", token_heads=2)
        ),
    },
)


def _generator(
    student: StudentConfig,
    model: TeacherModel,
    about: str,
    *,
    gan: DiscriminatorConfig,
    optim: OptimConfig,
    train: TrainConfig,
    engine: EngineConfig,
    clip_weight: float = 0.2,
    **more: Any,
) -> Recipe:
    """A GAN from random weights on the latents of the pairs, without regression."""
    config = DistillConfig(
        stage="gan",
        student=student,
        regression=RegressionConfig(losses=()),
        gan=replace(gan, weight=1.0, z_conditioning=False, mix_z=0.0),
        optim=optim,
        clip_guidance=ClipGuidanceConfig(weight=clip_weight),
        train=train,
        engine=engine,
        **more,
    )
    return Recipe(about, model, {"gan": config})


_STYLEGAN_T_OPTIM = OptimConfig(
    name="adam", lr=2e-3, betas=(0.0, 0.99), weight_decay=0.0, attention_weight_decay=0.0
)
_STYLEGAN_T_GAN = DiscriminatorConfig(
    discriminator="projected", loss="hinge", mix_fraction=0.0, penalty="none", optim=_STYLEGAN_T_OPTIM
)
_STYLEGAN_T_FULL = GeneratorConfig(channel_base=65_536, channel_max=2_048, residual_blocks=4, w_dim=704)
_GIGAGAN = GeneratorConfig(z_dim=128, w_dim=1_024, mapping_layers=4)


def _styled(
    kind: StudentName, sizes: GeneratorConfig, about: str, gpus: int, images: int, microbatches: int = 1
) -> Recipe:
    """A generator with styles at StyleGAN-T's rates, batch and average (table 4)."""
    return _generator(
        StudentConfig(kind=kind, generator=sizes),
        "sd15",
        f"{about}, on {gpus} GPUs; sizes only, not trained yet",
        gan=_STYLEGAN_T_GAN,
        optim=_STYLEGAN_T_OPTIM,
        train=TrainConfig(batch_size=2048, images=images, ema_beta=0.9978),
        engine=replace(_recompute(gpus), gradient_accumulation=microbatches),
    )


def _small_generator(kind: StudentName, sizes: GeneratorConfig, about: str, **gan: Any) -> Recipe:
    """A generator with styles for the miniature's latents, which one CPU core can train."""
    optim = OptimConfig(**{**_OPTIM_FIELDS, "lr": 1e-3})
    return _generator(
        StudentConfig(kind=kind, generator=sizes),
        "miniature",
        about,
        gan=DiscriminatorConfig(
            r1_interval=8, r1_gamma=1.0, optim=OptimConfig(**{**_OPTIM_FIELDS, "lr": 2e-4}), **gan
        ),
        optim=optim,
        train=replace(_MINIATURE, images=96_000, batch_size=16, ema_beta=0.99, checkpoint_images=9_600),
        engine=EngineConfig(),
        clip_weight=0.0,
        teacher="miniature",
    )


_OPTIM_FIELDS: dict[str, Any] = {
    "name": "adam",
    "betas": (0.0, 0.99),
    "weight_decay": 0.0,
    "attention_weight_decay": 0.0,
}
_SMALL_SIZES = GeneratorConfig(channel_base=1_024, channel_max=128, residual_blocks=2, kernels=2, factor=2)

STYLE_RECIPES: dict[str, Recipe] = {
    "stylegan-t": _styled(
        "stylegan-t",
        GeneratorConfig(),
        "StyleGAN-T's lightweight generator (75 million parameters) on latents of 64x64",
        *(8, 25_000_000, 4),
    ),
    "stylegan-t-1b": _styled(
        "stylegan-t",
        _STYLEGAN_T_FULL,
        "StyleGAN-T's full generator (1.02 billion parameters) on latents of 64x64, after those of 16 and 32",
        *(64, 57_000 * 2048),
    ),
    "gigagan": _styled(
        "gigagan",
        _GIGAGAN,
        "A generator with GigaGAN's adaptive kernels and attention on latents of 64x64",
        *(64, 25_000_000),
    ),
    "miniature-stylegan-t": _small_generator(
        "stylegan-t", _SMALL_SIZES, "A small StyleGAN-T on the pairs of the miniature, on one CPU core"
    ),
    "miniature-gigagan": _small_generator(
        "gigagan", _SMALL_SIZES, "A small GigaGAN on the pairs of the miniature, on one CPU core"
    ),
}
"""Generators with styles in place of the teacher's network. The paper's table 5 gives iterations of 2048."""

_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "d": ("the discriminator", {}),
    "z": ("conditioning on the noise", {"z_conditioning": False}),
    "r1": ("the R1 penalty", {"penalty": "none"}),
    "multiscale": (
        "multi-scale inputs and outputs",
        {"multi_scale_input": False, "multi_scale_output": False},
    ),
    "mix": ("mix-and-match augmentation", {"mix_fraction": 0.0}),
}
"""Rows of method.md "Ablation of the discriminator" after the first: the part that each adds, and the
settings that turn it off.
"""


def ablation(base: Recipe, prefix: str = "") -> dict[str, Recipe]:
    """The rows of method.md "Ablation of the discriminator" over a recipe, by name. Each adds one part to the
    row before it.

    The first row is the regression stage alone; given that run as --init, it trains as long as the others.
    """
    of = f"Study of the discriminator's parts on {base.model}: "
    rows = {
        f"{prefix}ablation-regression": Recipe(
            f"{of}stage 1 alone, no discriminator", base.model, {"ode": base["ode"]}
        )
    }
    off = {name: settings for name, (_, settings) in _PARTS.items()}
    for name, (part, _) in _PARTS.items():
        del off[name]
        without = {field: value for settings in off.values() for field, value in settings.items()}
        gan = replace(base["gan"], gan=replace(base["gan"].gan, **without))
        about = f"{of}{next(reversed(rows))} plus {part}"
        rows[f"{prefix}ablation-{name}"] = Recipe(about, base.model, {"ode": base["ode"], "gan": gan})
    return rows


COMPARED_LOSSES: tuple[RegressionName, ...] = (
    "mse",
    "pseudo_huber",
    "lpips",
    "latent_lpips",
    "e_latent_lpips",
    "decoder_features",
)
"""Losses of method.md "Comparison of regression losses", and decoder_features."""


def loss_comparison(base: Recipe, images: int, prefix: str = "") -> dict[str, Recipe]:
    """The rows of method.md "Comparison of regression losses" over a recipe's regression stage, by name, each
    trained on `images` images.
    """
    ode = replace(base["ode"], train=replace(base["ode"].train, images=images))
    return {
        f"{prefix}loss-{name.replace('_', '-')}": Recipe(
            f"Study of regression losses on {base.model}: stage 1 with {name.replace('_', '-')} alone",
            base.model,
            {"ode": replace(ode, regression=replace(ode.regression, losses=((name, 1.0),)))},
        )
        for name in COMPARED_LOSSES
    }


_RECIPES = {
    **TABLE_A1,
    **PIXEL_RECIPES,
    **TRANSFORMER_RECIPES,
    **TEXT_RECIPES,
    **CASCADE_RECIPES,
    **SMALL_CARD_RECIPES,
    **SMALL_RECIPES,
    **STYLE_RECIPES,
    **ablation(TABLE_A1["sd15-cfg3"]),
    **loss_comparison(TABLE_A1["sd15-cfg3"], 20_000 * 256),
    **ablation(SMALL_RECIPES["miniature"], "miniature-"),
    **loss_comparison(
        SMALL_RECIPES["miniature"], SMALL_RECIPES["miniature"]["ode"].train.images, "miniature-"
    ),
}
DISTILL_PRESETS = Presets({name: (recipe.about, recipe) for name, recipe in _RECIPES.items()})
"""Presets of `d2g distill`, each with a config per stage."""


def preset(name: str, stage: str) -> DistillConfig:
    """The config of a preset's stage. Raises SettingError naming the nearest preset, or its stages."""
    recipe = pick(DISTILL_PRESETS, name, "preset")
    if stage not in recipe:
        raise SettingError(f"preset {name!r} has no stage {stage!r}; it has {', '.join(recipe)}")
    return recipe[stage]
