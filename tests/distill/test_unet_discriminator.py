"""distill.models.unet_discriminator against diffusers' forward pass; initialization; layout."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import tiny_teachers
from d2g.core.errors import UserError
from d2g.core.seeds import generator
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.registry import FAMILIES
from distill.config.discriminator import DiscriminatorConfig
from distill.losses.adversarial import discriminator_loss
from distill.models.unet_discriminator import Discriminator, added_parameters, discriminator_from_teacher
from runs import equal

SD: Any = FAMILIES["sd"]
SDXL_FAMILY: Any = FAMILIES["sdxl"]

# diffusers' UNet configs of stabilityai/stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0
SD15: dict[str, Any] = dict(
    sample_size=64,
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    cross_attention_dim=768,
    attention_head_dim=8,
)
SDXL: dict[str, Any] = dict(
    sample_size=128,
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


def inputs(batch: int = 3, size: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Conditioning]:
    rng = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(batch, 4, size, size, generator=rng) for _ in range(2))
    return x, noise, Conditioning.from_text(torch.randn(batch, 12, 16, generator=rng))


def build(teacher: Path, **settings: Any) -> Discriminator:
    return discriminator_from_teacher(str(teacher), DiscriminatorConfig(**settings), generator(3))


def count_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def one_step(discriminator: Discriminator) -> None:
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-2)
    x, noise, text = inputs()
    loss = discriminator_loss(discriminator(x, noise, text), discriminator(x.flip(0), noise, text))
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize(("size", "timestep"), [(4, 0), (5, 0), (8, 250)])
def test_trunk_equals_diffusers_forward(teacher: Path, size: int, timestep: int) -> None:
    """The input of the last head, passed through the UNet's output layers, is diffusers' output."""
    discriminator = build(teacher, timestep=timestep)
    features: list[Tensor] = []
    discriminator.heads["1_after"].register_forward_pre_hook(lambda module, args: features.append(args[0]))
    x, noise, text = inputs(size=size)
    with torch.no_grad():
        discriminator(x, noise, text)
        unet = discriminator.unet
        output = unet.conv_out(unet.conv_act(unet.conv_norm_out(features[0])))
        expected = pretrained.load_unet(str(teacher))(x, timestep, text.tensors["hidden"]).sample
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_output_head_reads_the_teachers_output(teacher: Path) -> None:
    discriminator = build(teacher, output_head=True)
    x, noise, text = inputs()
    logits = discriminator(x, noise, text)["output"]
    output = pretrained.load_unet(str(teacher))(x, 0, text.tensors["hidden"]).sample
    torch.testing.assert_close(logits, discriminator.heads["output"](output), rtol=1e-5, atol=1e-5)
    one_step(discriminator)
    assert all(p.grad is not None for p in discriminator.parameters())


def test_noise_input_has_no_effect_until_the_first_step(teacher: Path) -> None:
    discriminator = build(teacher)
    x, noise, text = inputs()
    other = 3 * inputs(seed=1)[1]
    assert equal(discriminator(x, noise, text), discriminator(x, other, text))
    one_step(discriminator)
    logits, other_logits = discriminator(x, noise, text), discriminator(x, other, text)
    assert all((logits[k] - other_logits[k]).abs().max() > 1e-4 for k in logits)


def test_resized_inputs_enter_through_zero_convolutions(teacher: Path) -> None:
    discriminator, without = build(teacher), build(teacher, multi_scale_input=False)
    x, noise, text = inputs()
    assert equal(discriminator(x, noise, text), without(x, noise, text))
    one_step(discriminator)
    after = discriminator(x, noise, text)
    assert discriminator.conv_scale is not None and len(discriminator.conv_scale) == 1
    with torch.no_grad():
        discriminator.conv_scale[0].weight.zero_()
        discriminator.conv_scale[0].bias.zero_()
    assert not equal(discriminator(x, noise, text), after)


def test_logits_depend_on_the_text(teacher: Path) -> None:
    discriminator = build(teacher)
    x, noise, text = inputs()
    a, b = discriminator(x, noise, text), discriminator(x, noise, text[[2, 1, 0]])
    assert all((a[k] - b[k]).abs().max() > 1e-5 for k in a if k != "0_skip")


def test_every_trained_parameter_gets_a_gradient(teacher: Path) -> None:
    discriminator = build(teacher)
    one_step(discriminator)
    without_gradient = [n for n, p in discriminator.named_parameters() if p.requires_grad and p.grad is None]
    frozen = {n for n, p in discriminator.named_parameters() if not p.requires_grad}
    assert without_gradient == []
    assert frozen == {f"unet.{m}.{p}" for m in ("conv_norm_out", "conv_out") for p in ("weight", "bias")}


def test_head_positions_and_shapes(teacher: Path) -> None:
    logits = build(teacher)(*inputs())
    assert {k: tuple(v.shape) for k, v in logits.items()} == {
        **{f"0_{place}": (3, 1, 2, 2) for place in ("before", "skip", "after")},
        **{f"1_{place}": (3, 1, 4, 4) for place in ("before", "skip", "after")},
    }


def test_disabled_options(teacher: Path) -> None:
    discriminator = build(
        teacher, z_conditioning=False, mix_z=0.0, multi_scale_input=False, multi_scale_output=False
    )
    assert (
        discriminator.conv_z is None
        and discriminator.conv_scale is None
        and list(discriminator.heads) == ["1_after"]
    )
    x, noise, text = inputs()
    assert equal(discriminator(x, noise, text), discriminator(x, noise * 0, text)) and discriminator(
        x, noise, text
    )["1_after"].shape == (3, 1, 4, 4)
    one_step(discriminator)
    assert equal(discriminator(x, noise, text), discriminator(x, noise * 0, text))
    assert added_parameters(discriminator) == 8 + 1
    single_head = build(teacher, multi_scale_output=False)
    assert (
        list(single_head.heads) == ["1_after"]
        and single_head.conv_z is not None
        and single_head.conv_scale is not None
    )


def test_generator_seeds_the_heads_and_other_weights_are_the_teachers(teacher: Path) -> None:
    a, b = build(teacher), build(teacher)
    c = discriminator_from_teacher(str(teacher), DiscriminatorConfig(), generator(4))
    assert equal(a.state_dict(), b.state_dict())
    different = {
        name for name in a.state_dict() if not torch.equal(a.state_dict()[name], c.state_dict()[name])
    }
    assert different == {f"heads.{name}.weight" for name in a.heads}
    original = pretrained.load_unet(str(teacher)).state_dict()
    upsamplers = {
        f"up_blocks.{name.replace('.', '.upsamplers.', 1)}": value
        for name, value in a.upsamplers.state_dict().items()
    }
    assert upsamplers and equal(original, a.unet.state_dict() | upsamplers)


def test_layout_at_sd15_size() -> None:
    """method.md "Discriminator architecture": 12 heads, their widths, and the budget of Table A1 (859.6M
    against 859.5M).
    """
    with torch.device("meta"):
        discriminator = Discriminator(pretrained.new_unet(**SD15), SD, DiscriminatorConfig())
        x, text = torch.empty(1, 4, 64, 64), Conditioning.from_text(torch.empty(1, 77, 768))
        logits = discriminator(x, x, text)
    widths = {name: head.in_channels for name, head in discriminator.heads.items()}  # type: ignore[union-attr]
    assert [widths[f"{s}_before"] for s in range(4)] == [1280, 1280, 1280, 640]
    assert [widths[f"{s}_skip"] for s in range(4)] == [1280, 1280, 640, 320]
    assert [widths[f"{s}_after"] for s in range(4)] == [1280, 1280, 640, 320]
    assert len(widths) == 12
    assert {k: v.shape[2:] for k, v in logits.items()} == {
        f"{s}_{place}": (8 << s, 8 << s) for s in range(4) for place in ("before", "skip", "after")
    }
    assert count_parameters(discriminator) - added_parameters(discriminator) == 859_520_964
    # conv_z 11,840; resized inputs 11,840 + 23,680 + 47,360; heads 11,520 weights and 12 biases
    assert added_parameters(discriminator) == 11_840 + 82_880 + 11_532 == 106_252
    assert 0.029e6 <= added_parameters(discriminator) <= 0.129e6


def test_layout_at_sdxl_size() -> None:
    with torch.device("meta"):
        discriminator = Discriminator(pretrained.new_unet(**SDXL), SDXL_FAMILY, DiscriminatorConfig())
        x = torch.empty(1, 4, 128, 128)
        logits = discriminator(x, x, Conditioning.from_text(torch.empty(1, 77, 2048), torch.empty(1, 1280)))
    widths = {name: head.in_channels for name, head in discriminator.heads.items()}  # type: ignore[union-attr]
    assert [widths[f"{s}_before"] for s in range(3)] == [1280, 1280, 640]
    assert [widths[f"{s}_skip"] for s in range(3)] == [1280, 640, 320]
    assert [widths[f"{s}_after"] for s in range(3)] == [1280, 640, 320]
    assert len(logits) == len(widths) == 9
    assert count_parameters(discriminator) - added_parameters(discriminator) == 2_567_463_684


def test_sdxl_discriminator_uses_pooled_text_and_image_size(tmp_path: Path) -> None:
    """The trunk equals diffusers' forward pass with added conditions, and all heads depend on them."""
    tiny_teachers.save_sdxl(tmp_path)
    discriminator = build(tmp_path)
    rng = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(2, 4, 4, 4, generator=rng) for _ in range(2))
    hidden, pooled = torch.randn(2, 12, 40, generator=rng), torch.randn(2, 24, generator=rng)
    text = Conditioning.from_text(hidden, pooled)
    sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]] * 2)
    features: list[Tensor] = []
    discriminator.heads["1_after"].register_forward_pre_hook(lambda module, args: features.append(args[0]))
    with torch.no_grad():
        plain = discriminator(x, noise, text)
        unet = discriminator.unet
        output = unet.conv_out(unet.conv_act(unet.conv_norm_out(features[0])))
        added = {"text_embeds": pooled, "time_ids": sizes}
        expected = pretrained.load_unet(str(tmp_path))(x, 0, hidden, added_cond_kwargs=added).sample
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        assert equal(plain, discriminator(x, noise, Conditioning.from_text(hidden, pooled, sizes)))
        others = [
            Conditioning.from_text(hidden, -pooled),
            Conditioning.from_text(hidden, pooled, sizes + 400),
        ]
        for other in others:
            changed = discriminator(x, noise, other)
            assert all((plain[k] - changed[k]).abs().max() > 1e-6 for k in plain)
    with pytest.raises(AssertionError, match="pooled"):
        discriminator(x, noise, Conditioning.from_text(hidden))


