"""Latents of image crops for training: encoded on the fly, or once to a cache on disk."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2g.core.environment import usable_cores
from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import Stream, generator
from d2g.diffusion.latents import encode, from_uint8, latent_space
from latent_lpips.training.config import ClassifyConfig
from latent_lpips.training.crops import center_crop_resized, random_crop
from latent_lpips.training.labeled_images import LabeledImages
from latent_lpips.training.latent_cache import cached_rows
from latent_lpips.vgg import MIN_LATENT_SIZE

PREFETCHED_BATCHES = 3
"""Batches whose images are decoded ahead of time."""
ENCODE_BATCH = 64
"""Images encoded at a time: a KL autoencoder's memory grows with their number."""


class CropItem(NamedTuple):
    """A crop of an image: the image's row and the crop's number; -1 is the center crop."""

    row: int
    crop: int


def check_image_size(vae: Any, size: int, name: str = "size") -> None:
    """Raise UserError for an image size that the autoencoder, or the trunk's two poolings, cannot take."""
    step = latent_space(vae).downscale
    if size % step or size // step < MIN_LATENT_SIZE:
        raise UserError(
            f"{name} is {size} pixels; the autoencoder and LatentLPIPS take multiples of {step}, "
            f"{MIN_LATENT_SIZE * step} or more; set another"
        )


class CropEncoder:
    """Encodes crops of images to scaled latents.

    Each latent is a function of (seed, row, crop); batch, rank and number of threads change only its
    rounding.
    """

    def __init__(
        self, config: ClassifyConfig, vae: Any, pictures: LabeledImages, device: torch.device
    ) -> None:
        self.config, self.vae, self.pictures, self.device = config, vae, pictures, device
        self.workers = config.workers or usable_cores() + 2

    def pixels(self, item: CropItem) -> Tensor:
        """Decode and crop one item: returns uint8 [3, size, size]."""
        image, config = self.pictures.open(item.row), self.config
        if item.crop < 0:
            return center_crop_resized(image, config.size)
        rng = generator(config.seed, Stream.CROP, item.row, item.crop)
        return random_crop(image, config.size, config.area, config.mirror, rng)

    @torch.no_grad()
    def latents(self, items: Sequence[CropItem], pixels: Sequence[Tensor]) -> Tensor:
        """Encode the items' pixels to scaled latents [B, C, h, w]."""
        parts = [slice(start, start + ENCODE_BATCH) for start in range(0, len(items), ENCODE_BATCH)]
        return torch.cat([self._encode_chunk(items[part], pixels[part]) for part in parts])

    def _encode_chunk(self, items: Sequence[CropItem], pixels: Sequence[Tensor]) -> Tensor:
        rngs = None
        if self.config.posterior == "sample" and items[0].crop >= 0:
            rngs = [generator(self.config.seed, Stream.CROP_POSTERIOR, *item) for item in items]
        return encode(self.vae, from_uint8(torch.stack(list(pixels)).to(self.device)), rngs)

    def stream(self, plan: Iterable[Sequence[CropItem]]) -> Iterator[Tensor]:
        """Yield the latents of the batches in `plan`, in order. Threads decode images ahead."""
        pending: deque[tuple[Sequence[CropItem], list[Future[Tensor]]]] = deque()
        pool = ThreadPoolExecutor(self.workers)
        try:
            # Keep a few batches of decoding jobs in flight.
            for items in plan:
                pending.append((items, [pool.submit(self.pixels, item) for item in items]))
                if len(pending) > PREFETCHED_BATCHES:
                    yield self._encode_next(pending)
            while pending:
                yield self._encode_next(pending)
        finally:
            pool.shutdown(cancel_futures=True)

    def _encode_next(self, pending: deque[tuple[Sequence[CropItem], list[Future[Tensor]]]]) -> Tensor:
        items, futures = pending.popleft()
        return self.latents(items, [future.result() for future in futures])


LatentStream = Callable[[Iterable[Sequence[CropItem]]], Iterator[Tensor]]
"""Maps a plan, an iterable of batches of items, to the latents of its batches."""


def open_latent_stream(
    encoder: CropEncoder,
    folder: Path,
    name: str,
    vae_sha256: str,
    progress: Progress = quiet,
    time_over: Callable[[], bool] = lambda: False,
) -> LatentStream:
    """Return the encoder's stream, or with `config.crops` a stream of latents cached in `folder`.

    `name` is train or val. Raises UserError and Interrupted as `cached_rows` does.
    """
    config, pictures = encoder.config, encoder.pictures
    if not config.crops:
        return encoder.stream
    # Cached crops: everything that decides their latents identifies the cache.
    crops = [-1] if name == "val" else list(range(config.crops))
    count = len(pictures)
    facts = {
        "autoencoder": vae_sha256,
        "pictures": pictures.digest(),
        "seed": config.seed,
        "size": config.size,
        "crops": config.crops,
        "area": config.area,
        "mirror": config.mirror,
        "posterior": config.posterior,
    }

    def encode_rows(rows: range) -> Tensor:
        items = [CropItem(row % count, crops[row // count]) for row in rows]
        plan = [items[start : start + ENCODE_BATCH] for start in range(0, len(items), ENCODE_BATCH)]
        return torch.cat([latents.cpu() for latents in encoder.stream(plan)])

    # Row number = image + number of images * crop.
    rows = cached_rows(folder, name, count * len(crops), facts, encode_rows, progress, time_over=time_over)

    def stream(plan: Iterable[Sequence[CropItem]]) -> Iterator[Tensor]:
        for items in plan:
            indices = [
                item.row + count * (item.crop % config.crops if item.crop >= 0 else 0) for item in items
            ]
            yield rows[indices].to(encoder.device, non_blocking=True)

    return stream
