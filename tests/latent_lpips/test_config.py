import itertools

import pytest

from d2g.core.config import from_json, override, to_json
from d2g.core.errors import SettingError
from latent_lpips.config import LPIPS_PRESETS, AugmentConfig, LPIPSConfig, LPIPSTrainConfig


def test_families_are_parsed_in_the_order_of_application() -> None:
    for count in range(1, 5):
        for letters in itertools.permutations("bgco", count):
            config = AugmentConfig(families="".join(letters))
            assert config.letters == "".join(c for c in "bgco" if c in letters)
    assert AugmentConfig(families="none").letters == ""


@pytest.mark.parametrize("families", ["", "x", "bgx", "bb", "b+cutout", "noneb"])
def test_unknown_families_are_refused(families: str) -> None:
    with pytest.raises(SettingError, match=r"'none' or letters of 'bgco'"):
        AugmentConfig(families=families)


def test_width_multiplier_and_invalid_values() -> None:
    assert LPIPSConfig().widths == (64, 128, 256, 512, 512)
    assert LPIPSConfig(width=0.25).widths == (16, 32, 64, 128, 128)
    with pytest.raises(SettingError, match="channels"):
        LPIPSConfig(channels=0)
    with pytest.raises(SettingError, match=r"norm.*'batch', 'group' or 'none'"):
        LPIPSConfig(norm="layer")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="rotation"):
        AugmentConfig(rotation=200.0)


@pytest.mark.parametrize("preset", sorted(LPIPS_PRESETS))
def test_presets_round_trip_through_json(preset: str) -> None:
    assert from_json(LPIPSTrainConfig, to_json(LPIPS_PRESETS[preset])) == LPIPS_PRESETS[preset]


def test_settings_can_be_overridden_by_dotted_name() -> None:
    config = override(LPIPS_PRESETS["small"], ["network.width=0.5", "trunk.minutes=2", "unrelated=null"])
    assert (config.network.width, config.trunk.minutes, config.unrelated) == (0.5, 2.0, None)
