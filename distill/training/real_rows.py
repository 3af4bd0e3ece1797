"""Photographs among the rows that D is shown as real (limitation 1 of the supplement, F)."""

from math import floor

import torch
from torch import Tensor

from d2g.core.seeds import Stream, generator, noise
from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode, latent_space
from distill.config.run import DistillConfig
from distill.losses.gradient_penalty import DiscriminatorInput
from distill.training.real_images import RealImages
from distill.training.text_cache import TextCache

AT_ONCE = 4
"""Images that the VAE encodes at once: its activations are large."""


class RealRows:
    """Puts images with their captions in the place of every 1 / fraction-th real row, if the config has such.

    An image has no noise that it came from, so it is shown with one of its own. Which rows, which images and
    which noise are functions of (seed, the row's number).
    """

    def __init__(
        self, config: DistillConfig, shape: tuple[int, int, int], text: TextCache, device: torch.device
    ) -> None:
        self.fraction, self.seed, self.text, self.device = config.gan.real_fraction, config.seed, text, device
        if config.stage != "gan" or not config.gan.real:
            self.fraction = 0.0
            return
        self.vae = pretrained.load_vae(config.teacher).to(device)
        downscale = latent_space(self.vae).downscale
        self.images = RealImages(config.gan.real, (shape[1] * downscale, shape[2] * downscale))

    def __call__(self, inputs: DiscriminatorInput, rows: range) -> DiscriminatorInput:
        """What D is shown for the rows of these numbers, some of them replaced."""
        first, last = floor(rows.start * self.fraction), floor(rows.stop * self.fraction)
        if first == last:
            return inputs
        where = [n - rows.start for n in rows if floor((n + 1) * self.fraction) > floor(n * self.fraction)]
        pixels, captions = self.images.batch(self.seed, first, last - first)
        streams = [
            generator(self.seed, Stream.REAL_IMAGE_POSTERIOR, number, device=self.device)
            for number in range(first, last)
        ]
        with torch.no_grad():
            parts = [slice(start, start + AT_ONCE) for start in range(0, len(streams), AT_ONCE)]
            x = torch.cat([encode(self.vae, pixels[p].to(self.device), streams[p]) for p in parts])
        stream = generator(self.seed, Stream.REAL_IMAGE_NOISE).initial_seed()
        z = noise(stream, range(first, last), (x.shape[1], x.shape[2], x.shape[3])).to(self.device)
        at = torch.tensor(where, device=self.device)
        return DiscriminatorInput(
            _put(inputs.latents, at, x),
            _put(inputs.noise, at, z),
            inputs.cond.map(lambda rows, others: _put(rows, at, others), self.text(captions)),
            inputs.t,
        )


def _put(rows: Tensor, at: Tensor, others: Tensor) -> Tensor:
    return rows.index_copy(0, at, others.to(rows.dtype))
