import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from d2g.core.errors import Interrupted, UserError
from latent_lpips.config import CalibrateConfig, LPIPSConfig, LPIPSTrainConfig, TrunkTrainConfig
from latent_lpips.distance import LatentLPIPS
from latent_lpips.training.small import (
    RankingNet,
    calibrate_heads,
    learning_rate_factor,
    rescale_heads,
    split_rows,
    train_latent_lpips,
    train_trunk,
    two_afc_agreement,
    two_afc_of_metric,
)
from latent_lpips.training.synthetic_triplets import (
    DISTORTIONS,
    Triplets,
    caption_targets,
    synthetic_triplets,
)
from latent_lpips.vgg import VGG16

NETWORK = LPIPSConfig(width=1 / 16)
TRUNK = TrunkTrainConfig(
    optimizer="adamw", lr=5e-3, schedule="onecycle", batch=32, images=3200, grid=1, held_out=0.2, dropout=0.1
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def separable() -> tuple[Tensor, Tensor]:
    """Latents whose class is the index of the channel with a raised mean."""
    labels = torch.arange(200) % 3
    lift = F.one_hot(labels, 4).float()[:, :, None, None]
    return torch.randn(200, 4, 4, 4, generator=rng()) + 3 * lift, labels


def test_trunk_learns_separable_classes_and_attributes() -> None:
    latents, labels = separable()
    _, scores = train_trunk(NETWORK, latents, labels, TRUNK)
    assert scores["top1"] > 0.9
    model, scores = train_trunk(NETWORK, latents, F.one_hot(labels, 3).float(), TRUNK)
    assert scores["accuracy"] > 0.9
    assert not model.training


def test_paper_recipe_learns() -> None:
    latents, labels = separable()
    config = TrunkTrainConfig(lr=0.01, batch=32, images=3200, grid=1, dropout=0.1, held_out=0.2)
    assert train_trunk(NETWORK, latents, labels, config)[1]["top1"] > 0.8


def test_training_is_deterministic_and_keeps_the_global_random_state() -> None:
    latents, labels = separable()
    config = replace(TRUNK, images=160)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one, _ = train_trunk(NETWORK, latents, labels, config, seed=4)
    assert torch.equal(torch.rand(3), expected)
    two, _ = train_trunk(NETWORK, latents, labels, config, seed=4)
    other, _ = train_trunk(NETWORK, latents, labels, config, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_a_stopped_trunk_goes_on_exactly(tmp_path: Path) -> None:
    """Dropout draws from the global random state, which the checkpoint holds too."""
    latents, labels = separable()
    config = replace(TRUNK, images=256, dropout=0.3)
    expected, expected_scores = train_trunk(NETWORK, latents, labels, config)

    def stop(label: str, done: int, total: int) -> None:
        if done == 96:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "checkpoints"
    with pytest.raises(Interrupted, match=r"trunk stopped; safe on disk: .*000000096; run the same command"):
        train_trunk(NETWORK, latents, labels, config, progress=stop, checkpoints=folder)
    torch.rand(7)  # another start has another random state
    images_done: list[int] = []

    def go_on() -> tuple[VGG16, dict[str, float]]:
        images_done.clear()
        return train_trunk(
            NETWORK,
            latents,
            labels,
            config,
            progress=lambda label, done, total: images_done.append(done),
            checkpoints=folder,
        )

    resumed, scores = go_on()
    assert images_done[0] == 128 and scores == expected_scores
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), expected.parameters(), strict=True))
    go_on()
    assert images_done == [], "a finished training makes no further step"


def test_limits_in_images_and_minutes() -> None:
    latents, labels = separable()
    calls: list[tuple[str, int, int]] = []
    train_trunk(
        NETWORK, latents, labels, replace(TRUNK, images=100), progress=lambda *call: calls.append(call)
    )
    assert [done for _, done, _ in calls] == [32, 64, 96, 100]
    calls.clear()
    endless = replace(TRUNK, images=10**9, minutes=0.3 / 60)
    train_trunk(NETWORK, latents, labels, endless, progress=lambda *call: calls.append(call))
    assert 0 < len(calls) < 10_000


