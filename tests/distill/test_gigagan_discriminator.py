"""distill.models.gigagan_discriminator: the pyramid and its heads, the readout, exact R1, runs, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny_teachers
from d2g.core.errors import SettingError
from d2g.core.seeds import generator
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from distill.config.discriminator import DiscriminatorConfig
from distill.losses.gradient_penalty import r1_penalty
from distill.models.condition_vector import ConditionShape
from distill.models.discriminators import DISCRIMINATORS, check_discriminator
from distill.models.gigagan_discriminator import GigaGANDiscriminator
from distill.models.modulated_readout import LAYERS, ModulatedReadout
from distill.models.style_layers import initialize
from distill.planning.memory import predict
from jobs import d2g, d2g_ranks, distill_arguments, distill_config, make_pairs, succeed
from runs import assert_resumes_exactly, losses

CONFIG = DiscriminatorConfig(discriminator="gigagan", mix_z=0, channel_base=64, channel_max=8)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("teachers")
    saved = {kind: tiny_teachers.save_kind(kind, root / kind) for kind in ("sd", "unet2d", "ldm")}
    for kind in ("sd", "ldm"):  # two levels instead of one
        tiny_teachers.edit(root / kind, "unet/config.json", sample_size=8)
    return saved


def drawn(module: nn.Module) -> Any:
    initialize(module, torch.Generator().manual_seed(0))
    return module


def random_inputs(rows: int, side: int) -> tuple[Tensor, Tensor, Conditioning]:
    x = torch.randn(rows, 4, side, side)
    return x, torch.zeros_like(x), Conditioning({"hidden": torch.randn(rows, 3, 6)})


def test_a_readout_in_closed_form() -> None:
    """1x1 convolutions whose kernels a style multiplies per input channel and demodulation scales to norm 1;
    and an unconditional one (StyleGAN2, eqs. 1 and 3)."""
    readout = drawn(ModulatedReadout(5, ConditionShape(text_width=3)))
    for bias in readout.biases:
        nn.init.normal_(bias)
    x, text = torch.randn(2, 5, 4, 4), torch.randn(2, 3)
    code = text / text.square().mean(1, keepdim=True).sqrt()
    expected = []
    for row in range(2):
        y = x[row].flatten(1)
        for number, (style, conv, bias) in enumerate(
            zip(readout.styles, readout.convs, readout.biases, strict=True)
        ):
            kernel = conv.weight[:, :, 0, 0] * style(code[row : row + 1]) * 5**-0.5
            if number < LAYERS - 1:
                kernel = kernel / kernel.square().sum(1, keepdim=True).sqrt()
            y = kernel @ y + bias[:, :, 0]
            if number < LAYERS - 1:
                y = F.leaky_relu(y, 0.2) * 2**0.5
        alone = readout.unconditional.weight[:, :, 0, 0] * 5**-0.5 @ x[row].flatten(1)
        expected.append((y + alone).view(1, 4, 4))
    torch.testing.assert_close(readout(x, text), torch.stack(expected), rtol=1e-4, atol=1e-5)
    # Without a condition there is one linear readout.
    plain = drawn(ModulatedReadout(5, ConditionShape()))
    assert {name for name, _ in plain.named_parameters()} == {"unconditional.weight", "unconditional.bias"}
    assert plain(x, None).shape == (2, 1, 4, 4)


def test_every_image_of_the_pyramid_is_judged_at_every_smaller_scale() -> None:
    sizes = [(16, 16), (8, 8), (4, 4)]
    network: Any = drawn(GigaGANDiscriminator(4, sizes, CONFIG, ConditionShape(text_width=6, token_width=6)))
    x, noise, cond = random_inputs(2, 16)
    logits = network(x, noise, cond)
    assert {name: tuple(v.shape[2:]) for name, v in logits.items()} == {
        "image0_scale1": (8, 8),
        "image0_scale2": (4, 4),
        "image1_scale2": (4, 4),
    }
    text = cond.tensors["hidden"].mean(1)
    small = F.avg_pool2d(x, 2)
    level = network.levels[1](network.enter[1](small))
    torch.testing.assert_close(logits["image1_scale2"], network.readouts[1](level, text))
    # The small image knows nothing of detail that its cells lose; the large one does.
    detail = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8)
    other = network(x + detail, noise, cond)
    torch.testing.assert_close(other["image1_scale2"], logits["image1_scale2"], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(other["image0_scale2"], logits["image0_scale2"], atol=1e-2)
    # Another text gives other logits at every head; noise has no effect.
    swapped = network(x, noise + 1, cond[[1, 0]])
    assert all(not torch.allclose(swapped[name], v, atol=1e-3) for name, v in logits.items())
    torch.testing.assert_close(network(x, noise + 1, cond), logits)


@pytest.mark.parametrize("kind", ["sd", "unet2d", "ldm"])
def test_it_reads_every_condition(kind: str, teachers: dict[str, str]) -> None:
    """Text, classes, none; every weight has a gradient; without weights it is the same network."""
    network = DISCRIMINATORS["gigagan"].build(teachers[kind], CONFIG, generator(0))
    x, noise, cond = tiny_teachers.random_inputs(kind, 2, size=pretrained.latent_shape(teachers[kind])[1])
    torch.stack([v.square().sum() for v in network(x, noise, cond).values()]).sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    meta = DISCRIMINATORS["gigagan"].build_on_meta(teachers[kind], CONFIG)
    assert {n: p.shape for n, p in meta.named_parameters()} == {
        n: p.shape for n, p in network.named_parameters()
    }


def test_the_penalty_is_exact(float64: None) -> None:
    """Through pyramid, attention and demodulation: finite differences in float64."""
    sizes = [(8, 8), (4, 4)]
    network = drawn(GigaGANDiscriminator(4, sizes, CONFIG, ConditionShape(text_width=6))).double()
    x, noise, cond = random_inputs(1, 8)
    x, noise, cond = x.double(), noise.double(), cond.to(torch.float64)
    step, total = 1e-5, 0.0
    with torch.no_grad():
        for position in range(x.numel()):
            shift = torch.zeros_like(x)
            shift.view(-1)[position] = step
            high, low = (
                sum(v.mean() for v in network(x + sign * shift, noise, cond).values()) for sign in (1, -1)
            )
            total += float(((high - low) / (2 * step)) ** 2)
    value = r1_penalty(network, x, noise, cond)
    assert value.item() == pytest.approx(total, rel=1e-5) and total > 1e-6
    value.backward()
    unread = {n for n, p in network.named_parameters() if p.grad is None}
    assert all(name.endswith("bias") or "biases" in name for name in unread)


def test_what_does_not_fit_is_refused(teachers: dict[str, str], tmp_path: Path) -> None:
    check_discriminator(teachers["sd"], CONFIG)
    tiny_teachers.save_kind("sd", tmp_path / "odd")
    tiny_teachers.edit(tmp_path / "odd", "unet/config.json", sample_size=6)
    with pytest.raises(SettingError, match=r"latents of .* are 6x6; expected even sides of 8 or more"):
        check_discriminator(str(tmp_path / "odd"), CONFIG)
    with pytest.raises(SettingError, match="mix_z is 1, but gigagan does not see the noise"):
        replace(CONFIG, mix_z=1)
    for name in ("channel_base", "channel_max"):
        with pytest.raises(SettingError, match=f"{name} is 0; expected 1 or more"):
            replace(CONFIG, **{name: 0})  # type: ignore[arg-type]


RUN = (
    *("gan.discriminator=gigagan", "gan.channel_base=64", "gan.channel_max=8", "gan.mix_z=0"),
    *("gan.r1_interval=2", "gan.r1_rows=2", "gan.optim.lr=1e-3", "optim.lr=1e-3"),
    *("regression.losses=[]", "student.kind=stylegan-t", "student.generator.channel_base=64"),
    *("student.generator.channel_max=16", "student.generator.residual_blocks=1"),
)


@pytest.fixture(scope="module")
def pairs(teachers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(Path(teachers["sd"]), tmp_path_factory.mktemp("pairs"))


@pytest.mark.slow
def test_runs_resume_bit_for_bit(teachers: dict[str, str], pairs: Path, tmp_path: Path) -> None:
    """It trains a generator with styles, and its memory is predicted."""
    config, shorter = (
        distill_config(Path(teachers["sd"]), pairs, *RUN, f"train.images={n}", stage="gan") for n in (12, 4)
    )
    assert_resumes_exactly(config, shorter, tmp_path)
    assert min(line["loss/d"] for line in losses(tmp_path / "once")) > 0
    assert predict(config, 1).total > 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_like_one(
    engine: str, teachers: dict[str, str], pairs: Path, tmp_path: Path
) -> None:
    config = distill_config(Path(teachers["sd"]), pairs, stage="gan")
    settings = (*RUN, "train.images=12")
    succeed(d2g(distill_arguments(config, tmp_path / "one", *settings), tmp_path / "log"))
    command = distill_arguments(config, tmp_path / "two", *settings, f"engine.parallel={engine}")
    succeed(*d2g_ranks(command, tmp_path / "log"))
    names = ("loss/d", "loss/g_gan", "grad/d", "grad/g", "loss/r1")
    one, two = (
        [line[name] for line in losses(tmp_path / run) for name in names if name in line]
        for run in ("one", "two")
    )
    assert len(one) == 14 and two == pytest.approx(one, rel=1e-3)
