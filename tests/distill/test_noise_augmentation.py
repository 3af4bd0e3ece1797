"""distill.losses.noise_augmentation: distributions of D's timesteps; forward process of real and fake."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import tiny_teachers
from d2g.core.errors import SettingError
from distill.config.discriminator import DiscriminatorConfig
from distill.losses.noise_augmentation import NoiseAugmentation, build_noise_augmentation, sample_timesteps


def sample_times(rows: int = 20_000, steps: int = 1000, **settings: Any) -> Tensor | None:
    return sample_timesteps(DiscriminatorConfig(**settings), rows, steps, torch.Generator().manual_seed(0))


def quantiles(t: Tensor | None) -> list[float]:
    assert t is not None and t.dtype == torch.int64
    return torch.quantile(t.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()


def test_a_constant_timestep_is_not_sampled() -> None:
    assert sample_times() is None and sample_times(timestep=7) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"timestep_mode": "random"}, [250, 500, 750]),
        ({"timestep_mode": "random", "timestep_shift": 3.0}, [500, 750, 900]),  # 3u / (1 + 2u)
        ({"noise_augment": "uniform"}, [250, 500, 750]),
        ({"noise_augment": "uniform", "noise_max_timestep": 400}, [100, 200, 300]),
        ({"noise_augment": "small"}, [62.5, 250, 562.5]),  # u^2
        ({"noise_augment": "small", "noise_max_timestep": 100}, [6.25, 25, 56.25]),
    ],
)
def test_timestep_distributions(settings: dict[str, Any], expected: list[float]) -> None:
    t = sample_times(**settings)
    assert quantiles(t) == pytest.approx(expected, abs=12)
    assert t is not None and 0 <= t.min() and t.max() < settings.get("noise_max_timestep", 1000)


def test_timesteps_beyond_the_schedule_are_refused(teacher: Path) -> None:
    with pytest.raises(SettingError, match=r"noise_max_timestep is 1200; the teacher's schedule has 1000"):
        build_augmentation(teacher, noise_augment="uniform", noise_max_timestep=1200)
    with pytest.raises(SettingError, match=r"gan\.timestep is 1000; expected 0 to 999"):
        build_augmentation(teacher, timestep=1000)


@pytest.mark.parametrize("grid", ["karras", "exponential"])
def test_noise_levels_of_an_edm_are_those_of_diffusers(grid: str, tmp_path: Path) -> None:
    """x + sigma eps, with sigma of diffusers' scheduler of 1000 steps, counted from the end."""
    settings = {**tiny_teachers.EDM, "sigma_schedule": grid}
    teacher = tiny_teachers.save_edm(tmp_path, **settings)
    augment = build_augmentation(Path(teacher), noise_augment="uniform")
    scheduler = diffusers.EDMEulerScheduler(**settings)
    scheduler.set_timesteps(1000)
    x, eps, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 500, 999])
    sigma = scheduler.sigmas[999 - t].view(4, 1, 1, 1)
    torch.testing.assert_close(augment(x, t, eps), x + sigma * eps, rtol=1e-4, atol=1e-5)


def test_noise_follows_the_schedule(teacher: Path) -> None:
    """x_t = alpha_t x + sigma_t eps for a given eps, with one t per row."""
    augment = build_augmentation(teacher, noise_augment="uniform")
    x, eps = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    t = torch.tensor([0, 399, 999])
    noisy = augment(x, t, eps)
    for row, (alpha, sigma) in enumerate(((0.999575, 0.029155), (0.652753, 0.757571), (0.068265, 0.997667))):
        torch.testing.assert_close(noisy[row], alpha * x[row] + sigma * eps[row], rtol=1e-4, atol=1e-4)
    assert noisy.dtype == torch.float32


def build_augmentation(teacher: Path, **settings: Any) -> NoiseAugmentation:
    gan = DiscriminatorConfig(**settings)
    return build_noise_augmentation(gan, str(teacher), 0, torch.device("cpu"))


def test_real_and_fake_share_the_level_but_not_the_noise(teacher: Path) -> None:
    augment, x = build_augmentation(teacher, noise_augment="uniform"), torch.zeros(2, 4, 4, 4)
    t = augment.levels(2, torch.Generator().manual_seed(1))
    one, two = (augment.eps(range(8, 10), (4, 4, 4), stream) for stream in (0, 1))
    single_row = augment.eps([9], (4, 4, 4), 0)
    assert (
        one is not None and single_row is not None and torch.equal(one[1:], single_row)
    )  # noise depends on the row number only
    real, fake = augment(x, t, one), augment(x, t, two)
    assert torch.equal(real, augment(x, t, one)) and not torch.equal(real, fake)
    ratio = real.std((1, 2, 3)) / fake.std((1, 2, 3))
    assert ((ratio - 1).abs() < 0.4).all()


def test_latents_are_unchanged_without_augmentation(teacher: Path) -> None:
    x = torch.randn(2, 4, 4, 4)
    plain = build_augmentation(teacher)
    assert plain.eps(range(2), (4, 4, 4), 0) is None and plain(x, None, None) is x
    random = build_augmentation(teacher, timestep_mode="random")
    t = random.levels(2, torch.Generator().manual_seed(1))
    assert t is not None and random(x, t, random.eps(range(2), (4, 4, 4), 0)) is x


def test_gradients_pass_through_the_noise(teacher: Path) -> None:
    augment, x = (
        build_augmentation(teacher, noise_augment="uniform"),
        torch.zeros(1, 4, 4, 4, requires_grad=True),
    )
    augment(x, torch.tensor([399]), augment.eps([0], (4, 4, 4), 1)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.652753), rtol=1e-4, atol=1e-4)
