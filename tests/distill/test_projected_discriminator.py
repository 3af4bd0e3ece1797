"""distill.models.projected_discriminator and two_discriminators: features, crops, heads, exact R1, runs."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny_teachers
import vision_models
from d2g.core.config import override
from d2g.core.errors import SettingError, UserError
from d2g.core.png import save_png
from d2g.core.seeds import generator
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.latents import decode
from d2g.vision.crops import crop_view
from distill.config.discriminator import DiscriminatorConfig
from distill.config.presets import PIXEL_RECIPES
from distill.losses.adversarial import discriminator_loss, generator_loss
from distill.losses.gradient_penalty import r1_penalty
from distill.models.discriminators import DISCRIMINATORS, check_discriminator
from distill.models.feature_networks import open_feature_network
from distill.models.pixel_features import DRAWS, RANGE, diff_augment
from distill.models.projected_discriminator import VirtualBatchNorm, condition_vector
from distill.planning.memory import predict
from distill.training.train import train
from jobs import d2g, d2g_ranks, distill_arguments, distill_config, make_pairs, succeed
from runs import assert_resumes_exactly, losses, state_at


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vision_models.save_vit("vit", tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("teachers")
    return {kind: tiny_teachers.save_kind(kind, root / kind) for kind in ("sd", "unet2d", "ldm")}


def settings(vit: str, **more: Any) -> DiscriminatorConfig:
    chosen: dict[str, Any] = {"discriminator": "projected", "token_heads": 2, "mix_z": 0.0, **more}
    return DiscriminatorConfig(feature_networks=(vit,), feature_size=16, **chosen)


def build(teacher: str, config: DiscriminatorConfig) -> Any:
    kind = DISCRIMINATORS[config.discriminator]
    network: Any = kind.build(teacher, config, generator(0))
    assert kind.open_pixel_features is not None
    network.attach(kind.open_pixel_features(teacher, config, False))
    return network


def random_draws(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(RANGE, (rows, DRAWS), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", vision_models.VITS)
def test_features_are_the_patch_tokens_of_the_published_network(kind: str, tmp_path: Path) -> None:
    """transformers' own output is the judge; a size other than the network's own works too."""
    import transformers

    folder = vision_models.save_vit(kind, tmp_path)
    network = open_feature_network(folder, 2)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, deviation = (torch.tensor(s).view(3, 1, 1) for s in network.statistics)
    model = transformers.AutoModel.from_pretrained(folder)
    states = model(
        pixel_values=(pixels / 2 + 0.5 - mean) / deviation, output_hidden_states=True
    ).hidden_states
    maps = network(pixels)
    assert network.depths == [2, 4] and [m.shape for m in maps] == [(2, 16, 4, 4)] * 2
    for depth, features in zip(network.depths, maps, strict=True):
        torch.testing.assert_close(features.flatten(2).transpose(1, 2), states[depth][:, -16:])
    assert network(torch.zeros(1, 3, 24, 24))[0].shape == (1, 16, 6, 6)
    meta = open_feature_network(folder, 2, on_meta=True)
    assert (meta.depths, meta.widths, meta.size_unit) == (network.depths, network.widths, 4)


def test_convolutional_features(tmp_path: Path) -> None:
    """EfficientNet-lite0 with its published weights, and SqueezeNet from a file of torchvision's keys."""
    from torchvision.models import squeezenet1_1

    lite0 = open_feature_network("efficientnet-lite0", 5)
    maps = lite0(torch.zeros(1, 3, 64, 64))
    assert lite0.depths == [1, 3, 4, 6, 7] and lite0.widths == [16, 40, 80, 192, 320]
    assert [m.shape[1] for m in maps] == lite0.widths
    assert [m.shape[2] for m in maps] == [32, 8, 4, 2, 2]
    net = squeezenet1_1(weights=None).eval()
    save_file(net.state_dict(), tmp_path / "squeezenet.safetensors")
    squeezenet = open_feature_network(f"squeezenet:{tmp_path / 'squeezenet.safetensors'}", 8)
    x = torch.rand(1, 3, 32, 32)
    mean, deviation = (torch.tensor(s).view(3, 1, 1) for s in squeezenet.statistics)
    torch.testing.assert_close(squeezenet(2 * x - 1)[-1], net.features((x - mean) / deviation))
    assert squeezenet.widths == open_feature_network("squeezenet:", 8, on_meta=True).widths
    with pytest.raises(UserError, match="no weights there; put torchvision's weights of squeezenet1_1"):
        open_feature_network("squeezenet:nowhere.pth", 2)