def test_a_non_finite_loss_stops_the_training() -> None:
    latents, labels = separable()
    latents[:] = math.nan
    with pytest.raises(UserError, match="loss is nan after 0 latents, expected a finite one; lower"):
        train_trunk(NETWORK, latents, labels, TRUNK)


def test_learning_rates_follow_the_schedules() -> None:
    assert [learning_rate_factor("step", f) for f in (0, 0.3, 0.34, 0.7)] == pytest.approx([1, 1, 0.1, 0.01])
    rates = [learning_rate_factor("onecycle", f / 100) for f in range(100)]
    assert max(rates) == pytest.approx(1, abs=0.01) and rates.index(max(rates)) in (9, 10)
    assert rates[0] < 0.1 and rates[-1] < 0.01


def test_split_is_disjoint_complete_and_repeatable() -> None:
    train, held = split_rows(40, 0.1, 3)
    assert sorted(train.tolist() + held.tolist()) == list(range(40)) and len(held) == 4
    assert torch.equal(split_rows(40, 0.1, 3)[1], held)
    with pytest.raises(UserError, match="the number of samples is 1; expected at least 2"):
        split_rows(1, 0.1, 0)


def test_caption_targets_are_words_that_distinguish_captions() -> None:
    captions = ["a photo of a Red cube"] * 50 + ["a photo of a blue cube, left"] * 49 + ["a photo of a cat"]
    targets, words = caption_targets(captions, rarest=0.02, commonest=0.9)
    assert words == ["blue", "left", "red"]
    assert targets.sum(0).tolist() == [49, 49, 50] and targets[0].tolist() == [0, 0, 1]
    with pytest.raises(UserError, match="have no word that occurs in"):
        caption_targets(["a photo"] * 5)


def images(count: int) -> Tensor:
    """Smooth random color images, uint8 [count, 3, 32, 32]."""
    coarse = torch.rand(count, 3, 5, 5, generator=rng())
    return (255 * F.interpolate(coarse, (32, 32), mode="bilinear")).to(torch.uint8)


def encode(pixels: Tensor) -> Tensor:
    """Latents of a linear autoencoder: means over 4x4 pixels of the three colors and of their mean."""
    small = F.avg_pool2d(pixels, 4)
    return torch.cat([small, small.mean(1, keepdim=True)], 1)


def test_triplets_are_balanced_repeatable_and_correct() -> None:
    pictures = images(200)
    triplets = synthetic_triplets(pictures, lambda pixels: pixels, seed=1)
    repeated = synthetic_triplets(pictures[:128], lambda pixels: pixels, seed=1)
    assert torch.equal(repeated.p1, triplets.p1[:128])
    assert 0.35 < triplets.judge.mean() < 0.65 and set(triplets.judge.tolist()) == {0.0, 1.0}
    d0, d1 = ((p - triplets.ref).square().mean((1, 2, 3)) for p in (triplets.p0, triplets.p1))
    assert two_afc_agreement(d0, d1, triplets.judge) > 0.8
    assert triplets.p0.abs().max() <= 1 and triplets.p0.shape == pictures.shape


@pytest.mark.parametrize("distortion", DISTORTIONS, ids=lambda d: d.__name__)
def test_each_distortion_grows_with_its_strength(distortion: object) -> None:
    pixels = images(16).float() / 127.5 - 1
    errors = []
    for strength in (0.05, 0.3, 1.0):
        distorted = distortion(pixels, torch.full((16, 1, 1, 1), strength), rng())  # type: ignore[operator]
        assert distorted.shape == pixels.shape
        errors.append((distorted - pixels).square().mean().item())
    assert 0 < errors[0] < errors[1] < errors[2]


def one_channel_matters(count: int) -> Triplets:
    """Judgments depend on channel 0 only; the other channels change more, at random."""
    ref = torch.randn(count, 4, 8, 8, generator=rng(1))
    size = torch.rand(2, count, 1, 1, 1, generator=rng(2))
    noise = torch.randn(2, count, 4, 8, 8, generator=rng(3))
    noise[:, :, :1] *= size
    noise[:, :, 1:] *= torch.rand(2, count, 1, 1, 1, generator=rng(4))
    return Triplets(
        ref=ref, p0=ref + noise[0], p1=ref + noise[1], judge=(size[1] < size[0]).float().flatten()
    )


