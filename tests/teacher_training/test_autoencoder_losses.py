"""Perceptual and adversarial terms of the autoencoder: values, exact resume, two ranks, older folders."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from d2g.core.distributed import process_group
from d2g.core.errors import Interrupted, SettingError, UserError
from d2g.core.tracking.run_directory import RunLog, read_stats
from d2g.diffusion.latents import from_uint8
from d2g.vision.normalization import HALF
from distill.models.feature_networks import ConvolutionalNetwork
from forks import on_ranks
from own_pictures import CONFIG, image_folder, random_images, reports
from runs import equal
from teacher_training.autoencoder import autoencoder_loss, build_autoencoder, train_autoencoder
from teacher_training.autoencoder_losses import (
    LARGEST_WEIGHT,
    FeatureDistance,
    adaptive_weight,
    mean_feature_distance,
    open_discriminator,
    open_perceptual,
    patch_discriminator,
)
from teacher_training.config import AutoencoderConfig, FitConfig
from teacher_training.loop import fit_modules
from teacher_training.speed import measure_speed
from teacher_training.train import train_teacher

BATCH = 8
PLAIN = AutoencoderConfig(
    channels=(8, 8),
    latent_channels=4,
    fit=FitConfig(images=6 * BATCH, batch_size=BATCH, lr=2e-3, warmup_images=16, ema=0.5),
)
ADVERSARIAL = replace(PLAIN, adversarial_weight=0.5)  # from 24 of 48 images on
BOTH = replace(ADVERSARIAL, perceptual_weight=1.0)


def train(folder: Path, config: AutoencoderConfig, stop_at: int = -1) -> nn.Module:
    def progress(label: str, done: int, total: int) -> None:
        if done == stop_at:
            signal.raise_signal(signal.SIGINT)

    perceptual = open_perceptual(config)
    log, images = RunLog(folder, {}), random_images()
    vae: nn.Module = train_autoencoder(images, config, log, 5, progress, perceptual=perceptual)
    return vae


def weights(folder: Path, name: str, nimg: int = 48) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"{nimg:09d}" / f"{name}.safetensors")


def checkpoint_state(folder: Path) -> list[Any]:
    """Everything in the last checkpoint: weights, averages, the discriminator and both optimizers."""
    state = torch.load(folder / "checkpoints" / "000000048" / "state.pt")
    assert set(state) == {"optimizer", "discriminator"}
    return [state, *(weights(folder, name) for name in ("model", "ema", "discriminator"))]


def test_the_perceptual_distance_is_that_of_unit_vectors() -> None:
    """With pixels themselves as features: orthogonal colors at one of two places are at distance 2 there."""
    network = ConvolutionalNetwork(nn.Identity(), [nn.Identity()], [3], 1, "pixels", HALF)
    red, green = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.0])
    pixels = torch.stack([red, red], dim=1).view(1, 3, 1, 2)
    others = torch.stack([green, 0.25 * red], dim=1).view(1, 3, 1, 2)
    torch.testing.assert_close(FeatureDistance(network)(pixels, others), torch.tensor([1.0]))


def test_the_distance_of_the_real_network_sees_blur_and_has_a_gradient() -> None:
    distance = open_perceptual(BOTH)
    assert distance is not None and open_perceptual(PLAIN) is None
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    gray = images.float().mean((2, 3), keepdim=True).to(torch.uint8).expand_as(images)
    assert (
        mean_feature_distance(distance, images, images)
        == 0.0
        < 0.1
        < mean_feature_distance(distance, images, gray)
    )
    others = from_uint8(gray).requires_grad_(True)
    distance(from_uint8(images), others).sum().backward()
    assert others.grad is not None and others.grad.norm() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_the_adaptive_weight_is_the_ratio_of_gradients_up_to_its_limit() -> None:
    layer = torch.ones(5, requires_grad=True)
    rec, fake, nothing = (6 * layer).sum(), (-2 * layer).sum(), (0 * layer).sum()
    weight = adaptive_weight(rec, fake, layer)
    assert weight.item() == pytest.approx(3.0, rel=1e-5) and not weight.requires_grad
    assert adaptive_weight(rec, nothing, layer).item() == LARGEST_WEIGHT and layer.grad is None


def test_logits_are_for_patches_of_26_pixels() -> None:
    net, pixels = patch_discriminator(8), torch.zeros(1, 3, 64, 64, requires_grad=True)
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            nn.init.ones_(layer.weight)
    convolutions = nn.Sequential(*(layer for layer in net if isinstance(layer, nn.Conv2d)))
    logits = convolutions(pixels)
    assert logits.shape == net(pixels).shape == (1, 1, 16, 16)
    logits[0, 0, 8, 8].backward()
    assert pixels.grad is not None
    touched = pixels.grad[0, 0].nonzero()
    assert (touched.amax(0) - touched.amin(0) + 1).tolist() == [26, 26]


def test_the_term_is_a_share_of_the_other_gradients_and_leaves_none_in_the_discriminator() -> None:
    torch.manual_seed(0)
    vae = build_autoencoder(PLAIN, 16)
    discriminator = open_discriminator(vae, ADVERSARIAL)
    assert discriminator is not None and open_discriminator(vae, PLAIN) is None
    discriminator.begin(23)
    assert not discriminator.active and discriminator.loss() is None
    discriminator.begin(24)
    pixels = from_uint8(random_images(4))
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    rec = (decoded - pixels).abs().mean()
    term, _ = discriminator.term(rec, pixels, decoded)
    gradients = [torch.autograd.grad(x, discriminator.last_layer, retain_graph=True)[0] for x in (term, rec)]
    assert gradients[0].norm().item() == pytest.approx(0.5 * gradients[1].norm().item(), rel=1e-3)
    term.backward()
    assert all(parameter.grad is None for parameter in discriminator.module.parameters())
    # Its own loss leaves none in the autoencoder.
    before = discriminator.last_layer.grad
    loss = discriminator.loss()
    assert before is not None and loss is not None
    before = before.clone()
    loss.backward()
    assert all(parameter.grad is not None for parameter in discriminator.module.parameters())
    assert torch.equal(before, discriminator.last_layer.grad)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    folder = tmp_path_factory.mktemp("unbroken")
    return train(folder, BOTH), folder


@pytest.mark.parametrize("stop_at", [16, 32])
def test_a_resumed_training_equals_an_unbroken_one(
    stop_at: int, unbroken: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    """Stopped before and after the discriminator begins."""
    with pytest.raises(Interrupted):
        train(tmp_path, BOTH, stop_at)
    resumed, (expected, folder) = train(tmp_path, BOTH), unbroken
    assert equal(dict(resumed.state_dict()), dict(expected.state_dict()))
    assert equal(checkpoint_state(tmp_path), checkpoint_state(folder))
    assert reports(tmp_path) == reports(folder)


def test_the_discriminator_begins_at_its_share_of_the_images(unbroken: tuple[nn.Module, Path]) -> None:
    vae, folder = unbroken
    lines = reports(folder)
    learned = [line["nimg"] for line in lines if "loss/discriminator" in line]
    assert learned == [32, 40, 48]  # reports are written after the step
    assert all(line["adversarial/weight"] > 0 for line in lines if line["nimg"] in learned)
    assert all(line["loss/perceptual"] > 0 for line in lines)
    # The averages are of the autoencoder alone, and they are what is returned.
    averages = weights(folder, "ema")
    assert all(name.startswith("vae.") for name in averages)
    assert equal({f"vae.{name}": value for name, value in vae.state_dict().items()}, averages)


def test_without_the_terms_nothing_changes(tmp_path: Path) -> None:
    """No files of a discriminator, and the weights of a training whose discriminator never begins."""
    train(tmp_path / "plain", PLAIN)
    assert not list(tmp_path.rglob("discriminator.*"))
    train(tmp_path / "late", replace(ADVERSARIAL, adversarial_start=0.99))
    assert equal(*(weights(tmp_path / name, "model") for name in ("plain", "late")))


def on_two_ranks(folder: Path, stop_at: int = -1) -> Callable[[int], None]:
    """A training on a rank that ends with the same discriminator as on the other."""

    def work(rank: int) -> None:
        process_group.init()
        images, torch_seed = random_images(), 7 + rank
        torch.manual_seed(torch_seed)  # rank 0's initial weights are everybody's
        vae = build_autoencoder(ADVERSARIAL, 16)
        discriminator = open_discriminator(vae, ADVERSARIAL)
        assert discriminator is not None
        loss_of = autoencoder_loss(vae, images, ADVERSARIAL, None, discriminator)

        def progress(label: str, done: int, total: int) -> None:
            if done == stop_at and rank == 1:
                signal.raise_signal(signal.SIGINT)

        log = RunLog(folder, {})
        try:
            fit_modules(
                "vae",
                log,
                {"vae": vae},
                loss_of,
                24,
                ADVERSARIAL.fit,
                5,
                progress,
                discriminator=discriminator,
            )
            assert stop_at < 0
        except Interrupted:
            assert stop_at > 0
        both = process_group.gather_objects(
            {name: value.tolist() for name, value in discriminator.module.state_dict().items()}
        )
        assert both[0] == both[1]
        process_group.finish()

    return work


@pytest.mark.slow
def test_two_ranks_have_one_discriminator_and_resume(tmp_path: Path) -> None:
    on_ranks(2, on_two_ranks(tmp_path / "unbroken"))
    on_ranks(2, on_two_ranks(tmp_path / "broken", stop_at=32))
    assert not (tmp_path / "broken/checkpoints/000000048").exists()
    on_ranks(2, on_two_ranks(tmp_path / "broken"))
    assert equal(*(checkpoint_state(tmp_path / name) for name in ("broken", "unbroken")))


@pytest.mark.slow
def test_teachers_report_the_distance_and_older_ones_go_on(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    image_folder(tmp_path / "data")
    config = replace(CONFIG, data=str(tmp_path / "data"))
    stages = ("data", "vae")
    with_term = replace(config, vae=replace(config.vae, perceptual_weight=1.0))
    scores = train_teacher(with_term, tmp_path / "perceptual", stages).scores["vae"]
    assert 0 < scores["perceptual"] < 4
    lines = read_stats(tmp_path / "perceptual/training/vae")
    assert lines[-1]["preview/perceptual"] == pytest.approx(scores["perceptual"], rel=1e-4)
    # The config.json of an older version has none of these settings.
    out = tmp_path / "older"
    assert "perceptual" not in train_teacher(config, out, stages).scores["vae"]
    file = out / "training/vae/config.json"
    old = json.loads(file.read_text())
    new = {"perceptual_weight", "adversarial_weight", "adversarial_start", "adversarial_lr"}
    file.write_text(json.dumps({name: value for name, value in old.items() if name not in new}))
    with pytest.raises(UserError, match="another config: perceptual_weight"):
        train_teacher(with_term, out, stages)
    train_teacher(config, out, stages)


def test_the_plan_counts_the_terms() -> None:
    """Their seconds, and the discriminator's checkpoints."""
    # Other work can make a single measurement long: the least of three is compared.
    plain = [measure_speed(replace(CONFIG, vae=PLAIN), ("vae",)) for _ in range(3)]
    both = measure_speed(replace(CONFIG, vae=replace(BOTH, adversarial_start=0.0)), ("vae",))
    parameters = sum(p.numel() for p in patch_discriminator().parameters())
    assert both.fixed_bytes - plain[0].fixed_bytes == 24 * parameters
    assert both.seconds["vae"] > min(speed.seconds["vae"] for speed in plain)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("perceptual_weight", -1.0),
        ("adversarial_weight", -1.0),
        ("adversarial_start", 1.0),
        ("adversarial_lr", 0.0),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    wrong: Any = {name: value}
    with pytest.raises(SettingError, match=rf"^{name} is {value}"):
        replace(PLAIN, **wrong)
