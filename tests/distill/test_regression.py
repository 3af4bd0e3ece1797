"""distill.losses.regression: each loss against its closed form or the library that defines it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2g.core.config import override
from d2g.core.errors import SettingError, UserError
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode
from distill.config.regression import RegressionConfig
from distill.config.run import DistillConfig, TrainConfig
from distill.losses.regression import base
from distill.losses.regression.decoder_features import EPSILON, MAX_DEVIATION, DecoderFeatures
from distill.losses.regression.mse import squared_error
from distill.losses.regression.pseudo_huber import pseudo_huber
from distill.losses.regression.registry import REGRESSION_LOSSES
from distill.losses.regression.regression import Regression, build_regression
from latent_lpips.weights import load_lpips, save_lpips


def build(teacher: Path, losses: str = "e_latent_lpips", **settings: Any) -> Regression:
    config = DistillConfig(
        teacher=str(teacher), regression=RegressionConfig(**settings), train=TrainConfig(precision="fp32")
    )
    return build_regression(override(config, [f"regression.losses={losses}"]), 4)


def test_weights_of_another_latent_space_are_noticed(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SD's and SDXL's latents have four channels each: a metric of one has no meaning on the other."""
    trunk = load_lpips(teacher / "latent_lpips", fold=False)
    config = DistillConfig(teacher=str(teacher), lpips=str(tmp_path), train=TrainConfig(precision="fp32"))
    save_lpips(trunk, tmp_path, {"scaling_factor": 0.13025, "shift_factor": 0.0})
    with pytest.raises(UserError, match=r"take latents of scale 0.13025 and shift 0, .* has 0.7 and 0; give"):
        build_regression(config, 4)
    # Other files may hold the same autoencoder.
    save_lpips(trunk, tmp_path, {"autoencoder": "mine", "autoencoder_sha256": "abc" * 20})
    build_regression(config, 4)
    assert "trained in the latents of mine (sha256 abcabcabcabc), but" in caplog.text
    caplog.clear()
    own = {"autoencoder_sha256": pretrained.autoencoder_sha256(str(teacher))}
    save_lpips(trunk, tmp_path, {**own, "scaling_factor": 0.7, "shift_factor": 0.0})
    build_regression(config, 4)
    assert not caplog.text


