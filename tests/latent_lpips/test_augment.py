import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latent_lpips import augment
from latent_lpips.augment import AugmentParams, apply_transforms, sample_transforms
from latent_lpips.config import AugmentConfig

STILL = AugmentConfig(
    families="g", integer_shift=0, scale_std=0, rotation=0, stretch_std=0, shift_std=0, flip=False
)
COUNT = 20_000


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def identity_params(letters: str, batch: int, size: tuple[int, int]) -> AugmentParams:
    """Parameters of the identity for every family; tests change single ones with `replace`."""
    config = replace(STILL, families=letters, quarter_turns=False, brightness=0, contrast=0, saturation=0)
    return sample_transforms(config, batch, size, rng())


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """Check range, mean, standard deviation and quartiles of U(low, high)."""
    assert low <= values.min() and values.max() <= high
    assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
    assert values.std().item() == pytest.approx((high - low) / math.sqrt(12), rel=0.03)
    assert np.allclose(np.histogram(values.numpy(), 4, (low, high))[0] / values.numel(), 0.25, atol=0.02)


def assert_normal(values: Tensor, std: float) -> None:
    assert values.mean().item() == pytest.approx(0, abs=4 * std / math.sqrt(values.numel()))
    assert values.std().item() == pytest.approx(std, rel=0.03)
    assert (values.abs() < std).double().mean().item() == pytest.approx(0.6827, abs=0.02)


def test_every_parameter_follows_its_published_distribution() -> None:
    p = sample_transforms(AugmentConfig(), COUNT, (64, 32), rng())
    assert torch.bincount(p.flip.int(), minlength=2).div(COUNT).tolist() == pytest.approx(
        [0.5, 0.5], abs=0.02
    )
    assert torch.bincount(p.quarter.int()).div(COUNT).tolist() == pytest.approx([0.25] * 4, abs=0.02)
    assert torch.equal(p.integer_shift, p.integer_shift.round())
    assert p.integer_shift.abs().amax(0).tolist() == [4, 8]  # x of width 32, y of height 64
    assert (p.integer_shift[:, 1] == 0).double().mean().item() == pytest.approx(1 / 16, abs=0.01)
    assert_normal(p.scale.log2(), 0.2)
    assert_normal(p.stretch.log2(), 0.2)
    assert_normal(p.shift, 0.125)
    assert_uniform(p.rotate_pre, -math.pi, math.pi)
    assert_uniform(p.rotate_post, -math.pi, math.pi)
    assert_uniform(p.brightness, -0.5, 0.5)
    assert_uniform(p.contrast, 0.5, 1.5)
    assert_uniform(p.saturation, 0, 2)
    assert_uniform(p.center, 0, 1)


def test_parameters_are_independent_of_each_other() -> None:
    p = sample_transforms(AugmentConfig(), COUNT, (64, 64), rng())
    columns = [getattr(p, f.name) for f in fields(p) if f.name not in ("letters", "cutout")]
    table = torch.cat([c.reshape(COUNT, -1) for c in columns], 1)
    off_diagonal = torch.corrcoef(table.T) - torch.eye(table.shape[1])
    assert table.shape[1] == 15
    assert off_diagonal.abs().max() < 0.04


def test_transforms_of_a_generator_do_not_depend_on_the_families() -> None:
    one, two = (sample_transforms(AugmentConfig(families=f), 5, (8, 8), rng(9)) for f in ("b", "bgco"))
    other = sample_transforms(AugmentConfig(families="b"), 5, (8, 8), rng(10))
    for f in fields(one):
        if f.name not in ("letters", "cutout"):
            assert torch.equal(getattr(one, f.name), getattr(two, f.name))
    assert not torch.equal(one.rotate_pre, other.rotate_pre)


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (64, 64), (7, 7)])
def test_blitting_equals_exact_flips_rotations_and_reflected_shifts(size: tuple[int, int]) -> None:
    x = torch.randn(32, 4, *size, generator=rng())
    p = sample_transforms(AugmentConfig(families="b", integer_shift=0.3), 32, size, rng(1))
    result, n = apply_transforms(x, p), size[0]
    for i in range(32):
        image = x[i].flip(2) if p.flip[i] else x[i]
        image = torch.rot90(image, -int(p.quarter[i]), (1, 2))
        padded = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (n - 1,) * 2, (n - 1,) * 2), mode="reflect"))
        right, down = (int(s) for s in p.integer_shift[i])
        expected = padded[:, n - 1 - down : 2 * n - 1 - down, n - 1 - right : 2 * n - 1 - right]
        torch.testing.assert_close(result[i], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (64, 64), (128, 128), (5, 12)])
