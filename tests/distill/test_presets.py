"""distill.config.presets: the recipes of Table A1 fit the GPUs that they name."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from d2g.diffusion.families.registry import FAMILIES
from d2g.diffusion.pipelines import family_of
from d2g.diffusion.pretrained import load_on_meta
from distill.config.presets import (
    CASCADE_RECIPES,
    DISTILL_PRESETS,
    PIXEL_RECIPES,
    TABLE_A1,
    TRANSFORMER_RECIPES,
)
from distill.models.discriminators import DISCRIMINATORS, check_discriminator
from distill.planning import choose_preset
from distill.planning.choose_preset import preset_of_family
from distill.planning.flops import gpu_days
from distill.planning.memory import predict, too_large
from distill.planning.reference_models import configs_only

A100 = 79.2  # GiB that CUDA reports


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "a new family"])
def test_the_preset_of_a_family_has_a_discriminator_for_its_network(
    listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before somebody lists the family in OF_FAMILY."""
    if not listed:
        monkeypatch.setattr(choose_preset, "OF_FAMILY", {})
    for family in FAMILIES.values():
        recipe = DISTILL_PRESETS[preset_of_family(family)]
        if "gan" in recipe:  # CIFAR10's recipe ends with the regression
            networks = DISCRIMINATORS[recipe["gan"].gan.discriminator].networks
            assert family.network in networks, family.name


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    return {kind: configs_only(kind, tmp_path_factory.mktemp("known") / kind) for kind in ("sd15", "sdxl")}


@pytest.mark.parametrize(
    ("name", "stage", "gpus"),
    [
        ("sd15-cfg3", "ode", 8),  # as in the README's commands
        pytest.param("sd15-cfg3", "gan", 8, marks=(pytest.mark.slow, pytest.mark.long)),
        pytest.param("sd15-cfg3", "gan", 16, marks=(pytest.mark.slow, pytest.mark.long)),
        pytest.param("sd15-cfg8", "ode", 64, marks=pytest.mark.slow),
        pytest.param("sd15-cfg8", "gan", 64, marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param("sdxl-cfg7", "ode", 128, marks=(pytest.mark.slow, pytest.mark.long)),
        pytest.param("sdxl-cfg7", "gan", 128, marks=(pytest.mark.slow, pytest.mark.long)),
    ],
)
def test_preset_fits_its_gpus(name: str, stage: str, gpus: int, teachers: Mapping[str, str]) -> None:
    config = replace(TABLE_A1[name][stage], teacher=teachers[name.partition("-")[0]])
    assert gpus in (8, config.engine.gpus)
    memory = predict(config, gpus).total
    assert too_large(config, memory, A100) is None, f"{memory:.1f} GiB"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", CASCADE_RECIPES)
def test_stages_of_a_cascade_have_the_published_sizes(name: str, tmp_path: Path) -> None:
    """Stage C has 1 B parameters (the paper, section 1); both as diffusers converts them."""
    teacher = configs_only(name, tmp_path / name)
    network = load_on_meta(teacher, family_of(teacher).network)
    sizes = {"wuerstchen": 993_636_896, "wuerstchen-b": 1_055_365_280}
    assert sum(p.numel() for p in network.parameters()) == sizes[name]
    check_discriminator(teacher, CASCADE_RECIPES[name]["gan"].gan)
    days = gpu_days(CASCADE_RECIPES[name]["ode"], 1_000_000, name)
    assert days is not None and days > 0


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ode", "gan"])
@pytest.mark.parametrize("name", CASCADE_RECIPES)
def test_a_cascades_recipe_fits(name: str, stage: str, tmp_path: Path) -> None:
    config = CASCADE_RECIPES[name][stage]
    config = replace(config, teacher=configs_only(name, tmp_path / name))
    total = predict(config, config.engine.gpus).total
    assert too_large(config, total, A100) is None, f"{total:.1f} GiB"


SIZES = {
    "dit-xl-256": 749_826_464,
    "pixart-sigma-512": 610_856_096,
    "sd35-medium": 2_243_171_520,
    "flux-dev": 11_901_408_320,
    "sana-600m": 591_747_872,
}
"""Parameters of diffusers' networks; DiT's has an embedding of time and class in every block."""


@pytest.mark.parametrize("name", TRANSFORMER_RECIPES)
def test_transformers_have_the_published_sizes(name: str, tmp_path: Path) -> None:
    teacher = configs_only(name, tmp_path / name)
    network = load_on_meta(teacher, "transformer")
    assert sum(p.numel() for p in network.parameters()) == SIZES[name]
    recipe = TRANSFORMER_RECIPES[name]
    check_discriminator(teacher, recipe["gan"].gan)
    assert recipe.model == name and recipe["gan"].stage == "gan"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ode", "gan"])
@pytest.mark.parametrize("name", TRANSFORMER_RECIPES)
def test_a_transformers_recipe_fits(name: str, stage: str, tmp_path: Path) -> None:
    config = TRANSFORMER_RECIPES[name][stage]
    config = replace(config, teacher=configs_only(name, tmp_path / name))
    total = predict(config, config.engine.gpus).total
    assert too_large(config, total, A100) is None, f"{total:.1f} GiB"


def test_gpu_days_follow_from_the_operations() -> None:
    """DiT-XL/2 at 256 px has 118.6 billion multiply-adds (Peebles and Xie, table 1): two operations each,
    three passes, 40 % of 312 TFLOP/s.
    """
    days = gpu_days(TRANSFORMER_RECIPES["dit-xl-256"]["ode"], 1_000_000, "dit-xl-256")
    expected = 3 * 2 * 118.6e9 * 1e6 / (0.4 * 312e12) / 86_400
    assert days == pytest.approx(expected, rel=0.01)
    assert gpu_days(TABLE_A1["cifar10"]["ode"], 1, "") is None


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", PIXEL_RECIPES)
def test_cifar10_recipes_fit_a_gpu(name: str, tmp_path: Path) -> None:
    """The stand-in for EDM's network has nearly its 55.7 M parameters; each GPU has 64 rows."""
    teacher = configs_only("edm-cifar10", tmp_path / "teacher")
    assert sum(p.numel() for p in load_on_meta(teacher, "unet").parameters()) == 54_298_883
    config = PIXEL_RECIPES[name]["gan"]
    check_discriminator(teacher, config.gan)
    assert too_large(config, predict(replace(config, teacher=teacher), 8).total, A100) is None
    assert config.without_pairs == (name in ("cifar10-real", "d2o"))
    assert gpu_days(config, 1_000_000, "edm-cifar10") == pytest.approx(0.0117, rel=0.05)


@pytest.mark.slow
def test_a_config_that_is_too_large_is_reported(teachers: Mapping[str, str]) -> None:
    """Without activation checkpointing the recipe does not fit; the message suggests it."""
    config = replace(TABLE_A1["sd15-cfg3"]["gan"], teacher=teachers["sd15"])
    config = replace(config, engine=replace(config.engine, activation_checkpointing=False))
    assert "activation_checkpointing=true" in str(too_large(config, predict(config, 8).total, A100))
