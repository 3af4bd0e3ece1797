"""Real images as real rows of the discriminator: among those of the pairs (limitation 1 in section F of the
supplement), or alone, in a run without pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import floor

import torch
from torch import Tensor

from d2g.core.distributed import process_group
from d2g.core.seeds import Stream, generator, noise
from d2g.core.transfer import to_device
from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode, latent_space
from distill.config.discriminator import DiscriminatorConfig
from distill.losses.gradient_penalty import DiscriminatorInput
from distill.training.real_images import CaptionKind, RealImages
from distill.training.text_cache import TextCache
from pairgen.store.dataset import PairSampler, pair_loader
from pairgen.store.hdf5 import PairBatch

VAE_BATCH_SIZE = 4
"""Number of images that the VAE encodes at once; its activations are large."""


class RealLatents:
    """Encodes real images, and draws the noise of their rows: both depend only on the seed and on the number
    of the row among the rows with images. An image was not generated from noise, so its row gets random
    noise.
    """

    def __init__(self, teacher: str, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self.vae = pretrained.load_vae(teacher).to(device)

    def image_size(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        """(height, width) in pixels of images whose latents have this shape (C, h, w)."""
        downscale = latent_space(self.vae).downscale
        return shape[1] * downscale, shape[2] * downscale

    @torch.no_grad()
    def encode(self, pixels: Tensor, numbers: range) -> Tensor:
        """Pixels [B, 3, H, W] of the rows with these numbers -> latents [B, C, h, w] on the device."""
        # Each row has a generator of its own for its VAE posterior.
        rngs = [
            generator(self.seed, Stream.REAL_IMAGE_POSTERIOR, number, device=self.device)
            for number in numbers
        ]
        parts = [slice(start, start + VAE_BATCH_SIZE) for start in range(0, len(rngs), VAE_BATCH_SIZE)]
        return torch.cat(
            [encode(self.vae, to_device(pixels[part], self.device), rngs[part]) for part in parts]
        )

    def noise(self, numbers: range, shape: tuple[int, int, int]) -> Tensor:
        """The noise [B, *shape] of the rows with these numbers, on the CPU."""
        return noise(generator(self.seed, Stream.REAL_IMAGE_NOISE).initial_seed(), numbers, shape)


class RealRows:
    """Replaces a fraction `gan.real_fraction` of the real rows by captioned images, if `gan.real` names some.

    The replaced rows, their images and their noise depend only on the seed and the row number. gan: None in
    the regression stage, and where all rows are images already. shape: of the latents, (C, h, w).
    """

    def __init__(
        self,
        gan: DiscriminatorConfig | None,
        teacher: str,
        seed: int,
        shape: tuple[int, int, int],
        kind: CaptionKind,
        text: TextCache,
        device: torch.device,
    ) -> None:
        self.fraction, self.seed, self.text, self.device = 0.0, seed, text, device
        self.images: RealImages | None = None
        if gan is None or not gan.real:
            return
        self.fraction, self.encoder = gan.real_fraction, RealLatents(teacher, seed, device)
        self.images = RealImages(gan.real, self.encoder.image_size(shape), gan.real_column, kind)

    def __call__(self, inputs: DiscriminatorInput, rows: range) -> DiscriminatorInput:
        """Return `inputs`, whose rows have the numbers `rows`, with some rows replaced by images."""
        # Row n is replaced by image floor(n * fraction) whenever (n + 1) * fraction passes the next integer.
        first, last = floor(rows.start * self.fraction), floor(rows.stop * self.fraction)
        if first == last or self.images is None:
            return inputs
        replaced = [n - rows.start for n in rows if floor((n + 1) * self.fraction) > floor(n * self.fraction)]
        pixels, captions = self.images.batch(self.seed, first, last - first)
        # Write latents, noise and captions into the replaced rows.
        latents = self.encoder.encode(pixels, range(first, last))
        shape = (latents.shape[1], latents.shape[2], latents.shape[3])
        image_noise = to_device(self.encoder.noise(range(first, last), shape), self.device)
        index = to_device(torch.tensor(replaced), self.device)
        text = self.text(captions)
        if "guidance" in inputs.cond.tensors:  # a photograph has none: that of the rows stays
            text = text.with_guidance(inputs.cond.tensors["guidance"][index])
        return DiscriminatorInput(
            _replace_rows(inputs.latents, index, latents),
            _replace_rows(inputs.noise, index, image_noise),
            inputs.cond.map(lambda old, new: _replace_rows(old, index, new), text),
            inputs.t,
            inputs.draws,
        )


def _replace_rows(rows: Tensor, index: Tensor, replacements: Tensor) -> Tensor:
    return rows.index_copy(0, index, replacements.to(rows.dtype))


class ImageRows:
    """The rows of a run without pairs: images of `gan.real` with their captions, and noise.

    In place of the teacher's latents a row has those of its image. shape: of the latents, (C, h, w).
    """

    def __init__(
        self,
        gan: DiscriminatorConfig,
        teacher: str,
        seed: int,
        shape: tuple[int, int, int],
        kind: CaptionKind,
        device: torch.device,
    ) -> None:
        self.seed, self.shape, self.encoder = seed, shape, RealLatents(teacher, seed, device)
        self.images = RealImages(gan.real, self.encoder.image_size(shape), gan.real_column, kind)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: Sequence[int], dtype: torch.dtype | None = torch.float32) -> PairBatch:
        """Read the first rows of the source, for previews; rows are numbers of images from 0 on."""
        numbers = range(rows[0], rows[-1] + 1)
        assert list(numbers) == list(rows)
        return self._complete(_PixelRows(self.images).read(rows, dtype), numbers)

    def batches(
        self, batch_size: int, start: int, workers: int, pin_memory: bool = False
    ) -> Iterator[PairBatch]:
        """Iterate endlessly over this rank's share of the batches, from image `start` of the run on.

        batch_size: rows over all ranks. workers: number of prefetching processes.
        """
        rank, world = process_group.rank(), process_group.world_size()
        local = batch_size // world
        block, window = self.images.shuffle_blocks
        sampler = PairSampler(
            len(self), batch_size, self.seed, start, rank=rank, world_size=world, block=block, window=window
        )
        pixels = pair_loader(_PixelRows(self.images), sampler, workers=workers, pin_memory=pin_memory)
        for number, batch in enumerate(pixels):
            first = start + number * batch_size + rank * local
            yield self._complete(batch, range(first, first + local))

    def _complete(self, batch: PairBatch, numbers: range) -> PairBatch:
        """The batch with latents in place of pixels, and with the noise of the rows with these numbers."""
        latents = self.encoder.encode(batch.latents, numbers)
        return replace(batch, latents=latents, noise=self.encoder.noise(numbers, self.shape))


class _PixelRows:
    """Images as rows that `pair_loader` reads: pixels [B, 3, H, W] in place of latents, no noise [B, 0]."""

    def __init__(self, images: RealImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: Sequence[int], dtype: torch.dtype | None = torch.float32) -> PairBatch:
        pixels, captions = self.images.read(rows)
        return PairBatch(
            noise=torch.empty(len(rows), 0), latents=pixels, prompts=captions, index=torch.tensor(rows)
        )

    def prefetch(self, rows: Sequence[int], block: int = 1) -> None:
        """Files on a local disk need no announcement."""
