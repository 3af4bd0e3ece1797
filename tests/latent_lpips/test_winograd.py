"""Convolutions by Winograd's minimal filtering against direct ones."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latent_lpips.config import LPIPSConfig, Precision
from latent_lpips.vgg import VGG16, fold_batch_norms
from latent_lpips.winograd import Winograd
from latent_lpips.winograd_2x2 import Winograd2x2
from latent_lpips.winograd_4x4 import Winograd4x4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (4, 40), (1, 2)])
@pytest.mark.parametrize("blocks", [1, 24, 512])
@pytest.mark.parametrize("winograd", [Winograd2x2, Winograd4x4])
def test_equals_direct_convolution(
    winograd: type[Winograd], size: tuple[int, int], blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both directions, whatever the size, and however images and rows are divided."""
    monkeypatch.setattr(winograd, "MAX_BLOCKS", blocks)
    x, y, weight, bias = random(3, 4, *size), random(3, 6, *size), random(6, 4, 3, 3), random(6)
    convolution = winograd(winograd.transform(weight, torch.float64))
    forward = convolution.conv3x3(x, bias)
    torch.testing.assert_close(forward, F.conv2d(x, weight, bias, padding=1))
    transposed = convolution.conv3x3_transposed(y)
    torch.testing.assert_close(transposed, F.conv_transpose2d(y, weight, padding=1))
    for result in (forward, transposed):
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_error_in_fp32_is_that_of_fp32() -> None:
    x, weight = random(1, 128, 16, 16).relu().float(), random(128, 128, 3, 3)
    convolution = Winograd4x4(Winograd4x4.transform(weight, torch.float32))
    exact = F.conv2d(x.double(), weight, padding=1)
    result = convolution.conv3x3(x, torch.zeros(128))
    assert result.dtype == torch.float32 and (result - exact).norm() < 4e-6 * exact.norm()
    exact = F.conv_transpose2d(x.double(), weight, padding=1)
    assert (convolution.conv3x3_transposed(x) - exact).norm() < 4e-6 * exact.norm()


def test_sums_in_fp32_have_a_smaller_error() -> None:
    x, weight = random(1, 64, 16, 16).relu().bfloat16(), random(64, 64, 3, 3)
    exact, transformed = (
        F.conv2d(x.double(), weight, padding=1),
        Winograd2x2.transform(weight, torch.bfloat16),
    )
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        result = Winograd2x2(transformed).conv3x3(x, torch.zeros(64, dtype=dtype))
        assert result.dtype == torch.bfloat16
        errors.append((result.double() - exact).norm() / exact.norm())
    assert errors[0] < 0.9 * errors[1] and errors[0] < 6e-3


def test_error_in_bf16_is_below_one_percent() -> None:
    x, weight = random(1, 64, 16, 16).relu().bfloat16(), random(64, 64, 3, 3)
    exact = F.conv_transpose2d(x.double(), weight, padding=1)
    result = Winograd2x2(Winograd2x2.transform(weight, torch.bfloat16)).conv3x3_transposed(x)
    assert result.dtype == torch.bfloat16
    assert (result.double() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize(
    ("width", "precision", "in_bf16", "in_fp32"),
    [(0.5, "bf16", 5, 0), (0.5, "fp32", 0, 8), (0.25, "bf16", 0, 0), (0.25, "fp32", 0, 5)],
)
def test_wide_convolutions_of_a_cpu_take_it(
    width: float, precision: Precision, in_bf16: int, in_fp32: int, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in bf16 with AMX, and not the first five, in fp32, of a bf16 trunk."""
    capabilities = {"avx512_bf16": True, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    trunk = fold_batch_norms(VGG16(LPIPSConfig(width=width)), precision)
    layers = trunk.layers()
    assert sum(layer.by_difference for layer in layers) == in_bf16
    assert sum(layer.winograd is not None for layer in layers) == in_fp32 + (0 if amx else in_bf16)
    assert len(trunk.state_dict()) == 2 * len(layers), "transformed weights are not saved"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_trunk_of_another_type_takes_direct_ones(
    precision: Precision, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form of transformed weights depends on the type."""
    capabilities = {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    trunk = fold_batch_norms(VGG16(LPIPSConfig(width=0.5)), precision).to(dtype)
    unchanged = dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert any(layer.winograd is not None for layer in trunk.layers()) == unchanged


def test_rounded_matrix_products_do_not_serve_convolutions() -> None:
    """PyTorch's "medium" rounds the inputs of fp32 products to bf16 on some CPUs. Transforms would multiply
    that error to 3 % of a convolution's output."""
    trunk = fold_batch_norms(VGG16(LPIPSConfig(width=0.5)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert all(layer.winograd is None for layer in trunk.layers())
    finally:
        torch.set_float32_matmul_precision(before)
    assert any(layer.winograd is not None for layer in trunk.layers())
