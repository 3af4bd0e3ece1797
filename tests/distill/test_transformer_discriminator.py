"""distill.models.transformer_discriminator against the teacher's forward pass; heads; refused settings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_teachers
from d2g.core.errors import SettingError
from d2g.core.seeds import generator
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from distill.config.discriminator import DiscriminatorConfig
from distill.losses.adversarial import discriminator_loss
from distill.models.discriminators import DISCRIMINATORS, check_discriminator
from distill.models.student import student_from_teacher
from distill.models.transformer_discriminator import TransformerDiscriminator, discriminator_from_transformer
from runs import equal


@pytest.fixture(scope="module", params=tiny_teachers.TRANSFORMERS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_teachers.save_transformer(family, tmp_path_factory.mktemp(family))


def inputs(family: str, rows: int = 3, size: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Conditioning]:
    rng, channels = torch.Generator().manual_seed(seed), tiny_teachers.latent_channels(family)
    x, noise = (torch.randn(rows, channels, size, size, generator=rng) for _ in range(2))
    return x, noise, tiny_teachers.random_conditioning(family, rows, seed)


def build(folder: str, **settings: Any) -> TransformerDiscriminator:
    config = DiscriminatorConfig(discriminator="transformer", **{"token_heads": 2, **settings})
    return discriminator_from_transformer(folder, config, generator(3))


def one_step(discriminator: TransformerDiscriminator, family: str) -> None:
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-2)
    x, noise, cond = inputs(family)
    loss = discriminator_loss(discriminator(x, noise, cond), discriminator(x.flip(0), noise, cond))
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize(("size", "t"), [(4, 0), (8, 250)])
def test_features_equal_the_teachers(family: str, folder: str, size: int, t: int) -> None:
    """Reference: outputs of the teacher's blocks, recorded by hooks in diffusers' forward pass."""
    discriminator = build(folder)
    network, own = pretrained.load_model(folder, "transformer"), discriminator.family
    seen: list[Tensor] = []
    for block in (m for m in network.modules() if type(m).__name__ in own.block_types):
        block.register_forward_hook(
            lambda module, args, output: seen.append(output[1] if isinstance(output, tuple) else output)
        )
    x, _, cond = inputs(family, size=size)
    with torch.no_grad():
        own.forward(network, network.config, x, torch.full((3,), t), cond, 4)
        features = own.features(discriminator.transformer, network.config, x, t, cond, 4)
    assert len(features) == len(seen) == 2
    for ours, theirs in zip(features, seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weights = network.state_dict()
    assert equal(weights, discriminator.transformer.state_dict())


def test_a_student_and_a_discriminator_get_the_size_of_the_image(tmp_path: Path) -> None:
    """PixArt-alpha at 1024 px: diffusers' forward pass with size and aspect ratio, 4 pixels per latent."""
    folder = tiny_teachers.save_pixart(tmp_path, sigma=False, sized=True)
    network, outputs = pretrained.load_model(folder, "transformer"), list[Tensor]()
    network.transformer_blocks[-1].register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
    x, noise, cond = inputs("pixart")
    x, noise = x[..., :2], noise[..., :2]

    def predict(t: int, height: float) -> Tensor:
        sizes = {"resolution": torch.tensor([[height, 8.0]] * 3), "aspect_ratio": torch.full((3, 1), 2.0)}
        text = {
            "encoder_hidden_states": cond.tensors["hidden"],
            "encoder_attention_mask": cond.tensors["mask"],
        }
        times = torch.full((3,), t)
        return network(x, **text, timestep=times, added_cond_kwargs=sizes, return_dict=False)[0][:, :4]

    student = student_from_teacher(folder)
    discriminator, head = build(folder), list[Tensor]()
    discriminator.heads["block2"].register_forward_pre_hook(lambda _, args: head.append(args[0]))
    with torch.no_grad():
        expected = student.schedule.x0(predict(999, 16.0), x, student.point)
        torch.testing.assert_close(student(x, cond), expected, rtol=1e-5, atol=1e-5)
        predict(0, 16.0)
        discriminator(x, noise, cond)
        torch.testing.assert_close(head[0].flatten(2).transpose(1, 2), outputs[-1], rtol=1e-5, atol=1e-5)
        predict(0, 32.0)
    assert (outputs[-1] - outputs[-2]).abs().max() > 1e-3, "the size matters"


