"""distill.config: the supplement's table, and impossible settings."""

from collections.abc import Callable

import pytest

from core.config import from_json, override, to_json
from core.errors import SettingError
from distill.config import (
    PRESETS,
    DiscriminatorConfig,
    DistillConfig,
    OptimConfig,
    RegressionConfig,
    TrainConfig,
    plan,
    preset,
)


def test_presets_are_table_a1() -> None:
    table = {
        (name, stage): (
            p.train.images // p.train.batch_size,
            p.train.batch_size,
            p.optim.lr,
            p.regression.augment,
            p.regression.latent_lpips,
            p.train.ema_start_images // p.train.batch_size,
        )
        for name in ("sd15-cfg3", "sd15-cfg8")
        for stage, p in PRESETS[name].items()
    }
    assert table == {
        ("sd15-cfg3", "ode"): (150_000, 256, 1e-4, "bgo", 1.0, 4_000),
        ("sd15-cfg3", "gan"): (10_000, 256, 1e-5, "bgo", 1.0, 4_000),
        ("sd15-cfg8", "ode"): (50_000, 2048, 1e-4, "bgco", 0.0, 4_000),
        ("sd15-cfg8", "gan"): (10_000, 1024, 1e-5, "bgco", 0.0, 4_000),
    }
    for name in ("sd15-cfg3", "sd15-cfg8"):
        gan = PRESETS[name]["gan"]
        assert (gan.gan.weight, gan.gan.r1_gamma, gan.gan.r1_interval, gan.train.precision) == (
            0.25,
            0.01,
            16,
            "bf16",
        )
        assert (gan.optim.weight_decay, gan.optim.attention_weight_decay) == (1e-2, 1e-5)
        assert gan.train.ema_beta == 0.9999 and gan.optim.betas == gan.gan.optim.betas == (0.9, 0.999)


def test_every_preset_names_its_stage_and_survives_json() -> None:
    for name, stages in PRESETS.items():
        assert set(stages) == {"ode", "gan"}
        for stage, config in stages.items():
            assert config.stage == stage and preset(name, stage) is config
            assert from_json(DistillConfig, to_json(config)) == config
    with pytest.raises(SettingError, match=r"unknown preset 'minature'; did you mean 'miniature'\?"):
        preset("minature", "ode")


def test_overrides_reach_every_level() -> None:
    config = override(DistillConfig(), ["gan.optim.betas=[0, 0.99]", "train.minutes=2", "gan.r1_gamma=1"])
    assert (
        config.gan.optim.betas == (0.0, 0.99) and config.train.minutes == 2.0 and config.gan.r1_gamma == 1.0
    )


def test_the_plan_counts_evaluations_as_the_table_does_less_the_second_generator_pass() -> None:
    """One D step and one G step share G's forward: 1 + 3 evaluations a sample (Table A1 counts 5)."""
    train = TrainConfig(images=1000, batch_size=256)
    assert plan(DistillConfig(train=train)) == {"steps": 4, "evaluations": 1000}
    assert plan(DistillConfig(stage="gan", train=train)) == {"steps": 4, "evaluations": 4000}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: OptimConfig(lr=0), "lr 0"),
        (lambda: OptimConfig(weight_decay=-1), "not negative"),
        (lambda: RegressionConfig(draws=0), "draws"),
        (lambda: RegressionConfig(l1=-1), "regression"),
        (lambda: DiscriminatorConfig(mix_fraction=1), "gan.mix_fraction is 1"),
        (lambda: DiscriminatorConfig(r1_interval=0), "r1_interval"),
        (lambda: TrainConfig(batch_size=0), "train.batch_size is 0"),
        (lambda: TrainConfig(ema_beta=1), "ema_beta 1"),
        (lambda: TrainConfig(minutes=0), "minutes 0"),
        (
            lambda: DistillConfig(stage="gan", train=TrainConfig(batch_size=1)),
            "mix-and-match needs train.batch_size",
        ),
    ],
)
def test_impossible_settings(make: Callable[[], object], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        make()
