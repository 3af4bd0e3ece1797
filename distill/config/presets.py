"""Presets of `d2g distill`: the columns of Table A1, the rows of method.md "Ablation of the
discriminator" and "Comparison of regression losses", and small sizes to try things at."""

from dataclasses import replace
from typing import Any

from d2g.core.config import pick
from d2g.core.errors import SettingError
from distill.config.components import DiscriminatorConfig, OptimConfig, RegressionConfig, RegressionKind
from distill.config.run import DistillConfig, EngineConfig, StudentConfig, TrainConfig

Stages = dict[str, DistillConfig]
"""A recipe: a config for each stage, `ode` and, where there is one, `gan`."""


def _train(batch: int, iterations: int, ema_start: int = 4_000) -> TrainConfig:
    return TrainConfig(batch_size=batch, images=iterations * batch, ema_start_images=ema_start * batch)


def _thrifty(gpus: int) -> EngineConfig:
    """With recomputation, without which these would not fit 80 GB (tests/distill/test_presets.py)."""
    return EngineConfig(gpus=gpus, activation_checkpointing=True)


_CFG3 = RegressionConfig(augment="bgo", latent_lpips_weight=1.0)
_GAN = DistillConfig(stage="gan", optim=OptimConfig(lr=1e-5))

TABLE_A1: dict[str, Stages] = {
    # Pixels of EDM's teacher and classes, regression only (method.md "CIFAR10 and EDM")
    "cifar10": {
        "ode": DistillConfig(
            student=StudentConfig(dropout=0.1),
            optim=OptimConfig(name="radam", lr=4e-4, weight_decay=0.0, attention_weight_decay=0.0),
            regression=RegressionConfig(kind="lpips", lpips_resize=224),
            train=_train(512, 150_000, ema_start=20_000),
            engine=EngineConfig(gpus=8),
        ),
    },
    "sd15-cfg3": {
        "ode": DistillConfig(regression=_CFG3, train=_train(256, 150_000), engine=EngineConfig(gpus=16)),
        "gan": replace(
            _GAN,
            regression=_CFG3,
            gan=DiscriminatorConfig(r1_rows=16),
            train=_train(256, 10_000),
            engine=_thrifty(16),
        ),
    },
    "sd15-cfg8": {
        "ode": DistillConfig(train=_train(2048, 50_000), engine=EngineConfig(gpus=64)),
        "gan": replace(
            _GAN, gan=DiscriminatorConfig(r1_rows=64), train=_train(1024, 10_000), engine=_thrifty(64)
        ),
    },
    "sdxl-cfg7": {
        "ode": DistillConfig(train=_train(1024, 20_000), engine=_thrifty(128)),
        "gan": replace(
            _GAN,
            gan=DiscriminatorConfig(
                weight=1.0,
                penalty="none",
                noise_augment="uniform",
                optim=OptimConfig(lr=1e-5, betas=(0.0, 0.99)),
            ),
            train=_train(512, 30_000),
            engine=replace(_thrifty(128), parallel="fsdp"),
        ),
    },
}
"""One recipe per column of the supplement's Table A1."""

_SHORT = TrainConfig(images=64, batch_size=16, ema_start_images=16, report_images=16, checkpoint_images=32)
_MINIATURE = TrainConfig(
    images=24_000,
    batch_size=64,
    ema_beta=0.99,
    precision="fp32",
    loader_workers=0,
    report_images=640,
    checkpoint_images=6_400,
)

SMALL: dict[str, Stages] = {
    # Every command of a run, small enough for a laptop: to see that all is in place before the real one
    "trial": {
        "ode": DistillConfig(regression=_CFG3, train=_SHORT),
        "gan": replace(_GAN, regression=_CFG3, gan=DiscriminatorConfig(r1_interval=2), train=_SHORT),
    },
    # Two CPU cores; results: docs/LOG.md
    "miniature": {
        "ode": DistillConfig(teacher="miniature", optim=OptimConfig(lr=5e-4), train=_MINIATURE),
        "gan": DistillConfig(
            stage="gan",
            teacher="miniature",
            optim=OptimConfig(lr=1e-4, betas=(0.5, 0.99)),
            gan=DiscriminatorConfig(r1_interval=8, optim=OptimConfig(lr=3e-4, betas=(0.5, 0.99))),
            train=replace(_MINIATURE, images=12_000, batch_size=32, checkpoint_images=3_200),
        ),
    },
}

_PARTS: dict[str, dict[str, Any]] = {
    "d": {},
    "z": {"z_conditioning": False},
    "r1": {"penalty": "none"},
    "multiscale": {"multi_scale_input": False, "multi_scale_output": False},
    "mix": {"mix_fraction": 0.0},
}
"""Rows of method.md "Ablation of the discriminator" after the first, and the settings without the part that
each adds.
"""

_LOSSES: dict[str, RegressionKind] = {
    "mse": "mse",
    "pseudo-huber": "pseudo_huber",
    "lpips": "lpips",
    "latent-lpips": "latent_lpips",
    "e-latent-lpips": "e_latent_lpips",
}


def ablation(base: Stages, prefix: str = "") -> dict[str, Stages]:
    """The rows of method.md "Ablation of the discriminator" over a recipe, by name: each adds one part to the
    row before it.

    The first is its first stage alone; given that run as --init, it goes on for as long as the others.
    """
    rows, later = {f"{prefix}ablation-regression": {"ode": base["ode"]}}, dict(_PARTS)
    for name in _PARTS:
        del later[name]
        without = {field: value for off in later.values() for field, value in off.items()}
        gan = replace(base["gan"], gan=replace(base["gan"].gan, **without))
        rows[f"{prefix}ablation-{name}"] = {"ode": base["ode"], "gan": gan}
    return rows


def losses(base: Stages, images: int, prefix: str = "") -> dict[str, Stages]:
    """The rows of method.md "Comparison of regression losses" over a recipe's first stage, by name, each for
    so many images.
    """
    ode = replace(base["ode"], train=replace(base["ode"].train, images=images))
    plain = replace(ode.regression, latent_lpips_weight=0.0)
    return {
        f"{prefix}loss-{name}": {"ode": replace(ode, regression=replace(plain, kind=kind))}
        for name, kind in _LOSSES.items()
    }


PRESETS: dict[str, Stages] = {
    **TABLE_A1,
    **SMALL,
    **ablation(TABLE_A1["sd15-cfg3"]),
    **losses(TABLE_A1["sd15-cfg3"], 20_000 * 256),
    **ablation(SMALL["miniature"], "miniature-"),
    **losses(SMALL["miniature"], SMALL["miniature"]["ode"].train.images, "miniature-"),
}
"""Presets of `d2g distill`, each a config per stage."""


def preset(name: str, stage: str) -> DistillConfig:
    """The preset `name` of a stage. Raises SettingError naming the nearest, or its stages."""
    stages = pick(PRESETS, name, "preset")
    if stage not in stages:
        raise SettingError(f"preset {name!r} has no stage {stage!r}; it has {', '.join(stages)}")
    return stages[stage]
