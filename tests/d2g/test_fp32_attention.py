"""Attention in fp32 inside networks in bf16: the same function as diffusers' own, closer to fp32 under
autocast, and only where it computes all that a layer does."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.unets.unet_stable_cascade import SDCascadeAttnBlock

import tiny
from d2g.diffusion import pretrained
from d2g.diffusion.fp32_attention import FP32Attention, use_fp32_attention

TOLERANCES = {torch.float32: {"rtol": 1e-6, "atol": 1e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2}}


def test_it_is_diffusers_own_and_exact_under_autocast(tmp_path: Path) -> None:
    """In fp32 the two processors agree to the bit. Under autocast ours is the closer to fp32."""
    tiny.save_teacher(tmp_path)
    unet = pretrained.load_unet(str(tmp_path)).requires_grad_(False)
    size = unet.config.sample_size
    x = torch.randn(2, unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(2, 5, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))

    def epsilon(bf16: bool) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return unet(x, torch.tensor([3, 700]), hidden).sample.float()

    exact, diffusers_bf16 = epsilon(False), epsilon(True)
    use_fp32_attention(unet)
    processors = list(unet.attn_processors.values())  # type: ignore[operator]
    assert processors and all(isinstance(processor, FP32Attention) for processor in processors)
    assert torch.equal(epsilon(False), exact)
    ours, theirs = (epsilon(True) - exact).norm(), (diffusers_bf16 - exact).norm()
    assert 0 < ours <= 1.1 * theirs < 0.1 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_hides_the_same_tokens(dtype: torch.dtype) -> None:
    """Also for weights in bf16, as FSDP2 gathers them."""
    torch.manual_seed(0)
    layer = Attention(16, cross_attention_dim=12, heads=2, dim_head=8).to(dtype)
    x, context = torch.randn(3, 4, 16, dtype=dtype), torch.randn(3, 5, 12, dtype=dtype)
    bias = torch.zeros(3, 1, 5, dtype=dtype)
    bias[1, :, 3:] = -10_000.0
    with torch.no_grad():
        expected = layer(x, context, attention_mask=bias)
        use_fp32_attention(layer)
        ours = layer(x, context, attention_mask=bias)
        assert not torch.equal(ours, layer(x, context))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected, **TOLERANCES[dtype])


def test_layers_that_do_more_keep_their_own() -> None:
    """UNet2DModel's attention normalizes its input and adds it to the output."""
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    )  # fmt: skip
    use_fp32_attention(unet)
    layers = [layer for layer in unet.modules() if isinstance(layer, Attention)]
    assert layers and all(type(layer.processor) is AttnProcessor2_0 for layer in layers)


def test_features_of_a_cascade_are_tokens() -> None:
    """Stable Cascade's blocks pass features [B, C, h, w] and a context of tokens."""
    torch.manual_seed(0)
    block = SDCascadeAttnBlock(c=8, c_cond=8, nhead=2, self_attn=True)
    x, context = torch.randn(2, 8, 4, 6), torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = block(x, context)
        use_fp32_attention(block)
        assert isinstance(block.attention.processor, FP32Attention)
        torch.testing.assert_close(block(x, context), expected, rtol=1e-6, atol=1e-6)


def test_saved_folders_are_diffusers_own(tmp_path: Path) -> None:
    tiny.save_teacher(tmp_path)
    unet = pretrained.load_unet(str(tmp_path))
    names = set(unet.state_dict())
    use_fp32_attention(unet)
    assert set(unet.state_dict()) == names
    unet.save_pretrained(tmp_path / "saved")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(again.state_dict()[name], unet.state_dict()[name]) for name in names)