def test_resampling_chain_with_identity_parameters_is_the_identity(size: tuple[int, int]) -> None:
    """Upsampling and then downsampling with an orthonormal wavelet's low-pass filter is the identity."""
    x = torch.randn(2, 4, *size, generator=rng())
    torch.testing.assert_close(apply_transforms(x, identity_params("g", 2, size)), x, rtol=0, atol=1e-3)


def test_resampling_chain_is_exact_for_integer_shifts() -> None:
    x = torch.randn(1, 4, 16, 16, generator=rng())
    p = replace(identity_params("g", 1, (16, 16)), shift=torch.tensor([[2 / 16, -1 / 16]]))
    expected = F.pad(x, (2, 0, 0, 1), mode="reflect")[:, :, 1:, :16]
    torch.testing.assert_close(apply_transforms(x, p), expected, rtol=0, atol=1e-3)


def test_sym6_is_orthonormal_with_six_vanishing_moments() -> None:
    h = np.array(augment.SYM6)
    assert h.sum() == pytest.approx(math.sqrt(2))
    for shift in range(6):
        assert (h[2 * shift :] * h[: 12 - 2 * shift]).sum() == pytest.approx(float(shift == 0), abs=1e-9)
    highpass = h * (-1.0) ** np.arange(12)
    for moment in range(6):
        assert (highpass * (np.arange(12) / 11) ** moment).sum() == pytest.approx(0, abs=1e-8)


def wave(x: Tensor, y: Tensor) -> Tensor:
    """Random latents, band-limited to 0.12 cycles per position."""
    return torch.cos(2 * math.pi * (0.10 * x + 0.06 * y) + 0.3) + torch.sin(
        2 * math.pi * (0.05 * x - 0.1 * y)
    )


def grid(size: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    return at[None, :].expand(size, size), at[:, None].expand(size, size)


@pytest.mark.parametrize("degrees", [0, 17, 45, 123])
@pytest.mark.parametrize("scale", [0.9, 1.0, 1.3])
def test_rotation_and_scale_of_a_band_limited_function_match_the_function(degrees: int, scale: float) -> None:
    size, angle = 64, math.radians(degrees)
    x, y = grid(size)
    p = replace(
        identity_params("g", 1, (size, size)), rotate_pre=torch.tensor([angle]), scale=torch.tensor([scale])
    )
    result = apply_transforms(wave(x, y)[None, None], p)[0, 0]
    # The image rotates by `angle` from x towards y (downwards) and is enlarged by `scale`.
    u = (math.cos(angle) * x + math.sin(angle) * y) / scale
    v = (-math.sin(angle) * x + math.cos(angle) * y) / scale
    error = (result - wave(u, v))[x.square() + y.square() < 20**2].abs().max().item()
    assert error < 0.06  # relative to an amplitude of 2


def test_low_pass_resampling_beats_bilinear_on_a_high_resolution_reference() -> None:
    size, angle = 64, math.radians(30)
    x, y = grid(size)
    p = replace(identity_params("g", 1, (size, size)), rotate_pre=torch.tensor([angle]))
    image = wave(1.8 * x, 1.8 * y)[None, None]
    u, v = math.cos(angle) * x + math.sin(angle) * y, -math.sin(angle) * x + math.cos(angle) * y
    at = torch.stack([u, v], -1)[None] * 2 / (size - 1)
    bilinear = F.grid_sample(image, at, align_corners=True, padding_mode="reflection")[0, 0]
    expected, inner = wave(1.8 * u, 1.8 * v), x.square() + y.square() < 20**2
    ours = (apply_transforms(image, p)[0, 0] - expected)[inner].square().mean().sqrt()
    assert ours < 0.4 * (bilinear - expected)[inner].square().mean().sqrt()


def test_downscaling_removes_aliasing_frequencies() -> None:
    x, y = grid(64)
    image = torch.cos(2 * math.pi * 0.42 * x)[None, None] * torch.ones_like(y)
    p = replace(identity_params("g", 1, (64, 64)), scale=torch.tensor([0.55]))
    inner = slice(22, 42)
    assert apply_transforms(image, p)[0, 0, inner, inner].std() < 0.3 * image.std()


def continuous_image(x: Tensor, y: Tensor) -> Tensor:
    """A continuous random image: 60 waves of 0.02 to 0.25 cycles per position with amplitudes 1 / f and
    variance 1/2, a reference at any resolution."""
    random = torch.rand(3, 60, generator=rng(7))
    radius, angle, phase = 0.02 + 0.23 * random[0], 2 * math.pi * random[1], 2 * math.pi * random[2]
    along = (radius * angle.cos()) * x[..., None] + (radius * angle.sin()) * y[..., None]
    return (torch.cos(2 * math.pi * along + phase) / radius).sum(-1) / (1 / radius).norm()


def test_rotated_latents_match_a_high_resolution_reference() -> None:
    """Random rotations and shifts of a sampled image against the continuous image: the error is below 0.1 %
    of the variance and below 30 % of the error of bilinear sampling."""
    size, count = 64, 24
    x, y = grid(size)
    p = sample_transforms(replace(STILL, rotation=180, shift_std=0.02), count, (size, size), rng(5))
    inverse = augment.inverse_affine(p, (size, size))
    image = continuous_image(x, y)[None, None].expand(count, 1, -1, -1)
    ours, errors = apply_transforms(image, p)[:, 0], []
    for row in range(count):
        u, v = (inverse[row, k, 0] * x + inverse[row, k, 1] * y + inverse[row, k, 2] for k in (0, 1))
        at = torch.stack([u, v], -1)[None] * 2 / (size - 1)
        bilinear = F.grid_sample(image[:1], at, align_corners=True)[0, 0]
        inside, expected = (u.abs() < 24) & (v.abs() < 24), continuous_image(u, v)
        errors.append([(m - expected)[inside].square().mean().item() for m in (ours[row], bilinear)])
    our_error, bilinear_error = (sum(column) / count for column in zip(*errors, strict=True))
    assert our_error < 0.001 / 2 and our_error < 0.3 * bilinear_error, (our_error, bilinear_error)


def test_blitting_is_applied_before_geometric_transforms() -> None:
    p = replace(
        identity_params("bg", 1, (16, 16)),
        flip=torch.ones(1),
        shift=torch.tensor([[0.25, 0.0]]),
        letters="bg",
    )
    matrix = augment.inverse_affine(p, (16, 16))[0]
    # For the output 3 positions right of the center: first invert the shift by 4, then the flip.
    torch.testing.assert_close(matrix @ torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0]))