@pytest.mark.slow
def test_vgg_features(tmp_path: Path) -> None:
    """VGG16-BN in five blocks: the last one is torchvision's output before its last pooling."""
    from torchvision.models import vgg16_bn

    net = vgg16_bn(weights=None).eval()
    save_file(net.state_dict(), tmp_path / "vgg.safetensors")
    vgg = open_feature_network(f"vgg16_bn:{tmp_path / 'vgg.safetensors'}", 5)
    x = torch.rand(1, 3, 32, 32)
    mean, deviation = (torch.tensor(s).view(3, 1, 1) for s in vgg.statistics)
    maps = vgg(2 * x - 1)
    assert [m.shape[1:] for m in maps] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    torch.testing.assert_close(maps[-1], net.features[:-1]((x - mean) / deviation))
    assert vgg.widths == open_feature_network("vgg16_bn:", 5, on_meta=True).widths
    with pytest.raises(UserError, match="no weights there; put torchvision's weights of vgg16_bn"):
        open_feature_network("vgg16_bn:nowhere.pth", 2)


def test_crops_and_augmentations_follow_their_random_numbers() -> None:
    x = torch.arange(2 * 3 * 6 * 5.0).view(2, 3, 6, 5)
    crop = crop_view(x, 4, torch.tensor([[0.0, 0.0], [0.999, 0.999]]))
    assert torch.equal(crop[0], x[0, :, :4, :4]) and torch.equal(crop[1], x[1, :, 2:, 1:])
    assert crop_view(x, 8, torch.zeros(2, 2)) is x
    # In the middle of every range nothing changes, but for the cutout.
    middle = torch.full((2, 7), 0.5)
    pixels = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(diff_augment(pixels, ("color", "translation"), middle), pixels)
    cut = diff_augment(pixels, ("cutout",), middle)
    assert (cut[:, :, 4:12, 4:12] == 0).all() and torch.equal(cut[:, :, :4], pixels[:, :, :4])
    # A shift by an eighth of the side over zeros, and DiffAugment's color.
    low = torch.zeros(2, 7)
    shifted = diff_augment(pixels, ("translation",), low)
    assert torch.equal(shifted[:, :, 2:, 2:], pixels[:, :, :-2, :-2]) and (shifted[:, :, :2] == 0).all()
    bright = pixels - 0.5
    mean = bright.mean((1, 2, 3), keepdim=True)
    contrast = (bright - mean) * 0.5 + mean
    gray = contrast.mean(1, keepdim=True).expand_as(pixels)
    torch.testing.assert_close(diff_augment(pixels, ("color",), low), gray)


def test_virtual_batches_are_normalized_by_themselves() -> None:
    norm = VirtualBatchNorm(3, 2)
    x = torch.randn(5, 3, 7) * 4 + 2
    expected = torch.cat([F.batch_norm(part, None, None, training=True) for part in x.split(2)])
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-5)
    assert not dict(norm.named_buffers())


def test_the_condition_is_the_class_or_the_text() -> None:
    hidden, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    cond = condition_vector(Conditioning({"hidden": hidden, "mask": mask}))
    assert cond is not None
    torch.testing.assert_close(cond, torch.stack([hidden[0, :2].mean(0), hidden[1, 0]]))
    assert torch.equal(condition_vector(Conditioning.from_text(hidden, hidden[:, 0])), hidden[:, 0])  # type: ignore[arg-type]
    assert torch.equal(condition_vector(Conditioning.from_labels(mask[0])), mask[0])  # type: ignore[arg-type]
    assert condition_vector(Conditioning.empty(2)) is None