OTHER_UNETS: dict[str, dict[str, Any]] = {
    "sd2": dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=True,
        attention_head_dim=(2, 4),
        layers_per_block=2,
    ),
    "only cross attention": dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        only_cross_attention=True,
        center_input_sample=True,
    ),
    "layers by block": dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=(1, 2),
        transformer_layers_per_block=(2, 1),
    ),
    "simple cross attention": dict(
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
    ),
    "no middle": dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    ),
}


@pytest.mark.parametrize("name", OTHER_UNETS)
def test_other_unet_layouts(name: str) -> None:
    """Reference: diffusers' forward pass."""
    torch.manual_seed(0)
    settings = dict(
        layers_per_block=1, norm_num_groups=4, attention_head_dim=2, cross_attention_dim=16, sample_size=4
    )
    unet = pretrained.new_unet(**{**settings, "block_out_channels": (8, 16), **OTHER_UNETS[name]}).eval()
    x, noise, text = inputs()
    with torch.no_grad():
        expected = unet(x, 7, text.tensors["hidden"]).sample
    discriminator = Discriminator(unet, SD, DiscriminatorConfig(timestep=7))
    features: list[Tensor] = []
    discriminator.heads["1_after"].register_forward_pre_hook(lambda module, args: features.append(args[0]))
    logits = discriminator(x, noise, text)
    assert len(logits) == 6
    output = unet.conv_out(unet.conv_act(unet.conv_norm_out(features[0])))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.stack([v.mean() for v in logits.values()]).sum().backward()
    without_gradient = [n for n, p in discriminator.named_parameters() if p.requires_grad and p.grad is None]
    assert without_gradient == []


