import pytest
import torch
from torch import nn
from torchvision.models import vgg16_bn
from torchvision.models.vgg import cfgs, make_layers

from d2g.core.errors import UserError
from latent_lpips.config import LPIPSConfig
from latent_lpips.vgg import VGG16, fold_batch_norms


def tiny(norm: str = "batch", channels: int = 4) -> VGG16:
    torch.manual_seed(0)
    return VGG16(LPIPSConfig(channels=channels, width=1 / 16, norm=norm)).eval()  # type: ignore[arg-type]


def test_full_width_layout_and_names() -> None:
    with torch.device("meta"):
        ours = VGG16(LPIPSConfig(channels=3), classes=1000).state_dict()
        published = vgg16_bn().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in published.items()}


def test_features_equal_torchvision_without_three_pools() -> None:
    torch.manual_seed(0)
    published = make_layers([w if w == "M" else w // 8 for w in cfgs["D"]], batch_norm=True).eval()  # type: ignore[operator]
    ours = VGG16(LPIPSConfig(channels=3, width=1 / 8)).eval()
    ours.features.load_state_dict(published.state_dict())
    for pool in (6, 13, 23):
        assert isinstance(published[pool], nn.MaxPool2d)
        published[pool] = nn.Identity()
    x = torch.randn(2, 3, 16, 16)
    expected = [published[:end](x) for end in (7, 14, 24, 34, 44)]
    assert all(torch.equal(a, b) for a, b in zip(ours.taps(x), expected, strict=True))


def test_tap_shapes_at_full_width() -> None:
    with torch.device("meta"):
        taps = VGG16(LPIPSConfig()).taps(torch.empty(1, 4, 64, 64))
    assert [tuple(t.shape[1:]) for t in taps] == [
        (64, 64, 64),
        (128, 64, 64),
        (256, 64, 64),
        (512, 32, 32),
        (512, 16, 16),
    ]


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (5, 9)])
def test_small_latents_keep_at_least_one_position(size: tuple[int, int]) -> None:
    taps = tiny().taps(torch.randn(1, 4, *size))
    assert tuple(taps[4].shape[2:]) == (size[0] // 4, size[1] // 4)


def test_latents_of_other_shapes_are_refused() -> None:
    with pytest.raises(UserError, match=r"3x8 positions, expected at least 4x4; use larger"):
        tiny().taps(torch.randn(1, 4, 3, 8))
    with pytest.raises(UserError, match=r"\(1, 16, 8, 8\).*takes \[B, 4, h, w\]"):
        tiny().taps(torch.randn(1, 16, 8, 8))


def test_folding_batch_norms_does_not_change_the_features() -> None:
    trunk = tiny()
    for module in trunk.features:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    plain = fold_batch_norms(trunk)
    assert plain.config.norm == "none"
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    x = torch.randn(3, 4, 8, 8)
    for a, b in zip(trunk.taps(x), plain.taps(x), strict=True):
        assert a.std() > 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_vgg_without_norms_has_torchvisions_numbering() -> None:
    published = make_layers([w if w == "M" else w // 16 for w in cfgs["D"]])  # type: ignore[operator]
    ours = tiny("none", channels=3).features.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in published.state_dict().items()}


def test_group_norm_in_place_of_batch_norm() -> None:
    """Group norm keeps the numbering, treats samples independently, and has 32 groups if the width allows."""
    ours, batch = tiny("group"), tiny()
    assert [type(m) for m in ours.features if not isinstance(m, nn.GroupNorm)] == [
        type(m) for m in batch.features if not isinstance(m, nn.BatchNorm2d)
    ]
    assert [m.num_groups for m in ours.features if isinstance(m, nn.GroupNorm)][-1] == 32
    x = torch.randn(3, 4, 8, 8)
    for batch_taps, single_taps in zip(ours.train().taps(x), ours.eval().taps(x[1:2]), strict=True):
        torch.testing.assert_close(batch_taps[1:2], single_taps)
    with pytest.raises(AssertionError, match="norm 'group' is more than convolutions"):
        ours.layers()