@pytest.mark.parametrize("kind", ["sd", "unet2d", "ldm"])
def test_logits_depend_on_latents_condition_and_crop(kind: str, teachers: dict[str, str], vit: str) -> None:
    """Only a crop of the latents is decoded, and only the heads are parameters."""
    network = build(teachers[kind], settings(vit, feature_augment=()))
    side = network.pixel_features.side
    assert side == {"sd": 4, "unet2d": 16, "ldm": 4}[kind]
    x, noise, cond = tiny_teachers.random_inputs(kind, 3, size=2 * side)
    draws = random_draws(3)
    logits = network(x, noise, cond, None, draws)
    assert {n: v.shape for n, v in logits.items()} == {f"block{d}": (3, 1, 4, 4) for d in (2, 4)}
    assert all(name.startswith("heads.") for name in network.state_dict())
    # The same rows as a crop: the decoder saw nothing else.
    crop = crop_view(x, side, draws.float() / RANGE)
    torch.testing.assert_close(network(crop, noise, cond, None, draws), logits)
    if kind == "unet2d":
        assert torch.equal(decode(network.pixel_features.vae, crop), crop)
    # Gradients reach the latents inside the crop alone; other conditions give other logits.
    latents = x.clone().requires_grad_()
    total = torch.stack([v.sum() for v in network(latents, noise, cond, None, draws).values()]).sum()
    (slope,) = torch.autograd.grad(total, latents)
    assert 0 < (slope.flatten(2).abs().sum((1, 2)) > 0).sum() and (slope == 0).float().mean() >= 0.75
    if kind != "ldm":
        other = network(x, noise, cond[[1, 2, 0]], None, draws)
        assert not torch.allclose(other["block4"], logits["block4"])


def test_vision_aided_heads_in_closed_form(teachers: dict[str, str], tmp_path: Path) -> None:
    """GigaGAN's on features of CLIP: a projection that is not trained, 3x3 convolutions, a readout."""
    clip = vision_models.save_vit("clip_vision_model", tmp_path)
    network = build(teachers["sd"], settings(clip, feature_heads="modulated", feature_augment=()))
    x, noise, cond = tiny_teachers.random_inputs("sd", 3, size=4)
    logits = network(x, noise, cond, None, random_draws(3))
    assert {n: v.shape for n, v in logits.items()} == {f"block{d}": (3, 1, 4, 4) for d in (2, 4)}
    features = network.pixel_features(x, random_draws(3))["block4"]
    head, condition = network.heads["block4"], condition_vector(cond)
    y = F.conv2d(features, head.projection[:, :, None, None])
    assert head.projection.shape == (16, 16) and abs(head.projection.std() * 4 - 1) < 0.2
    for conv in head.convs:
        y = F.group_norm(y, 16)
        y = F.conv2d(y, conv.weight / (9 * 16) ** 0.5, conv.bias, padding=1)
        y = F.leaky_relu(y, 0.2) * 2**0.5
    torch.testing.assert_close(logits["block4"], head.readout(y, condition), rtol=1e-4, atol=1e-4)
    assert "heads.block4.projection" in network.state_dict()
    assert "heads.block4.projection" not in dict(network.named_parameters())
    # The text modulates, and every weight has a gradient.
    other = network(x, noise, cond[[1, 2, 0]], None, random_draws(3))
    assert not torch.allclose(other["block4"], logits["block4"], atol=1e-3)
    torch.stack([v.square().sum() for v in logits.values()]).sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("kind", "name", "heads"),
    [("sd", "projected", "tokens"), ("unet2d", "unet+projected", "tokens"), ("sd", "projected", "modulated")],
)
def test_the_penalty_is_exact(
    kind: str, name: str, heads: str, teachers: dict[str, str], vit: str, float64: None
) -> None:
    """Through decoder, augmentation, resizing and feature network: finite differences in float64. Of two
    discriminators each has a penalty of its own."""
    network = build(teachers[kind], settings(vit, discriminator=name, feature_heads=heads))
    rng = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=rng)
    network.double()
    frozen = network.pixel_features if name == "projected" else network.second.pixel_features
    frozen.double()
    x, noise, cond = tiny_teachers.random_inputs(kind, 1, 1, torch.float64)
    draws, step = random_draws(1), 1e-5

    @torch.no_grad()
    def scores(latents: Tensor) -> Tensor:
        logits = network(latents, noise, cond, None, draws)
        first = [v.mean() for h, v in logits.items() if not h.startswith("projected.")]
        second = [v.mean() for h, v in logits.items() if h.startswith("projected.")]
        return torch.stack([sum(first), sum(second, torch.zeros((), dtype=torch.float64))])  # type: ignore[list-item]

    total = torch.zeros(2, dtype=torch.float64)
    for position in range(x.numel()):
        shift = torch.zeros_like(x)
        shift.view(-1)[position] = step
        total += ((scores(x + shift) - scores(x - shift)) / (2 * step)).square()
    value = r1_penalty(network, x, noise, cond, draws=draws)
    assert value.item() == pytest.approx(float(total.sum()), rel=1e-5) and (total > 1e-6).sum() == (
        1 if name == "projected" else 2
    )
    # The penalty itself has gradients for the heads.
    value.backward()
    last = "residual.conv.weight" if heads == "tokens" else "convs.0.weight"
    assert all(p.grad is not None for n, p in network.named_parameters() if last in n)