def test_each_row_has_its_own_timestep(teacher: Path) -> None:
    discriminator = build(teacher, timestep=5)
    x, noise, text = inputs()
    constant = discriminator(x, noise, text)
    assert equal(constant, discriminator(x, noise, text, torch.full((3,), 5)))
    mixed = discriminator(x, noise, text, torch.tensor([5, 900, 5]))
    for name in constant:
        same = (mixed[name] - constant[name]).abs().amax((1, 2, 3)) < 1e-6
        assert same.tolist() == [True, False, True], name


def test_a_frozen_backbone_trains_heads_and_new_convolutions_only(teacher: Path) -> None:
    discriminator = build(teacher, freeze_backbone=True)
    before = {k: v.clone() for k, v in discriminator.state_dict().items()}
    one_step(discriminator)
    changed = {k for k, v in discriminator.state_dict().items() if not torch.equal(v, before[k])}
    assert {name.split(".")[0] for name in changed} == {"heads", "conv_z", "conv_scale"}
    discriminator.requires_grad_(False)
    assert not any(p.requires_grad for p in discriminator.parameters())
    discriminator.requires_grad_(True)
    trained = {n for n, p in discriminator.named_parameters() if p.requires_grad}
    assert trained == changed and not any(n.startswith(("unet.", "upsamplers.")) for n in trained)
    unfrozen = build(teacher).requires_grad_(False).requires_grad_(True)
    frozen = {n for n, p in unfrozen.named_parameters() if not p.requires_grad}
    assert frozen == {f"unet.{m}.{p}" for m in ("conv_norm_out", "conv_out") for p in ("weight", "bias")}


