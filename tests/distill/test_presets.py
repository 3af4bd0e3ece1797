"""distill.config.presets: the recipes of Table A1 fit the GPUs that they name."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from distill.config.presets import TABLE_A1
from distill.planning.memory import predict, too_large
from distill.planning.reference_models import configs_only

A100 = 79.2  # GiB that CUDA reports


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    return {kind: configs_only(kind, tmp_path_factory.mktemp("known") / kind) for kind in ("sd15", "sdxl")}


@pytest.mark.parametrize(
    ("name", "stage", "gpus"),
    [
        ("sd15-cfg3", "ode", 8),  # as in the README's commands
        ("sd15-cfg3", "gan", 8),
        ("sd15-cfg3", "gan", 16),
        ("sd15-cfg8", "ode", 64),
        ("sd15-cfg8", "gan", 64),
        ("sdxl-cfg7", "ode", 128),
        ("sdxl-cfg7", "gan", 128),
    ],
)
def test_preset_fits_its_gpus(name: str, stage: str, gpus: int, teachers: Mapping[str, str]) -> None:
    config = replace(TABLE_A1[name][stage], teacher=teachers[name.partition("-")[0]])
    assert gpus in (8, config.engine.gpus)
    memory = predict(config, gpus).total
    assert too_large(config, memory, A100) is None, f"{memory:.1f} GiB"


def test_a_config_that_is_too_large_is_reported(teachers: Mapping[str, str]) -> None:
    """Without activation checkpointing the recipe does not fit; the message suggests it."""
    config = replace(TABLE_A1["sd15-cfg3"]["gan"], teacher=teachers["sd15"])
    config = replace(config, engine=replace(config.engine, activation_checkpointing=False))
    assert "activation_checkpointing=true" in str(too_large(config, predict(config, 8).total, A100))
