"""Real images among the real rows of the discriminator (limitation 1 in section F of the supplement)."""

from math import floor

import torch
from torch import Tensor

from d2g.core.seeds import Stream, generator, noise
from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode, latent_space
from distill.config.components import DiscriminatorConfig
from distill.losses.gradient_penalty import DiscriminatorInput
from distill.training.real_images import RealImages
from distill.training.text_cache import TextCache

VAE_BATCH_SIZE = 4
"""Number of images that the VAE encodes at once; its activations are large."""


class RealRows:
    """Replaces a fraction `gan.real_fraction` of the real rows by captioned images, if `gan.real` names some.

    An image was not generated from noise, so its row gets random noise. The replaced rows, their images and
    their noise depend only on the seed and the row number. gan: None in the regression stage. shape: of the
    latents, (C, h, w).
    """

    def __init__(
        self,
        gan: DiscriminatorConfig | None,
        teacher: str,
        seed: int,
        shape: tuple[int, int, int],
        text: TextCache,
        device: torch.device,
    ) -> None:
        self.fraction, self.seed, self.text, self.device = 0.0, seed, text, device
        if gan is None or not gan.real:
            return
        self.fraction = gan.real_fraction
        self.vae = pretrained.load_vae(teacher).to(device)
        downscale = latent_space(self.vae).downscale
        size = (shape[1] * downscale, shape[2] * downscale)
        self.images = RealImages(gan.real, size, gan.real_column)

    def __call__(self, inputs: DiscriminatorInput, rows: range) -> DiscriminatorInput:
        """Return `inputs`, whose rows have the numbers `rows`, with some rows replaced by images."""
        # Row n is replaced by image floor(n * fraction) whenever (n + 1) * fraction passes the next integer.
        first, last = floor(rows.start * self.fraction), floor(rows.stop * self.fraction)
        if first == last:
            return inputs
        replaced = [n - rows.start for n in rows if floor((n + 1) * self.fraction) > floor(n * self.fraction)]
        pixels, captions = self.images.batch(self.seed, first, last - first)
        # Encode the images. Each image has a generator of its own for its VAE posterior.
        posterior_rngs = [
            generator(self.seed, Stream.REAL_IMAGE_POSTERIOR, number, device=self.device)
            for number in range(first, last)
        ]
        with torch.no_grad():
            parts = [
                slice(start, start + VAE_BATCH_SIZE)
                for start in range(0, len(posterior_rngs), VAE_BATCH_SIZE)
            ]
            latents = torch.cat(
                [encode(self.vae, pixels[part].to(self.device), posterior_rngs[part]) for part in parts]
            )
        # Write latents, noise and captions into the replaced rows.
        noise_seed = generator(self.seed, Stream.REAL_IMAGE_NOISE).initial_seed()
        shape = (latents.shape[1], latents.shape[2], latents.shape[3])
        image_noise = noise(noise_seed, range(first, last), shape).to(self.device)
        index = torch.tensor(replaced, device=self.device)
        return DiscriminatorInput(
            _replace_rows(inputs.latents, index, latents),
            _replace_rows(inputs.noise, index, image_noise),
            inputs.cond.map(lambda old, new: _replace_rows(old, index, new), self.text(captions)),
            inputs.t,
        )


def _replace_rows(rows: Tensor, index: Tensor, replacements: Tensor) -> Tensor:
    return rows.index_copy(0, index, replacements.to(rows.dtype))