def small(**settings: Any) -> Any:
    sizes = dict(
        sample_size=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=2
    )
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    return pretrained.new_unet(**{**sizes, **blocks, "cross_attention_dim": 16, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"down_block_types": ("DownBlock2D", "KDownBlock2D")},
            r"U-Net has a KDownBlock2D; supported are DownBlock2D, UpBlock2D, CrossAttn",
        ),
        ({"num_class_embeds": 3}, "U-Net has num_class_embeds 3; supported: None"),
        (
            {"addition_embed_type": "text_image", "cross_attention_dim": 16},
            "addition_embed_type 'text_image'; supported: None, 'text', 'text_time'",
        ),
    ],
)
def test_unsupported_unets_are_refused(settings: dict[str, Any], message: str) -> None:
    unet = small(**settings)
    with pytest.raises(UserError, match=message):
        Discriminator(unet, SD, DiscriminatorConfig())


# Networks without text: classes, no conditions, EDM preconditioning.

WITHOUT_TEXT = ("unet2d", "edm", "ldm")


@pytest.fixture(scope="module", params=WITHOUT_TEXT)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(kind)
    tiny_teachers.save_kind(kind, folder)
    return folder


def kind_step(discriminator: Discriminator, kind: str) -> None:
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-2)
    x, noise, cond = tiny_teachers.random_inputs(kind, 3)
    loss = discriminator_loss(discriminator(x, noise, cond), discriminator(x.flip(0), noise, cond))
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("timestep", [0, 250])
def test_trunk_of_a_network_without_text_equals_diffusers_forward(
    kind: str, folder: Path, timestep: int
) -> None:
    """Encoder features and output of diffusers' network; for EDM at c_in x and c_noise of diffusers' own
    scheduler, whose 1000 noise levels go from sigma_max down to sigma_min."""
    discriminator = build(folder, timestep=timestep)
    last: list[Tensor] = []
    skips: dict[str, Tensor] = {}
    heads: Any = discriminator.heads
    heads["1_after"].register_forward_pre_hook(lambda module, args: last.append(args[0]))
    for name in ("0_skip", "1_skip"):
        heads[name].register_forward_pre_hook(lambda module, args, n=name: skips.update({n: args[0]}))
    x, noise, cond = tiny_teachers.random_inputs(kind, 3)
    labels = cond.tensors.get("class_labels")
    inputs, time = x, torch.full((3,), timestep)
    if kind == "edm":
        scheduler = diffusers.EDMEulerScheduler()
        scheduler.set_timesteps(1000)
        sigma = scheduler.sigmas[999 - timestep]
        inputs, time = scheduler.precondition_inputs(x, sigma), (sigma.log() / 4).expand(3)
    original, encoder = pretrained.load_unet(str(folder)), list[Tensor]()
    for block in original.down_blocks:
        block.register_forward_hook(lambda module, args, output: encoder.extend(output[1]))
    with torch.no_grad():
        discriminator(x, noise, cond)
        unet = discriminator.unet
        output = unet.conv_out(unet.conv_act(unet.conv_norm_out(last[0])))
        expected = original(inputs, time, class_labels=labels).sample
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    # A head reads the skip of the last layer of its scale.
    for name, feature in (("0_skip", encoder[-1]), ("1_skip", encoder[0])):
        torch.testing.assert_close(skips[name], feature, rtol=1e-5, atol=1e-5)