def test_stretch_acts_between_the_two_rotations() -> None:
    p = replace(
        identity_params("g", 1, (16, 16)),
        rotate_pre=torch.tensor([0.4]),
        stretch=torch.tensor([1.5]),
        rotate_post=torch.tensor([-0.7]),
    )

    def turn(a: float) -> np.ndarray:
        return np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])

    forward = turn(-0.7) @ np.diag([1.5, 1 / 1.5]) @ turn(0.4)
    inverse = augment.inverse_affine(p, (16, 16))[0, :2, :2].numpy()
    assert np.allclose(inverse, np.linalg.inv(forward), atol=1e-6)


def test_color_transform_uses_the_mean_of_each_input() -> None:
    x = torch.randn(2, 4, 8, 8, generator=rng())
    p = replace(
        identity_params("c", 2, (8, 8)),
        brightness=torch.tensor([0.3, -0.2]),
        contrast=torch.tensor([0.5, 1.5]),
        saturation=torch.tensor([0.0, 2.0]),
    )
    for i in range(2):
        y = x[i] + p.brightness[i]
        y = (y - y.mean()) * p.contrast[i] + y.mean()
        y = (y - y.mean(0)) * p.saturation[i] + y.mean(0)
        torch.testing.assert_close(apply_transforms(x, p)[i], y)


def test_cutout_zeroes_one_square_of_half_the_size() -> None:
    x = torch.ones(2, 4, 8, 8)
    p = replace(identity_params("o", 2, (8, 8)), center=torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    cut = apply_transforms(x, p)
    expected = torch.ones(2, 8, 8)
    expected[0, 2:6, 2:6] = 0
    expected[1, :2, 6:] = 0
    assert torch.equal(cut, expected[:, None].expand_as(cut))


def test_a_samples_result_does_not_depend_on_its_batch() -> None:
    x = torch.randn(6, 4, 8, 8, generator=rng())
    p = sample_transforms(AugmentConfig(), 6, (8, 8), rng(2))
    single_params = {
        f.name: getattr(p, f.name)[3:4] for f in fields(p) if f.name not in ("letters", "cutout")
    }
    single = apply_transforms(x[3:4], AugmentParams(letters=p.letters, cutout=p.cutout, **single_params))
    torch.testing.assert_close(apply_transforms(x, p)[3:4], single, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (64, 64), (6, 10)])
def test_all_families_give_finite_values_and_gradients(size: tuple[int, int]) -> None:
    x = torch.randn(8, 4, *size, generator=rng()).requires_grad_()
    result = apply_transforms(x, sample_transforms(AugmentConfig(), 8, size, rng(3)))
    result.square().sum().backward()
    assert result.shape == x.shape and result.isfinite().all()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_constants_cached_in_inference_mode_work_in_training() -> None:
    augment._cached_matrix.cache_clear()
    p = sample_transforms(AugmentConfig(), 1, (9, 9), rng())
    with torch.inference_mode():
        apply_transforms(torch.randn(1, 4, 9, 9), p)
    x = torch.randn(1, 4, 9, 9).requires_grad_()
    apply_transforms(x, p).sum().backward()
    assert x.grad is not None
