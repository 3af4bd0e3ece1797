"""Generators with styles as students: layers against their formulas, counts of parameters, truncation,
progressive growing, the upsampler, runs that resume, and what is refused.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import tiny_teachers
from d2g.core.config import override
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.pipelines import open_pipeline
from d2g.diffusion.teacher_sampler import SolverSettings
from distill.config.export import ExportConfig
from distill.config.presets import STYLE_RECIPES
from distill.config.run import DistillConfig
from distill.config.student import GeneratorConfig, StudentConfig
from distill.exploration import mixed_latents, open_student, save_edits, save_mix
from distill.export.export import export, export_student
from distill.models.attention_layers import SelfAttention, distance_logits
from distill.models.generator_student import GeneratorStudent
from distill.models.students import STUDENTS, build_student, check_student
from distill.models.style_generator import block_sizes
from distill.models.style_layers import (
    LAYER_SCALE,
    FourierInput,
    ModulatedConv,
    SecondOrderStyle,
    Style,
    SynthesisConv,
    initialize,
    upsample,
)
from distill.planning.flops import flop_per_image
from distill.planning.memory import predict
from distill.planning.parameters import student_parameters
from distill.sampling import OneStepSampler, load_student, with_prior, with_psi
from distill.saved_samples import save_both_samples
from distill.training.train import train
from eval.runner.samplers import SamplingRequest, student_source
from jobs import d2g, d2g_ranks, distill_arguments, distill_config, make_pairs, succeed
from runs import assert_resumes_exactly, losses

SIZES = GeneratorConfig(
    channel_base=64,
    channel_max=16,
    residual_blocks=2,
    z_dim=8,
    w_dim=8,
    kernels=2,
    attention_sizes=(4, 8),
    text_layers=1,
    factor=2,
)
KINDS = ("stylegan-t", "gigagan", "gigagan-upsampler")
RUN_KINDS = (*KINDS[:2], pytest.param(KINDS[2], marks=pytest.mark.long))
RUN = (
    *("regression.losses=[]", "gan.z_conditioning=false", "gan.mix_z=0", "gan.r1_interval=2"),
    *("student.generator.channel_base=64", "student.generator.channel_max=16"),
    *("student.generator.residual_blocks=1", "student.generator.z_dim=8", "student.generator.w_dim=8"),
)


def value(scalar: Tensor) -> float:
    return scalar.detach().item()


def drawn(module: nn.Module, seed: int = 0) -> Any:
    initialize(module, torch.Generator().manual_seed(seed))
    return module


def build(teacher: str, kind: str, **sizes: Any) -> GeneratorStudent:
    config = StudentConfig(kind=kind, generator=replace(SIZES, **sizes))  # type: ignore[arg-type]
    student = build_student(teacher, -1, config)
    assert isinstance(student, GeneratorStudent)
    return student


def conditioning(teacher: str, student: GeneratorStudent, rows: int = 2) -> Any:
    config = student.conditioning_config
    cond = student.family.fake_conditioning(open_pipeline(teacher), config, rows)
    names = {"hidden", "pooled"}
    cond = replace(
        cond, tensors={n: torch.randn_like(t) if n in names else t for n, t in cond.tensors.items()}
    )
    return cond if student.prior_shape is None else cond.with_prior(torch.randn(rows, *student.prior_shape))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    root = tmp_path_factory.mktemp("teachers")
    saved = {kind: tiny_teachers.save_kind(kind, root / kind) for kind in ("sd", "pixart", "unet2d", "ldm")}
    return {**saved, "sdxl": tiny_teachers.save_sdxl(root / "sdxl")}


@pytest.fixture(scope="module")
def pairs(teachers: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(Path(teachers["sd"]), tmp_path_factory.mktemp("pairs"))


# Layers.


def test_second_order_styles() -> None:
    """StyleGAN-T, eq. 1; the mean style of the layer is 1."""
    style = drawn(SecondOrderStyle(6, 4))
    w = torch.randn(3, 6)
    s1, s2, s3 = F.linear(w, style.affine.weight / 6**0.5, style.affine.bias).split(4, dim=1)
    torch.testing.assert_close(style(w), s1 * s2 + s3)
    assert torch.equal(style(torch.zeros(1, 6)), torch.ones(1, 4))


@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_convolutions(demodulate: bool) -> None:
    """StyleGAN2, eqs. 1 and 3, with a kernel for each row; and GigaGAN's eq. 2 with a bank of kernels."""
    x, style = torch.randn(2, 5, 6, 6), torch.randn(2, 5)

    def expected(kernels: list[Tensor]) -> Tensor:
        rows = []
        for row, kernel in enumerate(kernels):
            own = kernel * style[row][None, :, None, None]
            if demodulate:
                own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
            rows.append(F.conv2d(x[row : row + 1], own, padding=1))
        return torch.cat(rows)

    conv = drawn(ModulatedConv(5, 7, 3, demodulate))
    torch.testing.assert_close(conv(x, style), expected([conv.weight / 45**0.5] * 2), rtol=1e-4, atol=1e-5)
    bank = drawn(ModulatedConv(5, 7, 3, demodulate, kernels=3))
    selection = torch.randn(2, 3).softmax(1)
    mixed = [sum(p * k for p, k in zip(row, bank.weight / 45**0.5, strict=True)) for row in selection]
    torch.testing.assert_close(bank(x, style, selection), expected(mixed), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def test_demodulated_outputs_have_unit_variance() -> None:
    conv = drawn(ModulatedConv(64, 64, 3))
    y = conv(torch.randn(4, 64, 16, 16), 10 * torch.rand(4, 64))
    assert value(y[:, :, 1:-1, 1:-1].std()) == pytest.approx(1, abs=0.05)


def test_residual_convolutions_start_as_nothing() -> None:
    """Layer scale 1e-5 (StyleGAN-T, section 3.1), and a contribution whose scale is trained."""
    conv = drawn(SynthesisConv(16, 16, 6, residual=True))
    x, w, spatial = torch.randn(2, 16, 4, 4), torch.randn(2, 6), torch.randn(2, 1, 4, 4)
    assert torch.all(conv.layer_scale == LAYER_SCALE) and value((conv(x, w, spatial) - x).abs().max()) < 1e-3
    with torch.no_grad():
        conv.layer_scale.fill_(1.0)
        conv.noise_strength.fill_(0.5)
    y = conv.conv(F.group_norm(x, 16), conv.style(w)) + 0.5 * spatial
    torch.testing.assert_close(conv(x, w, spatial), x + F.leaky_relu(y, 0.2) * math.sqrt(2))


def test_fourier_input_moves_with_its_grid() -> None:
    """A shift by one cell gives the neighbor's features, and frequencies lie below the grid's limit."""
    layer = drawn(FourierInput(32, (4, 6)))
    assert value(layer.frequencies.norm(dim=1).max()) <= 2
    still = layer.features()
    torch.testing.assert_close(layer.features((1 / 4, 0))[:, :-1], still[:, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.features((0, 1 / 6))[:, :, :-1], still[:, :, 1:], rtol=0, atol=1e-5)
    assert value(still.square().mean()) == pytest.approx(1, abs=0.2) and layer(3).shape == (3, 32, 4, 6)


def test_attention_by_distance() -> None:
    """Logits are squared distances, about of unit variance; queries are the keys."""
    q = torch.randn(4, 64, 32)
    logits = distance_logits(q)
    torch.testing.assert_close(logits, -torch.cdist(q, q).square() / math.sqrt(8 * 32), rtol=1e-3, atol=1e-3)
    apart = logits[:, ~torch.eye(64, dtype=torch.bool)]
    assert value(apart.std()) == pytest.approx(1, abs=0.2)
    layer, x = drawn(SelfAttention(16)), torch.randn(2, 5, 16)
    q, v = layer.query_key(x), layer.value(x)
    torch.testing.assert_close(layer(x), layer.out(distance_logits(q).softmax(-1) @ v))


def test_blocks_halve_down_to_four() -> None:
    assert block_sizes((64, 64)) == [(4, 4), (8, 8), (16, 16), (32, 32), (64, 64)]
    assert block_sizes((12, 20)) == [(6, 10), (12, 20)] and block_sizes((3, 3)) == [(3, 3)]


# Generators.


@pytest.mark.parametrize(("name", "millions"), [("stylegan-t", 75.0), ("stylegan-t-1b", 1020.0)])
def test_parameter_counts_are_those_of_table_4(name: str, millions: float) -> None:
    recipe = STYLE_RECIPES[name]
    counts = student_parameters(recipe["gan"], recipe.model)
    assert counts is not None and counts["total"] == pytest.approx(millions, rel=0.02)
    assert counts["total"] == pytest.approx(sum(v for k, v in counts.items() if k != "total"), abs=0.01)
    # Every convolution and every style by hand: 19 or 24 layers of 3x3, each with an affine map of [w, c].
    sizes = recipe["gan"].student.generator
    widths = [min(sizes.channel_base // 2**n, sizes.channel_max) for n in range(2, 7)]
    kernels = sum(sizes.residual_blocks * c * c * 9 for c in widths)
    kernels += sum(a * b * 9 for a, b in pairwise(widths)) + sum(4 * c for c in widths)
    inputs = [c for c in widths for _ in range(sizes.residual_blocks + 1)] + widths[:-1]
    assert counts["convolutions"] == pytest.approx(kernels / 1e6, abs=1e-3)
    assert counts["styles"] == pytest.approx(sum(inputs) * 3 * (sizes.w_dim + 768 + 1) / 1e6, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher", ["sd", "sdxl", "pixart", "unet2d", "ldm"])
def test_every_kind_draws_for_every_condition(kind: str, teacher: str, teachers: Mapping[str, str]) -> None:
    """Text, pooled text, text with a mask, classes, no condition; all weights have a gradient."""
    student = build(teachers[teacher], kind)
    z = noise(0, range(2), student.noise_shape)
    latents = student(z, conditioning(teachers[teacher], student))
    assert latents.shape == (2, *student.latent_shape) and latents.isfinite().all()
    latents.square().sum().backward()
    assert [n for n, p in student.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_draws_with_weights_in_bf16(kind: str, teachers: Mapping[str, str]) -> None:
    """FSDP2 gathers them so, and evaluations with precision=bf16 do; buffers may stay in fp32."""
    student = build(teachers["sd"], kind)
    inputs = torch.randn(2, *student.noise_shape), conditioning(teachers["sd"], student)
    with torch.no_grad():
        exact = student(*inputs)
        for parameter in student.network.parameters():
            parameter.data = parameter.data.bfloat16()
        half = student(*inputs)
        student.network.to(torch.bfloat16)
        buffers_too = student(*inputs)
    for latents in (half, buffers_too):
        assert latents.dtype == torch.float32
        assert (latents - exact).square().mean().sqrt() < 0.05 * exact.std()


def test_text_bypasses_the_mapping_and_spatial_noise_is_local(teachers: Mapping[str, str]) -> None:
    student = build(teachers["sd"], "stylegan-t")
    generator: Any = student.network
    z = noise(0, range(2), student.noise_shape)
    cond = conditioning(teachers["sd"], student)
    before = student(z, cond)
    # Spatial noise has no effect until its strength is trained.
    other = z.clone()
    other[:, generator.z_dim :] = 0
    assert torch.equal(student(other, cond), before)
    with torch.no_grad():
        generator.blocks[0].convs[0].noise_strength.fill_(1e5)
    assert not torch.equal(student(other, cond), student(z, cond))
    # Text changes the image at one z, and f(z) stays.
    assert not torch.allclose(student(z, cond.map(lambda t: t.flip(0))), before)


def test_a_generator_without_the_changes_of_section_3_1(teachers: Mapping[str, str]) -> None:
    """Text through the mapping network, affine styles, plain convolutions: each by itself, and together."""
    sizes = {"residual": False, "second_order": False, "text_bypass": False}
    width = 8 + build(teachers["sd"], "stylegan-t").network.condition_width  # type: ignore[operator]
    for off in (None, *sizes):
        network: Any = build(teachers["sd"], "stylegan-t", **({off: False} if off else {})).network
        conv = network.blocks[0].convs[0]
        assert (conv.layer_scale is None) == (conv.norm is None) == (off == "residual")
        assert isinstance(conv.style, Style if off == "second_order" else SecondOrderStyle)
        read = {"f": network.mapping.layers[0].weight.shape[1], "style": conv.style.affine.weight.shape[1]}
        assert read == ({"f": width, "style": 8} if off == "text_bypass" else {"f": 8, "style": width})
    student = build(teachers["sd"], "stylegan-t", **sizes)
    generator: Any = student.network
    z, cond = noise(0, range(2), student.noise_shape), conditioning(teachers["sd"], student)
    c = generator.embed(cond.tensors["hidden"].mean(1), z[:, :8, 0, 0])
    (style, *_) = student.styles(z, cond)
    torch.testing.assert_close(style.w, generator.mapping(torch.cat([z[:, :8, 0, 0], c], dim=1)))
    # A convolution of a block, by hand: x + layer scale and GroupNorm are gone.
    conv, spatial = generator.blocks[0].convs[0], torch.randn(2, 1, 4, 4)
    x = torch.randn(2, conv.conv.weight.shape[1], 4, 4)
    affine = F.linear(style.w, conv.style.affine.weight / 8**0.5, conv.style.affine.bias)
    expected = F.leaky_relu(conv.conv(x, affine), 0.2) * math.sqrt(2)
    torch.testing.assert_close(conv(x, style.w, spatial), expected)


def test_truncation(teachers: Mapping[str, str]) -> None:
    """psi = 1 changes nothing; psi = 0 forgets z but not the text; between, w moves on a line."""
    student = build(teachers["sd"], "stylegan-t")
    generator: Any = student.network
    generator.mapping.mean.copy_(torch.randn(8))
    z, cond = noise(0, range(2), student.noise_shape), conditioning(teachers["sd"], student)
    assert torch.equal(student(z, cond, None, 1.0), student(z, cond))
    same_text = cond.map(lambda t: t[:1].expand_as(t))
    first, second = student(z, same_text, None, 0.0)
    torch.testing.assert_close(first, second)
    assert not torch.allclose(*student(z, cond, None, 0.0))
    x = z[:, :8, 0, 0]
    f, mean = generator.mapping(x), generator.mapping.mean
    torch.testing.assert_close(generator.map_truncated(x, 0.3), mean + 0.3 * (f - mean))


def one_step(teacher: str, kind: str) -> OneStepSampler:
    """A student whose spatial noise shows."""
    student = build(teacher, kind)
    for name, parameter in student.named_parameters():
        if name.endswith("noise_strength"):
            parameter.detach().fill_(0.5)
    vae, device = pretrained.load_vae(teacher), torch.device("cpu")
    return OneStepSampler(student.eval(), pretrained.load_conditioner(teacher), vae, device)


@pytest.mark.parametrize("kind", ["stylegan-t", "gigagan"])
def test_styles_are_mixed_by_block(kind: str) -> None:
    """All blocks of one input give its image. Each block of a mix has style, noise and text of its input."""
    one = one_step("miniature", kind)
    student: Any = one.student
    network = student.network
    noises, prompts = noise(0, range(2), student.noise_shape), ["a red cube", "a blue ball"]
    blocks = torch.tensor([[0, 0], [1, 1], [0, 1], [1, 0]])
    mixed = mixed_latents(one, noises, prompts, blocks)
    torch.testing.assert_close(mixed[:2], one.latents(noises, prompts))
    assert torch.equal(mixed, mixed_latents(one, noises, prompts, blocks))
    assert all(not torch.allclose(mixed[a], mixed[b], atol=1e-2) for a in range(4) for b in range(a))
    # The coarse block by the first input, the fine one by the second.
    assert network.block_sizes == [(4, 4), (8, 8)]
    cond = one.conditioner.encode(prompts)
    styles = [student.styles(noises[[row]], cond[[row]]) for row in (0, 1)]
    coarse, fine = styles[0][0], styles[1][1]
    x, image = network.blocks[0](network.input(1), None, coarse.w, coarse.noise, coarse.tokens, coarse.mask)
    _, image = network.blocks[1](x, image, fine.w, fine.noise, fine.tokens, fine.mask)
    torch.testing.assert_close(mixed[2:3], image)
    # Truncation is that of the inputs.
    network.mapping.mean.copy_(torch.randn(8))
    truncated = replace(one, psi=0.4)
    torch.testing.assert_close(
        mixed_latents(truncated, noises, prompts, blocks[:2]), truncated.latents(noises, prompts)
    )


def test_a_grid_of_mixed_styles(tmp_path: Path) -> None:
    """A row per other point, from the first point alone to the other one alone."""
    one = one_step("miniature", "stylegan-t")
    prompts = ["a red cube", "a blue ball", "a cat"]
    facts = save_mix("runs/small", one, prompts[:1], [3, 4, 5], [], tmp_path / "seeds")
    assert facts["images"] == 6 and facts["block_sides"] == [4, 8]

    def files(folder: str, numbers: Sequence[int]) -> list[Any]:
        return [np.asarray(Image.open(tmp_path / folder / f"{n:05d}.png")).astype(int) for n in numbers]

    def drawn_alone(seed: int, prompt: str) -> Any:
        image = one.images(noise(seed, range(1), one.student.noise_shape), [prompt])[0]
        return image.permute(1, 2, 0).numpy().astype(int)

    for number, seed in ((0, 3), (3, 3), (2, 4), (5, 5)):
        assert np.abs(files("seeds", [number])[0] - drawn_alone(seed, prompts[0])).max() <= 1
    middle = Image.open(tmp_path / "seeds" / "00004.png")
    assert middle.info["label"] == "up to 4: seed 3; above: seed 5"
    assert (np.asarray(middle) != files("seeds", [3])[0]).any()
    # One column, of prompts at one seed.
    facts = save_mix("runs/small", one, prompts, [3], [4], tmp_path / "prompts")
    assert facts["images"] == 2 and (tmp_path / "prompts" / "mix.png").is_file()
    first, second = files("prompts", [0, 1])
    assert (first != second).any() and (first != drawn_alone(3, prompts[0])).any()
    for texts, seeds, sides, message in (
        (prompts[:1], [3], [], "a mix needs two points; give several --prompt or several --seed"),
        (prompts, [3, 4], [], "there are 3 prompts and 2 seeds; expected equal numbers"),
        (prompts, [3], [5], "--coarse is 5; expected 0, 4 or 8"),
    ):
        with pytest.raises(SettingError, match=message):
            save_mix("runs/small", one, texts, seeds, sides, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_tracked_mean_is_that_of_the_mapping(teachers: Mapping[str, str]) -> None:
    """It does not depend on how a step's rows are split, and previews before a step do not count."""
    whole, split = (build(teachers["sd"], "stylegan-t") for _ in range(2))
    cond = conditioning(teachers["sd"], whole, 4)
    with torch.no_grad():
        for step in range(60):
            z = noise(1, range(4 * step, 4 * step + 4), whole.noise_shape)
            split(3 * z, cond)
            for student in (whole, split):
                student.begin_step()
            whole(z, cond)
            for rows in (slice(0, 2), slice(2, 4)):
                split(z[rows], cond[rows])
            for student in (whole, split):
                student.after_update(step)
        network: Any = whole.network
        f = network.mapping(noise(2, range(2000), (8,)))
    torch.testing.assert_close(split.network.mapping.mean, network.mapping.mean)
    assert value((network.mapping.mean - f.mean(0)).abs().max()) < 0.4 * value(f.std())


def test_growing_keeps_the_image() -> None:
    """The grown generator draws the small one's latents, enlarged; all its layers are trained."""
    for kind in ("stylegan-t", "gigagan"):
        big = build("miniature", kind)
        small = build("miniature", kind, resolution=4)
        assert (big.size, small.size) == ((8, 8), (4, 4)) and small.latent_shape == (8, 8, 8)
        loaded = big.grow_weights(small.state_dict())
        big.load_state_dict(loaded)
        z = noise(0, range(2), big.noise_shape)
        cond = pretrained.load_conditioner("miniature").encode(["a red cube", "a blue cone"])
        first = z[:, : small.noise_shape[0]]  # the same numbers first
        torch.testing.assert_close(big(z, cond), small(first, cond), rtol=1e-4, atol=1e-5)
        assert all(p.requires_grad for p in big.parameters())
        # What is missing elsewhere is not made up.
        other = {k: v for k, v in small.state_dict().items() if "blocks.0.convs.0" not in k}
        assert big.grow_weights(other).keys() != big.state_dict().keys()
    # Real latents lose the detail that the small generator cannot draw.
    latents = torch.randn(2, 8, 8, 8)
    view = small.limit_detail(latents)
    torch.testing.assert_close(view, upsample(F.avg_pool2d(latents, 2)))
    assert torch.equal(big.limit_detail(latents), latents)


def test_an_upsampler_starts_with_the_enlarged_latents() -> None:
    student = build("miniature", "gigagan-upsampler")
    network: Any = student.network
    with torch.no_grad():
        for block in network.blocks:
            block.to_image.conv.weight.zero_()
    latents = torch.randn(2, 8, 8, 8)
    small = student.small_latents(latents)
    assert small is not None
    torch.testing.assert_close(small, F.avg_pool2d(latents, 2))
    cond = pretrained.load_conditioner("miniature").encode(["a red cube", "a blue cone"])
    z = noise(0, range(2), student.noise_shape)
    expected = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(student(z, cond.with_prior(small)), expected)
    # Larger latents of another student are reduced first.
    torch.testing.assert_close(student(z, cond.with_prior(latents)), expected)


# Runs.


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUN_KINDS)
def test_runs_resume_exactly(kind: str, teachers: Mapping[str, str], pairs: Path, tmp_path: Path) -> None:
    """With exact R1, accumulated gradients and recomputed blocks; the tracked mean is part of the state."""
    more = ("engine.gradient_accumulation=2", "engine.activation_checkpointing=true", "gan.mix_fraction=0")
    settings = (
        *RUN,
        f"student.kind={kind}",
        *(("student.generator.factor=2",) if "up" in kind else ()),
        *more,
    )
    config, shorter = (
        distill_config(Path(teachers["sd"]), pairs, *settings, f"train.images={n}", stage="gan")
        for n in (12, 4)
    )
    assert_resumes_exactly(config, shorter, tmp_path)
    one = load_student(str(tmp_path / "once"))
    assert value(one.student.network.mapping.mean.abs().max()) > 0


@pytest.mark.parametrize("kind", ["gigagan", "gigagan-upsampler"])
def test_banks_of_kernels_train_beside_channels_last(
    kind: str, teachers: Mapping[str, str], pairs: Path, tmp_path: Path
) -> None:
    """channels-last is the default on a GPU; the weights of an adaptive convolution have five dimensions."""
    settings = (
        *RUN,
        f"student.kind={kind}",
        *(("student.generator.factor=2",) if "up" in kind else ()),
        "train.images=4",
    )
    reports = []
    for choice in ("off", "on"):
        more = f"engine.channels_last={choice}"
        train(distill_config(Path(teachers["sd"]), pairs, *settings, more, stage="gan"), tmp_path / choice)
        reports.append(losses(tmp_path / choice)[0])
    assert reports[1] == pytest.approx(reports[0], rel=1e-3, abs=1e-5)


def test_r1_is_that_of_the_discriminator_alone(
    teachers: Mapping[str, str], pairs: Path, tmp_path: Path
) -> None:
    """At the first step D and the real rows are those of a diffusion student, and so is the penalty."""
    for name, kind in (("own", "stylegan-t"), ("teacher", "diffusion")):
        settings = (*RUN, f"student.kind={kind}", "train.images=4")
        init = "" if name == "own" else "teacher"
        train(distill_config(Path(teachers["sd"]), pairs, *settings, stage="gan", init=init), tmp_path / name)
    own, theirs = (losses(tmp_path / name)[0] for name in ("own", "teacher"))
    assert own["loss/r1"] == theirs["loss/r1"] > 0 and own["loss/g"] != theirs["loss/g"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", RUN_KINDS)
def test_two_processes_train_like_one(
    kind: str, engine: str, teachers: Mapping[str, str], pairs: Path, tmp_path: Path
) -> None:
    config = distill_config(Path(teachers["sd"]), pairs, stage="gan")
    settings = (*RUN, f"student.kind={kind}", "train.images=12", "train.preview_prompts=2")
    settings += ("student.generator.factor=2",) if "up" in kind else ()
    succeed(d2g(distill_arguments(config, tmp_path / "one", *settings), tmp_path / "log"))
    command = distill_arguments(config, tmp_path / "two", *settings, f"engine.parallel={engine}")
    succeed(*d2g_ranks(command, tmp_path / "log"))
    names = ("loss/d", "loss/g_gan", "loss/g", "grad/d", "grad/g", "loss/r1")
    one, two = (
        [line[name] for line in losses(tmp_path / run) for name in names if name in line]
        for run in ("one", "two")
    )
    assert len(one) == 17 and two == pytest.approx(one, rel=1e-3)
    means = [load_student(str(tmp_path / run)).student.network.mapping.mean for run in ("one", "two")]
    torch.testing.assert_close(*means)


@pytest.mark.slow
def test_samples_exports_and_plans(teachers: Mapping[str, str], pairs: Path, tmp_path: Path) -> None:
    """Noise of (seed, index), whatever the batch; an export draws the same; other formats are refused."""
    config = distill_config(
        Path(teachers["sd"]), pairs, *RUN, "student.kind=stylegan-t", "train.images=8", stage="gan"
    )
    run, teacher = tmp_path / "run", config.teacher
    train(config, run)
    # It is no start for a student of another kind.
    other = replace(distill_config(Path(teachers["sd"]), pairs, stage="gan"), init=str(run))
    with pytest.raises(SettingError, match=r"a student of kind stylegan-t, but student\.kind is 'diffusion'"):
        train(other, tmp_path / "other")
    one = load_student(str(run))
    prompts = ["a red cube", "a blue ball", "a cat"]
    images = one(prompts, seed=3)
    assert torch.equal(torch.cat([x for x, _ in one.sample(prompts, 3, batch_size=1)]), images)
    edited = save_edits("run", one, prompts[0], prompts[1], [3], [0.0, 1.0], tmp_path / "edit")
    assert edited["images"] == 2
    truncated = with_psi(one, str(run), 0.0)
    assert not torch.equal(truncated.latents(noise(3, range(3), one.student.noise_shape), prompts), images)
    # Evaluations truncate as `d2g sample --psi` does, and say so; without truncation nothing is added.
    request = SamplingRequest(prompts=prompts, seed=3)
    source = student_source(str(run), request, psi=0.0)
    assert torch.equal(source.image(2), truncated(prompts, seed=3)[2]) and source.facts["psi"] == 0.0
    assert "psi" not in student_source(str(run), request).facts
    summary = export_student(str(run), tmp_path / "export", "fp32")
    assert summary["parity_max_abs_err"] == 0
    facts = json.loads((tmp_path / "export" / "student.json").read_text())
    assert facts["student"]["kind"] == "stylegan-t" and torch.equal(
        load_student(str(tmp_path / "export"))(prompts, seed=3), images
    )
    for form in ("diffusers", "onnx", "lora", "comfyui"):
        with pytest.raises(UserError, match=r"no class in diffusers, so that format=.* cannot hold it"):
            export(ExportConfig(student=str(run), format=form), tmp_path / form)  # type: ignore[arg-type]
    # Plans of memory and operations.
    recomputed = override(config, ["engine.activation_checkpointing=true"])
    assert predict(config, 1).total > 0 and predict(recomputed, 1).total > 0
    assert flop_per_image(config) > 0 and teacher == facts["teacher"]


def test_an_upsampler_enlarges_what_another_student_draws(
    teachers: Mapping[str, str], pairs: Path, tmp_path: Path
) -> None:
    """It is trained with and without regression, in both stages."""
    sizes = (*RUN, "student.kind=gigagan-upsampler", "student.generator.factor=2", "train.images=8")
    config = distill_config(
        Path(teachers["sd"]), pairs, *sizes, "regression.losses=l1:1", "gan.z_conditioning=true"
    )
    train(config, tmp_path / "up")
    assert predict(config, 1).total > 0
    base = distill_config(Path(teachers["sd"]), pairs, "train.images=4", "regression.losses=l1:1")
    train(base, tmp_path / "base")
    one = with_prior(load_student(str(tmp_path / "up")), "up", str(tmp_path / "base"))
    small = load_student(str(tmp_path / "base"))
    assert one.prior is not None and one(["a cat"], seed=1).shape == small(["a cat"], seed=1).shape
    # Beside its teacher, which has no prior.
    solver = SolverSettings(steps=2, prior=str(tmp_path / "base"))
    drawn = save_both_samples(
        str(tmp_path / "up"), config.teacher, ["a cat"], tmp_path / "both", 1, 2, solver
    )
    assert drawn["images"] == 2
    png = np.array(Image.open(next((tmp_path / "both" / "student").glob("*.png"))))
    assert torch.equal(torch.from_numpy(png).permute(2, 0, 1), one(["a cat"], seed=1)[0])
    with pytest.raises(SettingError, match="prior is not set, but student up enlarges latents of"):
        with_prior(load_student(str(tmp_path / "up")), "up", None)
    with pytest.raises(UserError, match="give a student of the same latent space"):
        with_prior(load_student(str(tmp_path / "up")), "up", "miniature")
    with pytest.raises(SettingError, match="enlarges the latents of another student, and cannot be explored"):
        open_student(str(tmp_path / "up"))
    export_student(str(tmp_path / "up"), tmp_path / "export", "fp32")


# Bad input.

BAD: list[tuple[tuple[str, ...], str]] = [
    (("stage=ode",), "no latents of the pairs to compare with.*regression.losses=\\[\\]"),
    (("regression.losses=l1:1",), "no latents of the pairs to compare with"),
    (
        ("gan.z_conditioning=true",),
        "gan.z_conditioning is true; set gan.z_conditioning=false and gan.mix_z=0",
    ),
    (("init=teacher",), "none of the teacher's weights, but init is 'teacher'"),
    (("train.validate_pairs=2", "train.validate_images=4"), "give --validate PROTOCOL"),
    (("student.generator.resolution=4", "gan.real=x", "gan.real_fraction=0.5"), "gan.real mixes photographs"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_that_do_not_fit_a_generator(settings: tuple[str, ...], message: str) -> None:
    start = override(DistillConfig(stage="gan", pairs="pairs"), ["student.kind=stylegan-t", *RUN])
    check_student(start)
    if settings[0] == "stage=ode":
        settings = (*settings, "regression.losses=l1:1")
    with pytest.raises(SettingError, match=message):
        check_student(override(start, settings))


def test_a_kind_with_the_noise_of_the_pairs_may_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its discriminator can see the noise, and it has latents to validate on."""
    kind = replace(STUDENTS["gigagan"], own_noise=False, regresses=True)
    monkeypatch.setitem(STUDENTS, "gigagan", kind)
    settings = ("student.kind=gigagan", "train.validate_pairs=2", "train.validate_images=8")
    check_student(override(DistillConfig(stage="gan", pairs="pairs"), settings))
    assert all(entry.own_noise == (name != "diffusion") for name, entry in STUDENTS.items() if entry != kind)


def test_bad_input_in_one_line(teachers: Mapping[str, str], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="stylegan-t"):
        StudentConfig(kind="stylegan")  # type: ignore[arg-type]
    for name, value in (("lora_rank", 4), ("dropout", 0.1), ("guidance_conditioning", True)):
        with pytest.raises(
            SettingError, match=rf"{name} is .*, but kind=gigagan is no network of the teacher"
        ):
            StudentConfig(kind="gigagan", **{name: value})  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"resolution is 3, but latents of .* are 8x8; expected 8, or the"):
        build("miniature", "stylegan-t", resolution=3)
    with pytest.raises(SettingError, match="factor is 3; expected a power of two"):
        build("miniature", "gigagan-upsampler", factor=3)
    ended = d2g(["sample", "--psi", "0.5", "--prompt", "a cube", "--out", str(tmp_path / "s")], tmp_path)
    assert ended.code == 2 and "psi is 0.5, but student miniature has no styles to truncate" in ended.error
    for more, message in (
        (("--psi", "1.5"), "psi is 1.5; expected 0 (the mean style) to 1 (no truncation)"),
        (("--psi", "0.5", "--teacher", "miniature"), "psi is 0.5, which truncates a student, but teacher is"),
    ):
        ended = d2g(["sample", "--prompt", "a cube", "--out", str(tmp_path / "s"), *more], tmp_path)
        assert ended.code == 2 and message in ended.error
    assert set(STUDENTS) == {"diffusion", *KINDS}