def test_two_discriminators_have_a_loss_each() -> None:
    real = {"a": torch.randn(2, 1, 1, 1), "b": torch.randn(2, 1, 1, 1)}
    fake = {head: torch.randn_like(v) for head, v in real.items()}
    second = {f"projected.{head}": v for head, v in fake.items()}
    for kind in ("ns", "hinge"):
        one = discriminator_loss(real, fake, kind)  # type: ignore[arg-type]
        both_real = {**real, **{f"projected.{head}": v for head, v in real.items()}}
        both = discriminator_loss(both_real, {**fake, **second}, kind, weights={"projected": 0.5})  # type: ignore[arg-type]
        torch.testing.assert_close(both, 1.5 * one)
        g = generator_loss({**fake, **second}, kind, weights={"projected": 3.0})  # type: ignore[arg-type]
        torch.testing.assert_close(g, 4 * generator_loss(fake, kind))  # type: ignore[arg-type]
    assert DiscriminatorConfig(discriminator="unet+projected", mix_z=0, projected_weight=2).part_weights == {
        "projected": 2
    }


@pytest.mark.long
@pytest.mark.slow
def test_memory_counts_the_frozen_networks(teachers: dict[str, str], vit: str) -> None:
    config = distill_config(Path(teachers["sd"]), Path("pairs"), stage="gan")
    base = predict(config, 1)
    frozen = open_feature_network(vit, 2)
    weights = 4 * sum(p.numel() for p in frozen.parameters()) / 2**30
    both = predict(replace(config, gan=settings(vit, discriminator="unet+projected")), 1)
    assert both.frozen >= base.frozen + weights and both.working > base.working
    # Twice as large crops need more memory, and recomputation of the decoder less.
    large = replace(
        config, gan=replace(settings(vit), feature_size=64), train=replace(config.train, batch_size=64)
    )
    recompute = replace(large, engine=replace(large.engine, activation_checkpointing=True))
    assert predict(recompute, 1).working < predict(large, 1).working


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_heads": 5}, r"token_heads is 5, but .* has 4 blocks; expected 1 to 4"),
        ({"feature_size": 18}, "feature_size is 18, but .* has patches of 4 px; expected a multiple"),
        (
            {"feature_networks": ("nowhere",)},
            r"^gan\.feature_networks: nowhere: no such folder; give one as save_pretrained writes",
        ),
        ({"feature_networks": ("squeezenet:nowhere",)}, r"^gan\.feature_networks: nowhere: no weights there"),
        (
            {"discriminator": "transformer+projected"},
            r"set gan\.discriminator=unet or gigagan or projected or unet\+projected or gigagan\+projected",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    change: dict[str, Any], message: str, teachers: dict[str, str], vit: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_discriminator(teachers["sd"], replace(settings(vit), **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["gan.mix_z=1"], "mix_z is 1, but projected does not see the noise: .* set mix_z=0"),
        (["gan.noise_augment=uniform"], "noisy latents decode to no image; set noise_augment=none"),
        (["gan.feature_networks=[]"], "feature_networks is .*expected one or more names"),
        (["gan.feature_augment=blur"], "feature_augment' is 'blur'; known: color, cutout, translation"),
        (["gan.virtual_batch=0"], "virtual_batch is 0; expected 1 or more"),
        (["gan.projected_weight=0"], "projected_weight is 0.0; expected a positive number"),
    ],
)
def test_settings_that_contradict_each_other(values: list[str], message: str) -> None:
    config = distill_config(Path("teacher"), Path("pairs"), stage="gan")
    with pytest.raises(SettingError, match=message):
        override(config, ["gan.discriminator=projected", "gan.mix_z=0", *values])


