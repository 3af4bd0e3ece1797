"""What D is told as its time, and the noise that real and fake get before it (method.md "Discriminator
timestep and noise").
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from d2g.core.errors import SettingError
from d2g.core.seeds import Stream, generator, noise
from d2g.diffusion import pretrained
from d2g.diffusion.schedule import diffuse
from distill.config.components import DiscriminatorConfig
from distill.config.run import DistillConfig

Levels = Callable[[int, torch.Generator], Tensor | None]
"""(rows, generator) -> D's time inputs [rows]; None where its constant stands."""


def draw_times(
    config: DiscriminatorConfig, rows: int, train_steps: int, generator: torch.Generator
) -> Tensor | None:
    """D's time inputs [rows], int64 on the generator's device; None where D's constant stands.

    random: t = T s u / (1 + (s - 1) u) with u ~ U(0, 1) and s = timestep_shift (APT 3.3). With noise
    augmentation it is the level of the noise: uniform over 0 to max - 1, or "small", max u^2, half of them
    below max / 4.
    """
    if config.noise_augment == "none" and config.timestep_mode == "constant":
        return None
    u = torch.rand(rows, generator=generator, device=generator.device)
    if config.noise_augment == "none":
        shift, length = config.timestep_shift, train_steps
        u = shift * u / (1 + (shift - 1) * u)
    else:
        length = config.noise_max_timestep
        u = u.square() if config.noise_augment == "small" else u
    return (length * u).long().clamp(max=length - 1)


def with_noise(x: Tensor, alphas_cumprod: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = alpha_t x + sigma_t eps of scaled latents [B, C, h, w] at levels t [B], eps ~ N(0, 1).

    Called once for the real and once for the fake rows: the same process and t, noise of their own.
    """
    return diffuse(x, eps.to(x), alphas_cumprod, t.to(x.device))


class Noiser:
    """Diffuses what D is shown, where the config says so; else it passes latents through.

    The noise of a row is a function of (seed, the row's number, real or fake) alone. Raises SettingError for
    a largest level beyond the teacher's schedule.
    """

    def __init__(self, config: DistillConfig, device: torch.device) -> None:
        self.gan, self.seed = config.gan, config.seed
        self.active = config.stage == "gan" and config.gan.noise_augment != "none"
        gan = config.stage == "gan"  # without D there are no levels, and the teacher may be an EDM
        bars = pretrained.load_schedule(config.teacher).alphas_cumprod if gan else torch.empty(0)
        self.train_steps, self.alphas_cumprod = len(bars), bars.to(device)
        if self.active and config.gan.noise_max_timestep > self.train_steps:
            raise SettingError(
                f"gan.noise_max_timestep is {config.gan.noise_max_timestep}; the teacher's schedule has "
                f"{self.train_steps}"
            )

    def levels(self, rows: int, rng: torch.Generator) -> Tensor | None:
        """D's time inputs of a step's rows."""
        return draw_times(self.gan, rows, self.train_steps, rng)

    def eps(self, rows: Sequence[int], shape: tuple[int, int, int], stream: int) -> Tensor | None:
        """The noise [B, C, h, w] of the rows of these numbers, on the CPU; None where there is none to add.
        stream 0: real rows, 1: fake ones."""
        if not self.active:
            return None
        return noise(generator(self.seed, Stream.NOISE_AUGMENTATION, stream).initial_seed(), rows, shape)

    def __call__(self, x: Tensor, t: Tensor | None, eps: Tensor | None) -> Tensor:
        """x [B, C, h, w] at levels t [B] with this noise; x itself where there is none."""
        if eps is None:
            return x
        assert t is not None
        return with_noise(x, self.alphas_cumprod, t, eps)