def latents(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def evaluate_loss(regression: Regression, pred: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    transforms = regression.draw(len(pred), (4, 4, 4), torch.Generator().manual_seed(2))
    total, parts = regression(pred, target, transforms)
    return total, parts


def test_the_registry_has_one_file_for_each_kind() -> None:
    folder = Path(base.__file__).parent
    entries = {path.stem for path in folder.glob("*.py") if " = RegressionLoss(" in path.read_text()}
    assert entries == set(REGRESSION_LOSSES) == {loss.name for loss in REGRESSION_LOSSES.values()}
    assert len({loss.log_key for loss in REGRESSION_LOSSES.values()}) == len(entries)
    fields = RegressionConfig.__dataclass_fields__
    assert all(setting in fields for loss in REGRESSION_LOSSES.values() for setting in loss.settings)


def test_squared_error_and_pseudo_huber_closed_forms() -> None:
    a, b = torch.zeros(2, 4, 2, 2), torch.stack([torch.full((4, 2, 2), 3.0), torch.zeros(4, 2, 2)])
    assert squared_error(a, b).tolist() == [9.0, 0.0]
    c = 0.5 * math.sqrt(16)
    expected = [math.sqrt(16 * 9 + c * c) - c, 0.0]
    assert pseudo_huber(a, b, 0.5).tolist() == pytest.approx(expected, rel=1e-6)


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away() -> None:
    c = 0.00054 * math.sqrt(64)
    near, far = torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4)
    near[0, 0, 0, 0], far[0, 0, 0, 0] = 0.01 * c, 1e4
    zero = torch.zeros(1, 4, 4, 4, dtype=torch.float64)
    assert pseudo_huber(near.double(), zero, 0.00054).item() == pytest.approx(
        (0.01 * c) ** 2 / (2 * c), rel=1e-3
    )
    assert pseudo_huber(far, zero.float(), 0.00054).item() == pytest.approx(1e4, rel=1e-5)
    at_zero = torch.zeros(1, 4, 4, 4, requires_grad=True)
    pseudo_huber(at_zero, zero.float(), 0.00054).sum().backward()
    assert at_zero.grad is not None and at_zero.grad.abs().max() == 0


@pytest.mark.parametrize("kind", sorted(REGRESSION_LOSSES.keys() - {"lpips"}))
def test_each_kind_is_a_distance_with_a_gradient(teacher: Path, kind: Any) -> None:
    regression, target = build(teacher, f"{kind}:2"), latents(1)
    pred = latents().requires_grad_(True)
    total, parts = evaluate_loss(regression, pred, target)
    assert set(parts) == {f"loss/{kind}"}
    assert total.item() == pytest.approx(2 * parts[f"loss/{kind}"].item()) and total.item() > 0
    total.backward()
    assert pred.grad is not None and (pred.grad.abs().amax((1, 2, 3)) > 0).all()
    assert evaluate_loss(regression, target, target)[0].item() == pytest.approx(0.0, abs=1e-6)
    metric = load_lpips(str(teacher / "latent_lpips"), 4)
    expected = {
        "latent_lpips": lambda: metric(pred, target).mean(),
        "mse": lambda: torch.nn.functional.mse_loss(pred, target),
        "l1": lambda: torch.nn.functional.l1_loss(pred, target),
        "pseudo_huber": lambda: pseudo_huber(pred, target, 0.00054).mean(),
    }
    if kind in expected:
        torch.testing.assert_close(parts[f"loss/{kind}"], expected[kind]())


def test_weighted_losses_are_summed(teacher: Path) -> None:
    pred, target = latents(), latents(1)
    mse, _ = evaluate_loss(build(teacher, "mse"), pred, target)
    total, parts = evaluate_loss(build(teacher, "mse,latent_lpips:3,l1:0.5"), pred, target)
    assert set(parts) == {"loss/mse", "loss/latent_lpips", "loss/l1"}
    assert parts["loss/l1"].item() == pytest.approx((pred - target).abs().mean().item())
    expected = mse + 3 * parts["loss/latent_lpips"] + 0.5 * parts["loss/l1"]
    torch.testing.assert_close(total, expected)


def test_draws_and_augmentations_apply_to_e_latent_lpips_only(teacher: Path) -> None:
    pred, target = latents(), latents(1)
    augmented, plain = build(teacher, augment="none"), build(teacher, "latent_lpips")
    torch.testing.assert_close(
        evaluate_loss(augmented, pred, target)[0], evaluate_loss(plain, pred, target)[0]
    )
    rng = torch.Generator().manual_seed(0)
    two = build(teacher, draws=2).draw(3, (4, 4, 4), rng)
    assert two is not None and len(two) == 2 and plain.draw(3, (4, 4, 4), rng) is None


def test_metric_weights_are_loaded_only_if_needed(teacher: Path, tmp_path: Path) -> None:
    config = DistillConfig(teacher=str(teacher), lpips=str(tmp_path))
    build_regression(override(config, ["regression.losses=mse"]), 4)
    for losses in ("latent_lpips", "mse,latent_lpips"):
        with pytest.raises(UserError):
            build_regression(override(config, [f"regression.losses={losses}"]), 4)


def test_pixel_lpips_compares_decoded_latents(teacher: Path, tmp_path: Path) -> None:
    """Reference: the lpips package on decoded and resized images."""
    import warnings

    import lpips
    import torchvision

    torch.manual_seed(0)
    file = tmp_path / "squeeze.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), file)
    regression = build(teacher, "lpips", lpips_net="squeeze", lpips_weights=str(file), lpips_resize=40)
    pred, target = latents().requires_grad_(True), latents(1)
    total, parts = evaluate_loss(regression, pred, target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    reference.net.load_state_dict(regression.distances["lpips"].function.trunk.state_dict())
    vae = pretrained.load_vae(str(teacher))
    images = [
        torch.nn.functional.interpolate(decode(vae, x), (40, 40), mode="bilinear") for x in (pred, target)
    ]
    torch.testing.assert_close(total, reference(*images).mean(), rtol=1e-4, atol=1e-6)
    total.backward()
    assert set(parts) == {"loss/lpips"} and pred.grad is not None and pred.grad.abs().max() > 0
    assert all(p.grad is None for p in regression.parameters())


def test_decoder_features_match_the_definition(teacher: Path) -> None:
    """Apply the definition to block outputs that forward hooks record during `vae.decode`."""
    vae, blocks = pretrained.load_vae(str(teacher)), 1
    distance, pred, target = DecoderFeatures(vae, blocks), latents(), latents(1)
    outputs: dict[str, list[Tensor]] = {}
    for name, block in (("mid", vae.decoder.mid_block), ("up", vae.decoder.up_blocks[0])):
        outputs[name] = []
        block.register_forward_hook(lambda _, args, output, name=name: outputs[name].append(output))
    for x in (pred, target):
        decode(vae, x)
    expected = torch.zeros(3)
    for name in ("mid", "up"):
        pred_features, target_features = outputs[name]
        std, mean = torch.std_mean(target_features, dim=(2, 3), keepdim=True, correction=0)
        scale = (std.square() + EPSILON).rsqrt()
        mask = ((target_features - mean) * scale).abs() <= MAX_DEVIATION
        error = (((pred_features - target_features) * scale).square() * mask).mean(dim=(1, 2, 3))
        expected += error * 4 / target_features.shape[-1]
    torch.testing.assert_close(distance(pred, target), expected)


def test_decoder_features_need_a_decoder_of_enough_blocks(teacher: Path) -> None:
    with pytest.raises(SettingError, match=r"decoder_blocks is 9; expected at most \d"):
        build(teacher, "decoder_features", decoder_blocks=9)
    with pytest.raises(SettingError, match="reads an AutoencoderKL's decoder; got Linear"):
        DecoderFeatures(torch.nn.Linear(1, 1), 1)
