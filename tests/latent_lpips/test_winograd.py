"""Transposed convolutions by Winograd's minimal filtering against direct ones."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latent_lpips import winograd
from latent_lpips.config import LPIPSConfig
from latent_lpips.vgg import VGG16, fold_batch_norms


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (4, 40), (1, 2)])
@pytest.mark.parametrize("tiles", [1, 24, 512])
def test_equals_direct_convolution(
    size: tuple[int, int], tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For even and odd sizes, and however images and rows are divided."""
    monkeypatch.setattr(winograd, "MAX_TILES", tiles)
    y, weight = random(3, 6, *size), random(6, 4, 3, 3)
    result = winograd.conv3x3_transposed(y, winograd.transform_weight(weight, torch.float64))
    torch.testing.assert_close(result, F.conv_transpose2d(y, weight, padding=1))
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (4, 40), (1, 2)])
@pytest.mark.parametrize("tiles", [1, 24, 512])
def test_forward_equals_direct_convolution(
    size: tuple[int, int], tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "MAX_TILES", tiles)
    x, weight, bias = random(3, 4, *size), random(6, 4, 3, 3), random(3, 6)
    result = winograd.conv3x3(x, winograd.transform_weight(weight, torch.float64), bias)
    torch.testing.assert_close(result, F.conv2d(x, weight, padding=1) + bias[:, :, None, None])
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_sums_in_fp32_have_a_smaller_error() -> None:
    x, weight = random(1, 64, 16, 16).relu().bfloat16(), random(64, 64, 3, 3)
    exact, transformed = F.conv2d(x.double(), weight, padding=1), winograd.transform_weight(weight)
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        result = winograd.conv3x3(x, transformed, torch.zeros(1, 64, dtype=dtype))
        assert result.dtype == torch.bfloat16
        errors.append((result.double() - exact).norm() / exact.norm())
    assert errors[0] < 0.9 * errors[1] and errors[0] < 6e-3


def test_error_in_bf16_is_below_one_percent() -> None:
    x, weight = random(1, 64, 16, 16).relu().bfloat16(), random(64, 64, 3, 3)
    exact = F.conv_transpose2d(x.double(), weight, padding=1)
    result = winograd.conv3x3_transposed(x, winograd.transform_weight(weight))
    assert result.dtype == torch.bfloat16
    assert (result.double() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("amx", [False, True])
def test_only_wide_bf16_convolutions_of_a_cpu_without_amx_take_it(
    amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities = {"avx512_bf16": True, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    for width, precision, wide in ((0.5, "bf16", 5), (0.5, "fp32", 0), (0.25, "bf16", 0)):
        trunk = fold_batch_norms(VGG16(LPIPSConfig(width=width)), precision)  # type: ignore[arg-type]
        layers = trunk.layers()
        assert sum(layer.by_difference for layer in layers) == wide
        assert sum(layer.winograd is not None for layer in layers) == (0 if amx else wide)
        assert len(trunk.state_dict()) == 2 * len(layers), "transformed weights are not saved"