def test_without_text_the_noise_has_no_effect_until_the_first_step(kind: str, folder: Path) -> None:
    discriminator = build(folder)
    x, noise, cond = tiny_teachers.random_inputs(kind, 3)
    assert equal(discriminator(x, noise, cond), discriminator(x, -2 * noise, cond))
    kind_step(discriminator, kind)
    after, moved = discriminator(x, noise, cond), discriminator(x, -2 * noise, cond)
    assert len(after) == 6 and all((after[k] - moved[k]).abs().max() > 1e-4 for k in after)
    unused = [n for n, p in discriminator.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


def test_class_projections_start_at_zero_and_learn(kind: str, folder: Path) -> None:
    """Closed form: a head's logits grow by <P e(c), features>; without classes there is no projection."""
    discriminator = build(folder, output_head=True)
    projections: Any = discriminator.projections
    x, noise, cond = tiny_teachers.random_inputs(kind, 3)
    before = discriminator(x, noise, cond)
    if kind == "ldm":
        assert len(projections) == 0
        return
    assert list(projections) == list(discriminator.heads) and len(projections) == 7
    assert not any(p.any() for p in projections.parameters())
    features: dict[str, Tensor] = {}
    for name, head in discriminator.heads.items():
        head.register_forward_pre_hook(lambda module, args, n=name: features.update({n: args[0]}))
    with torch.no_grad():
        for p in projections.parameters():
            p.normal_(generator=generator(1))
        after = discriminator(x, noise, cond)
    table = pretrained.load_unet(str(folder)).class_embedding.weight
    for name, value in after.items():
        direction = table[cond.tensors["class_labels"]] @ projections[name].weight.T
        expected = before[name] + (direction[:, :, None, None] * features[name]).sum(1, keepdim=True)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    learned = build(folder)
    kind_step(learned, kind)
    assert all(p.any() for p in learned.projections.parameters())


def test_logits_depend_on_the_class(folder: Path, kind: str) -> None:
    discriminator = build(folder)
    x, noise, cond = tiny_teachers.random_inputs(kind, 3)
    a, b = discriminator(x, noise, cond), discriminator(x, noise, cond[[2, 0, 1]])
    assert all(((a[k] - b[k]).abs().max() > 1e-5) == (kind != "ldm") for k in a if k != "1_skip")


def test_trunk_of_a_text_network_of_an_edm_equals_diffusers_forward(tmp_path: Path) -> None:
    """The network sees c_in x and c_noise at sigma_min."""
    tiny_teachers.save_sdxl(tmp_path, scheduler=diffusers.EDMEulerScheduler, **tiny_teachers.EDM)
    discriminator, last = build(tmp_path), list[Tensor]()
    heads: Any = discriminator.heads
    heads["1_after"].register_forward_pre_hook(lambda module, args: last.append(args[0]))
    x, noise, _ = inputs()
    hidden, pooled = torch.randn(3, 12, 40), torch.randn(3, 24)
    scheduler, sigma = diffusers.EDMEulerScheduler(), torch.tensor(0.002)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]] * 3)}
    with torch.no_grad():
        discriminator(x, noise, Conditioning.from_text(hidden, pooled))
        unet = discriminator.unet
        output = unet.conv_out(unet.conv_act(unet.conv_norm_out(last[0])))
        original = pretrained.load_unet(str(tmp_path))
        scaled, time = scheduler.precondition_inputs(x, sigma), sigma.log() / 4
        expected = original(scaled, time, hidden, added_cond_kwargs=added).sample
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_fourier_features_of_time_are_refused(tmp_path: Path) -> None:
    """They take the logarithm of the timestep."""
    unet = tiny_teachers.unet2d(time_embedding_type="fourier")
    with pytest.raises(UserError, match=r"time_embedding_type 'fourier'; supported: 'positional', 'learned'"):
        Discriminator(unet, FAMILIES["unet2d"], DiscriminatorConfig())  # type: ignore[arg-type]