def test_noise_input_has_no_effect_until_the_first_step(family: str, folder: str) -> None:
    discriminator = build(folder)
    x, noise, cond = inputs(family)
    other = 3 * inputs(family, seed=1)[1]
    assert equal(discriminator(x, noise, cond), discriminator(x, other, cond))
    one_step(discriminator, family)
    after, moved = discriminator(x, noise, cond), discriminator(x, other, cond)
    assert all((after[k] - moved[k]).abs().max() > 1e-4 for k in after)
    without = build(folder, z_conditioning=False, mix_z=0.0)
    one_step(without, family)
    assert equal(without(x, noise, cond), without(x, other, cond))


def test_logits_depend_on_conditioning_and_timestep(family: str, folder: str) -> None:
    discriminator = build(folder)
    x, noise, cond = inputs(family)
    logits = discriminator(x, noise, cond)
    assert equal(logits, discriminator(x, noise, cond, torch.zeros(3, dtype=torch.int64)))
    for other in (
        discriminator(x, noise, cond[[2, 0, 1]]),
        discriminator(x, noise, cond, torch.full((3,), 500)),
    ):
        assert all((logits[k] - other[k]).abs().max() > 1e-5 for k in logits)


def test_heads_and_scales(family: str, folder: str) -> None:
    discriminator = build(folder, token_scales=(1, 2))
    logits, side = discriminator(*inputs(family)), 4 // discriminator.patch
    assert {name: tuple(value.shape) for name, value in logits.items()} == {
        f"block{depth}{pool}": (3, 1, width, width)
        for depth in (1, 2)
        for pool, width in (("", side), ("_pool2", side // 2))
    }
    # The heads are linear: the readout of an average is the average of readouts.
    discriminator.heads["block2_pool2"].load_state_dict(discriminator.heads["block2"].state_dict())
    logits = discriminator(*inputs(family))
    mean = torch.nn.functional.avg_pool2d(logits["block2"], 2)
    torch.testing.assert_close(logits["block2_pool2"], mean, rtol=1e-5, atol=1e-5)
    assert list(build(folder, token_heads=1)(*inputs(family))) == ["block2"]


@pytest.mark.parametrize(
    ("blocks", "heads", "expected"), [(28, 5, [6, 11, 17, 22, 28]), (12, 5, [2, 5, 7, 10, 12])]
)
def test_heads_are_equally_spaced(blocks: int, heads: int, expected: list[int]) -> None:
    from distill.models.feature_networks import equally_spaced

    assert equally_spaced(blocks, heads, "it") == expected


def test_every_trained_parameter_gets_a_gradient(family: str, folder: str) -> None:
    discriminator = build(folder)
    one_step(discriminator, family)
    named = dict(discriminator.named_parameters())
    assert [n for n, p in named.items() if p.requires_grad and p.grad is None] == []
    frozen = {n.split(".")[1] for n, p in named.items() if not p.requires_grad}
    norm = {"norm_out"} if family in ("sd3", "flux") else set()  # the other norms have no parameters
    assert frozen == {name for name in discriminator.family.output_layers if name != "norm_out"} | norm
    alone = build(folder, freeze_backbone=True)
    assert {n.split(".")[0] for n, p in alone.named_parameters() if p.requires_grad} == {"heads", "patch_z"}


def test_generator_seeds_the_heads_only(folder: str) -> None:
    a, b = build(folder).state_dict(), build(folder).state_dict()
    config = DiscriminatorConfig(discriminator="transformer", token_heads=2)
    c = discriminator_from_transformer(folder, config, generator(4)).state_dict()
    assert equal(a, b)
    assert {n for n in a if not torch.equal(a[n], c[n])} == {f"heads.block{d}.weight" for d in (1, 2)}
    meta = DISCRIMINATORS["transformer"].build_on_meta(folder, config)
    assert {n: v.shape for n, v in meta.state_dict().items()} == {n: v.shape for n, v in a.items()}


def test_unsupported_settings_are_refused(family: str, folder: str, teacher: Path) -> None:
    with pytest.raises(
        SettingError, match=r"gan.token_heads is 5, but the network has 2 blocks; expected 1 to 2"
    ):
        build(folder, token_heads=5)
    if family == "sana":  # whose patches are single latents
        assert len(build(folder, token_scales=(1, 4))(*inputs(family))) == 4
    else:
        with pytest.raises(SettingError, match="token_scales has 4, but the network sees 2x2 tokens"):
            build(folder, token_scales=(1, 4))
    with pytest.raises(
        SettingError, match=r"'unet', but the network of .* is a transformer; set gan.disc.*=transf"
    ):
        check_discriminator(folder, DiscriminatorConfig())
    with pytest.raises(SettingError, match=r"'transformer', but .* is a unet; set gan.discriminator=unet"):
        check_discriminator(str(teacher), DiscriminatorConfig(discriminator="transformer"))
