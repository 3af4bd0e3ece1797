"""D's time input, and the noise added to its real and fake inputs (method.md "Discriminator timestep and
noise").
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2g.core.errors import SettingError
from d2g.core.seeds import Stream, generator, noise
from d2g.diffusion import pretrained
from d2g.diffusion.schedule import diffuse
from distill.config.components import DiscriminatorConfig
from distill.config.run import DistillConfig


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


class NoiseAugmentation:
    """Adds noise to D's inputs according to the config, or returns them as they are.

    The noise of a row is a function of (seed, the row's number, real or fake) alone.
    """

    def __init__(
        self, gan: DiscriminatorConfig | None, alphas_cumprod: Tensor, seed: int, device: torch.device
    ) -> None:
        """gan: None in the regression stage. alphas_cumprod: [T] of the teacher's schedule.

        Raises SettingError for a largest level beyond the teacher's schedule.
        """
        self.gan, self.seed = gan, seed
        self.active = gan is not None and gan.noise_augment != "none"
        self.train_steps, self.alphas_cumprod = len(alphas_cumprod), alphas_cumprod.to(device)
        if gan is not None and self.active and gan.noise_max_timestep > self.train_steps:
            raise SettingError(
                f"gan.noise_max_timestep is {gan.noise_max_timestep}; the teacher's schedule has "
                f"{self.train_steps}"
            )

    def levels(self, rows: int, rng: torch.Generator) -> Tensor | None:
        """D's time inputs [rows] of a step; None for the config's constant."""
        return None if self.gan is None else draw_times(self.gan, rows, self.train_steps, rng)

    def eps(self, rows: Sequence[int], shape: tuple[int, int, int], stream: int) -> Tensor | None:
        """Noise [B, C, h, w] of the rows of these numbers, on the CPU; None without noise augmentation.

        stream: 0 for real rows, 1 for fake ones.
        """
        if not self.active:
            return None
        return noise(generator(self.seed, Stream.NOISE_AUGMENTATION, stream).initial_seed(), rows, shape)

    def __call__(self, x: Tensor, t: Tensor | None, eps: Tensor | None) -> Tensor:
        """x [B, C, h, w] at levels t [B] with the noise `eps`; x itself without noise."""
        if eps is None:
            return x
        assert t is not None
        return with_noise(x, self.alphas_cumprod, t, eps)


def build_noise_augmentation(config: DistillConfig, device: torch.device) -> NoiseAugmentation:
    """The noise augmentation of a run. The regression stage needs no schedule; its teacher may be an EDM."""
    if config.stage != "gan":
        return NoiseAugmentation(None, torch.empty(0), config.seed, device)
    alphas_cumprod = pretrained.load_schedule(config.teacher).alphas_cumprod
    return NoiseAugmentation(config.gan, alphas_cumprod, config.seed, device)