RUN = (
    "gan.loss=hinge",
    "gan.mix_z=0",
    "gan.mix_fraction=0.5",
    "gan.token_heads=2",
    "gan.feature_size=16",
    "gan.virtual_batch=2",
    "gan.r1_interval=2",
    "gan.r1_rows=2",
    "gan.optim.lr=1e-3",
    "optim.lr=1e-3",
)


@pytest.fixture(scope="module")
def pairs(teachers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(Path(teachers["sd"]), tmp_path_factory.mktemp("pairs"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["projected", pytest.param("unet+projected", marks=(pytest.mark.slow, pytest.mark.long))]
)
def test_runs_resume_bit_for_bit(
    name: str, teachers: dict[str, str], vit: str, pairs: Path, tmp_path: Path
) -> None:
    """Heads are trained and saved; the frozen networks are not in the checkpoint."""
    settings = (*RUN, f"gan.discriminator={name}", f'gan.feature_networks=["{vit}"]')
    config, shorter = (
        distill_config(
            Path(teachers["sd"]), pairs, *settings, f"train.images={n}", stage="gan", init="teacher"
        )
        for n in (12, 4)
    )
    assert_resumes_exactly(config, shorter, tmp_path)
    start, end = state_at(tmp_path / "twice", 4), state_at(tmp_path / "once", 12)
    heads = [n for n in end if n.startswith("discriminator.") and "heads.block2" in n]
    assert heads and all(not torch.equal(start[n], end[n]) for n in heads)
    assert not any("model." in n or ".vae." in n for n in end)


def test_a_resume_refuses_a_feature_network_that_has_changed(
    teachers: dict[str, str], vit: str, pairs: Path, tmp_path: Path
) -> None:
    """Every checkpoint of the run is good: the remedy is not to delete one."""
    network = shutil.copytree(vit, tmp_path / "vit")
    settings = (*RUN, "gan.discriminator=projected", f'gan.feature_networks=["{network}"]')
    config, longer = (
        distill_config(
            Path(teachers["sd"]), pairs, *settings, f"train.images={n}", stage="gan", init="teacher"
        )
        for n in (4, 8)
    )
    train(config, tmp_path / "run")
    (network / "more.txt").write_text("another version")
    with pytest.raises(UserError, match=r"gan\.feature_networks has changed since; restore it, or give"):
        train(longer, tmp_path / "run")


STYLES = (
    *("gan.mix_z=0", "gan.token_heads=2", "gan.feature_size=16"),
    *("gan.r1_interval=2", "gan.r1_rows=2", "gan.optim.lr=1e-3", "optim.lr=1e-3", "regression.losses=[]"),
    *("student.kind=gigagan", "student.generator.channel_base=64", "student.generator.channel_max=16"),
    *("student.generator.residual_blocks=1", "gan.feature_heads=modulated"),
)


@pytest.mark.slow
def test_the_vision_aided_loss_trains_a_student_of_latents(
    teachers: dict[str, str], pairs: Path, tmp_path: Path
) -> None:
    """As in GigaGAN, beside another discriminator; resumes bit for bit, and the projection stays."""
    clip = vision_models.save_clip_model(tmp_path / "clip")
    settings = (*STYLES, "gan.discriminator=unet+projected", "gan.z_conditioning=false")
    config, shorter = (
        distill_config(
            Path(teachers["sd"]),
            pairs,
            *(*settings, f'gan.feature_networks=["{clip}"]', f"train.images={n}"),
            stage="gan",
        )
        for n in (12, 4)
    )
    assert_resumes_exactly(config, shorter, tmp_path)
    start, end = state_at(tmp_path / "twice", 4), state_at(tmp_path / "once", 12)
    heads = {n: torch.equal(start[n], end[n]) for n in end if ".second.heads." in n and n in start}
    fixed = {n for n, same in heads.items() if same}
    assert fixed == {n for n in heads if n.endswith("projection")} != set()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("heads", ["tokens", "modulated"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_like_one(
    engine: str, heads: str, teachers: dict[str, str], vit: str, pairs: Path, tmp_path: Path
) -> None:
    """The virtual batch divides a process's rows, so the groups of rows are the same."""
    config = distill_config(Path(teachers["sd"]), pairs, stage="gan", init="teacher")
    settings = (
        *(RUN if heads == "tokens" else [s for s in RUN if "virtual_batch" not in s]),
        f"gan.feature_heads={heads}",
        "gan.discriminator=unet+projected",
        f'gan.feature_networks=["{vit}"]',
        "train.images=12",
    )
    succeed(d2g(distill_arguments(config, tmp_path / "one", *settings), tmp_path / "log"))
    command = distill_arguments(config, tmp_path / "two", *settings, f"engine.parallel={engine}")
    succeed(*d2g_ranks(command, tmp_path / "log"))
    names = ("loss/d", "loss/g_gan", "loss/g", "grad/d", "grad/g", "loss/r1")
    # Reports at every step: the first is from before an update.
    one, two = (losses(tmp_path / run) for run in ("one", "two"))
    assert len(one) == len(two) == 3 and sum(name in line for line in one for name in names) == 17
    for step, (alone, shared) in enumerate(zip(one, two, strict=True)):
        for name in set(names) & alone.keys():
            # After one, gradients through GroupNorm of one channel differ by 1e-3 with the rows of a pass,
            # and losses by 2e-4.
            rounded = 5e-3 if name.startswith("grad/") else 5e-4
            rel = rounded if heads == "modulated" and step > 0 else 1e-4
            assert shared[name] == pytest.approx(alone[name], rel=rel), (step, name)


@pytest.mark.slow
def test_the_d2o_recipe_trains_a_student_of_pixels(vit: str, tmp_path: Path) -> None:
    """Its settings on a tiny EDM: images alone, without regression, convolutions frozen; resumes exactly."""
    teacher = Path(tiny_teachers.save_kind("edm", tmp_path / "edm"))
    for number in range(6):
        (tmp_path / "images" / str(number)).mkdir(parents=True)
        pixels = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=generator(number))
        save_png(pixels, tmp_path / "images" / str(number) / "0.png", {})
    recipe = PIXEL_RECIPES["d2o"]["gan"]
    own = distill_config(teacher, Path(), stage="gan")
    gan = replace(
        recipe.gan,
        feature_networks=(vit,),
        feature_size=16,
        token_heads=2,
        r1_rows=2,
        real=str(tmp_path / "images"),
    )
    config = replace(recipe, teacher=str(teacher), gan=gan, train=own.train)
    config = override(config, ["train.images=12", "optim.lr=1e-3"])
    assert_resumes_exactly(config, override(config, ["train.images=4"]), tmp_path)
    start, end = state_at(tmp_path / "twice", 4), state_at(tmp_path / "once", 12)
    weights = {n for n in end if n.startswith("student.") and n.endswith("weight")}
    still = {n for n in weights if torch.equal(start[n], end[n])}
    assert (
        still
        and all(".conv1." in n or ".conv2." in n or "samplers." in n for n in still)
        and still != weights
    )
