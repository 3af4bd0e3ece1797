"""The discriminator's time input and the noise added to its inputs.

See method.md "Discriminator timestep and noise".
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from d2g.core.errors import SettingError
from d2g.core.seeds import Stream, generator, noise
from d2g.diffusion import pretrained
from d2g.diffusion.schedule import Schedule
from d2g.diffusion.scheduler_files import AnySchedule
from distill.config.discriminator import DiscriminatorConfig


def sample_timesteps(
    config: DiscriminatorConfig, rows: int, train_steps: int, generator: torch.Generator
) -> Tensor | None:
    """Sample D's time inputs [rows], int64, on the generator's device; None for a constant timestep.

    Without noise augmentation, t = T s u / (1 + (s - 1) u) with u ~ U(0, 1), T = `train_steps` and
    s = timestep_shift (APT 3.3). With noise augmentation, t is the noise level, 0 to max - 1, where max is
    noise_max_timestep. It is uniform, or max u^2 for "small": then half of the levels are below max / 4.
    """
    if config.noise_augment == "none" and config.timestep_mode == "constant":
        return None

    # Shape the distribution of u, then scale it to integer timesteps.
    u = torch.rand(rows, generator=generator, device=generator.device)
    if config.noise_augment == "none":
        shift, length = config.timestep_shift, train_steps
        u = shift * u / (1 + (shift - 1) * u)
    else:
        length = config.noise_max_timestep
        u = u.square() if config.noise_augment == "small" else u
    return (length * u).long().clamp(max=length - 1)


class NoiseAugmentation:
    """Adds noise to the discriminator's inputs if `gan.noise_augment` is set; otherwise changes nothing.

    The noise of a row depends only on the seed, the row number, and whether the row is real or fake.
    """

    def __init__(self, gan: DiscriminatorConfig | None, schedule: AnySchedule | None, seed: int) -> None:
        """gan: discriminator settings. schedule: the teacher's. Both are None in the regression stage.

        Raises SettingError for timesteps that the schedule does not have. For an EDM schedule, timesteps are
        indices of noise levels.
        """
        self.gan, self.seed = gan, seed
        self.active = gan is not None and gan.noise_augment != "none"
        self.schedule, self.train_steps = schedule, 0 if schedule is None else len(schedule)
        if gan is not None and self.active and gan.noise_max_timestep > self.train_steps:
            raise SettingError(
                f"gan.noise_max_timestep is {gan.noise_max_timestep}; the teacher's schedule has "
                f"{self.train_steps}"
            )
        if gan is not None and schedule is not None and gan.timestep >= self.train_steps:
            raise SettingError(f"gan.timestep is {gan.timestep}; expected 0 to {self.train_steps - 1}")

    def levels(self, rows: int, rng: torch.Generator) -> Tensor | None:
        """Sample D's time inputs [rows] for a step; None if D uses its constant timestep."""
        return None if self.gan is None else sample_timesteps(self.gan, rows, self.train_steps, rng)

    def eps(self, rows: Sequence[int], shape: tuple[int, int, int], stream: int) -> Tensor | None:
        """Return noise [B, *shape] for these row numbers, on the CPU; None without noise augmentation.

        stream: 0 for real rows, 1 for fake rows.
        """
        if not self.active:
            return None
        return noise(generator(self.seed, Stream.NOISE_AUGMENTATION, stream).initial_seed(), rows, shape)

    def __call__(self, x: Tensor, t: Tensor | None, eps: Tensor | None) -> Tensor:
        """Diffuse x [B, C, h, w] to levels t [B] with noise `eps` [B, C, h, w] from the method `eps`.

        If `eps` is None, return x unchanged.
        """
        if eps is None:
            return x
        assert t is not None and self.schedule is not None
        return self.schedule.diffuse(x, eps.to(x), t.to(x.device))


def build_noise_augmentation(
    gan: DiscriminatorConfig | None, teacher: str, seed: int, device: torch.device
) -> NoiseAugmentation:
    """Build the noise augmentation of a run. In the regression stage `gan` is None, and no noise is added."""
    if gan is None:
        return NoiseAugmentation(None, None, seed)
    schedule = pretrained.load_schedule(teacher)
    if isinstance(schedule, Schedule):
        schedule = replace(schedule, alphas_cumprod=schedule.alphas_cumprod.to(device))
    return NoiseAugmentation(gan, schedule, seed)
