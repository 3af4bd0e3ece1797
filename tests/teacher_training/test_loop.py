"""teacher_training.loop: an interrupted training resumes exactly; a non-finite loss stops it."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from d2g.core.errors import Interrupted, SettingError
from d2g.core.tracking.run_directory import RunLog
from d2g.diffusion.latents import decode, encode, from_uint8
from distill.models.ema import warmed_up_beta
from own_pictures import random_images, reports
from teacher_training.autoencoder import reconstruction_loss, train_autoencoder
from teacher_training.config import AutoencoderConfig, FitConfig
from teacher_training.loop import cosine_learning_rate, fit_modules

FIT = FitConfig(images=96, batch_size=8, lr=2e-3, warmup_images=16, ema=0.5)
VAE = AutoencoderConfig(channels=(8, 8), latent_channels=4, fit=FIT)


def run(folder: Path, stop_at: int = -1) -> nn.Module:
    def progress(label: str, done: int, total: int) -> None:
        if done == stop_at:
            signal.raise_signal(signal.SIGINT)

    return train_autoencoder(random_images(), VAE, RunLog(folder, {}), 5, progress)


@pytest.fixture(scope="module")
def unbroken_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    folder = tmp_path_factory.mktemp("unbroken")
    return run(folder), folder


def test_a_resumed_training_equals_an_unbroken_one(
    unbroken_run: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    """After SIGINT, weights, EMA weights and reports of the resumed run equal those of an unbroken run."""
    with pytest.raises(
        Interrupted, match=r"vae stopped; safe on disk: .*000000040; run the same command again"
    ):
        run(tmp_path, stop_at=40)
    resumed, (expected, folder) = run(tmp_path), unbroken_run
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in resumed.state_dict().items())
    assert resumed.config.scaling_factor == expected.config.scaling_factor
    a, b = (f / "checkpoints" / "000000096" for f in (tmp_path, folder))
    for name in ("model", "ema"):
        one, two = (load_file(path / f"{name}.safetensors") for path in (a, b))
        assert all(torch.equal(one[k], two[k]) for k in one)
    assert reports(tmp_path) == reports(folder) and len(reports(folder)) == 12


def test_reports_of_a_training_that_was_killed_before_its_first_checkpoint_are_dropped(
    unbroken_run: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    def fail(label: str, done: int, total: int) -> None:
        if done == 40:
            raise RuntimeError("the machine is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        train_autoencoder(random_images(), VAE, RunLog(tmp_path, {}), 5, fail)
    assert len(reports(tmp_path)) == 4
    run(tmp_path)
    assert reports(tmp_path) == reports(unbroken_run[1])


def test_the_vae_learns_and_its_latents_have_unit_variance(unbroken_run: tuple[nn.Module, Path]) -> None:
    vae, folder = unbroken_run
    lines = reports(folder)
    assert lines[-1]["loss/rec"] < 0.8 * lines[0]["loss/rec"]
    with torch.no_grad():
        latents = encode(vae, from_uint8(random_images()))
        assert latents.shape == (24, 4, 8, 8) and abs(latents.std().item() - 1) < 0.02
        assert decode(vae, latents).shape == (24, 3, 16, 16)
    assert not any(p.requires_grad for p in vae.parameters())


def test_latents_of_a_sorted_folder_have_unit_variance(tmp_path: Path) -> None:
    """The first 1,024 pictures are black, and their latents vary otherwise."""
    images = random_images(2048)
    images[:1024] = 0
    vae = train_autoencoder(images, VAE, RunLog(tmp_path, {}), 5)
    with torch.no_grad():
        latents = torch.cat([encode(vae, from_uint8(part)) for part in images.split(256)])
    assert latents.std().item() == pytest.approx(1.0, abs=0.02)


def test_reconstruction_loss_has_l1_l2_and_edge_terms() -> None:
    pixels = torch.zeros(1, 1, 2, 2)
    decoded = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]]]])
    # mean |error| 2/4, mean square 4/4; row differences |2|, |0| and column differences |2|, |0|
    assert reconstruction_loss(pixels, decoded, 0.0, 0.0).item() == 0.5
    assert reconstruction_loss(pixels, decoded, 3.0, 0.0).item() == 0.5 + 3 * 1.0
    assert reconstruction_loss(pixels, decoded, 0.0, 2.0).item() == 0.5 + 2 * (1.0 + 1.0)


def test_learning_rates_warm_up_and_decay_to_zero() -> None:
    fit = replace(FIT, lr=1.0, images=192)
    rates = [cosine_learning_rate(n, fit) for n in (0, 8, 96, 192)]
    assert rates[0] == 0.5 and rates[1] == pytest.approx(0.9957, abs=1e-4) and rates[2] == pytest.approx(0.5)
    assert rates[3] == 0.0


def test_learning_rates_scale_with_the_length() -> None:
    """The warm-up takes at most a tenth, so a short training has the same shape as a long one."""
    long = FitConfig(images=100_000, batch_size=10, lr=1.0, warmup_images=50_000)
    short = replace(long, images=1_000)
    for part in (0.01, 0.05, 0.2, 0.5, 0.9):
        a, b = (cosine_learning_rate(int(part * fit.images), fit) for fit in (long, short))
        assert a == pytest.approx(b, abs=0.11), part  # a step is a hundredth of the short training
    assert cosine_learning_rate(90, short) == pytest.approx(0.98, abs=0.01)


def test_the_decay_of_the_average_warms_up() -> None:
    """After n updates it is min(beta, (1 + n) / (10 + n)); the initial weights fade within tens of steps."""
    assert [warmed_up_beta(0.9993, n) for n in (0, 8, 90)] == [0.1, 0.5, 0.91]
    assert warmed_up_beta(0.9, 10_000) == 0.9
    initial_share = 1.0
    for n in range(100):
        initial_share *= warmed_up_beta(0.9993, n)
    assert initial_share < 1e-9 < 0.93 < 0.9993**100
    # A half-life in images gives the decay for any batch size.
    fit = replace(FIT, ema_halflife_images=80)
    assert fit.ema_decay**10 == pytest.approx(0.5) and FIT.ema_decay == 0.5


def test_ema_weights_are_returned(tmp_path: Path) -> None:
    """With one weight and a constant gradient, AdamW changes it by the learning rate per step."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    config = FitConfig(images=2, batch_size=1, lr=1.0, warmup_images=0, weight_decay=0.0, ema=0.75)

    def loss_of(rows: list[int], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss = module.weight.sum()
        return loss, {"loss": loss}

    fit_modules("one", RunLog(tmp_path, {}), {"one": module}, loss_of, 1, config, 0)
    first, second = -1.0, -1.0 - cosine_learning_rate(1, config)
    # Decays 1/10 and 2/11 of the warm-up, on the initial weight 0.
    average = 2 / 11 * (0.9 * first) + 9 / 11 * second
    assert module.weight.item() == pytest.approx(average, rel=1e-5)
    raw = load_file(tmp_path / "checkpoints" / "000000002" / "model.safetensors")
    assert raw["one.weight"].item() == pytest.approx(second, rel=1e-5)


def test_a_non_finite_loss_stops_before_the_step(tmp_path: Path) -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)

    def loss_of(rows: list[int], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (module.weight - 1e30).square().sum()
        return loss, {"loss": loss}

    config = FitConfig(images=4, batch_size=1, lr=1.0)
    with pytest.raises(
        FloatingPointError, match=r"big: loss is inf at image 0; no checkpoint was written before"
    ):
        fit_modules("big", RunLog(tmp_path, {}), {"one": module}, loss_of, 1, config, 0)
    assert module.weight.item() == 1.0 and not list(tmp_path.glob("checkpoints/*"))


def test_invalid_settings_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for wrong in ({"images": 0}, {"batch_size": 0}, {"lr": 0.0}):
        with pytest.raises(SettingError, match=f"^{next(iter(wrong))} is 0"):
            replace(FIT, **wrong)
    with pytest.raises(SettingError, match="multiples of 8"):
        AutoencoderConfig(channels=(8, 9))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        SettingError, match=r"batch_size 8 does not divide over 3 processes; expected a mu.*--gpus"
    ):
        run(tmp_path)