def metric_with_channel_0_features() -> LatentLPIPS:
    """A metric with random features, in which the first half of the first tap depends on channel 0 only."""
    torch.manual_seed(0)
    metric = LatentLPIPS(NETWORK)
    for module in list(metric.trunk.features)[:6]:
        if isinstance(module, torch.nn.Conv2d):
            half = module.weight.shape[0] // 2
            inputs = 1 if module.weight.shape[1] == 4 else half
            with torch.no_grad():
                module.weight[:half, inputs:] = 0
                module.weight[half:, :inputs] = 0
    return metric


def test_calibration_raises_agreement_and_keeps_heads_non_negative() -> None:
    metric, data = metric_with_channel_0_features(), one_channel_matters(600)
    _, held = split_rows(600, 0.3, 0)
    held_out = (data.ref[held], data.p0[held], data.p1[held], data.judge[held])
    trunk = {k: v.clone() for k, v in metric.trunk.state_dict().items()}
    before = two_afc_of_metric(metric, *held_out)
    after = calibrate_heads(metric, data, CalibrateConfig(lr=3e-2, epochs=30, held_out=0.3))
    assert after > before + 0.05
    assert two_afc_of_metric(metric, *held_out) == pytest.approx(after, abs=0.01)
    assert min(head.min() for head in metric.heads) == 0  # the clamp had an effect
    assert all(torch.equal(v, trunk[k]) for k, v in metric.trunk.state_dict().items())
    assert not any(p.requires_grad for p in metric.parameters())


def test_ranking_net_inputs_are_the_five_published_features() -> None:
    net = RankingNet()
    assert [tuple(p.shape) for p in net.parameters()] == [(32, 5), (32,), (32, 32), (32,), (1, 32), (1,)]
    d0, d1 = torch.tensor([0.5, 0.2]), torch.tensor([0.1, 0.4])
    by_hand = torch.tensor([[0.5, 0.1, 0.4, 2.5, 1 / 6], [0.2, 0.4, -0.2, 0.4, 4 / 3]])
    torch.testing.assert_close(net(d0, d1), net.layers(by_hand)[:, 0])


def test_rescaling_sets_the_mean_distance_of_unrelated_latents() -> None:
    metric, latents = metric_with_channel_0_features(), torch.randn(300, 4, 8, 8, generator=rng())
    rescale_heads(metric, latents, 0.7)
    assert metric(latents, latents.roll(1, 0)).mean().item() == pytest.approx(0.7, rel=0.02)
    with pytest.raises(UserError, match="distance of unrelated latents is 0,"):
        rescale_heads(metric, latents[:1].expand(4, -1, -1, -1), 1.0)


def test_complete_training_from_captions_and_images() -> None:
    pictures = images(200)
    pictures[::2, 0] //= 4
    captions = ["a cyan picture", "a grey picture"] * 100
    latents = encode(pictures.float() / 127.5 - 1)
    config = LPIPSTrainConfig(
        network=NETWORK, trunk=TRUNK, calibrate=CalibrateConfig(lr=3e-3, epochs=5), triplets=200
    )
    labels: set[str] = set()
    metric, scores = train_latent_lpips(
        config, latents, captions, pictures, encode, progress=lambda label, *_: labels.add(label)
    )
    assert scores["accuracy"] > 0.8 and scores["two_afc"] > 0.6
    assert set(scores) == {"accuracy", "two_afc", "two_afc_before"}
    assert labels == {"LatentLPIPS trunk", "LatentLPIPS features", "LatentLPIPS heads", "triplets"}
    assert metric(latents, latents.roll(1, 0)).mean().item() == pytest.approx(1, rel=0.02)
    with pytest.raises(UserError, match="got 3 captions for 200 latents"):
        train_latent_lpips(config, latents, captions[:3], pictures, encode)
