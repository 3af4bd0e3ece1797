"""Frechet distances between real images and slightly changed copies (Wuerstchen, appendix B)."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance

from d2g.core.environment import usable_cores
from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import EvalStream, generator
from eval.images.folders import ImageFiles
from eval.images.resize import FILTERS, to_array, to_pil
from eval.measure.measure import Measure, measure_source
from eval.measure.rows import MeasureOptions
from eval.measure.source import ImageSource, SampledBatch, image_source
from eval.metrics.frechet import frechet_distance
from eval.networks.base import FeatureNet

Change = Callable[[Image.Image], Image.Image]


def _jpeg(quality: int) -> Change:
    def change(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return change


def _resampled(kind: Image.Resampling) -> Change:
    """Half the size by the box filter, and back to the size by another one."""

    def change(image: Image.Image) -> Image.Image:
        half = (max(1, image.width // 2), max(1, image.height // 2))
        return image.resize(half, FILTERS["box"]).resize(image.size, kind)

    return change


CHANGES: Mapping[str, Change] = {
    **{f"JPEG, quality {quality}": _jpeg(quality) for quality in (95, 90, 80, 70, 60, 50)},
    "half the size and back, nearest": _resampled(Image.Resampling.NEAREST),
    "half the size and back, bilinear": _resampled(Image.Resampling.BILINEAR),
    "half the size and back, Lanczos": _resampled(Image.Resampling.LANCZOS),
    "palette of 256 colors": lambda image: image.quantize(256, dither=Image.Dither.NONE).convert("RGB"),
    "brightness +10 %": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "brightness -10 %": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "contrast +10 %": lambda image: ImageEnhance.Contrast(image).enhance(1.1),
    "contrast -10 %": lambda image: ImageEnhance.Contrast(image).enhance(0.9),
}
"""Rows of Wuerstchen's table 3. The paper does not say what it resamples to; here it is half the size."""


def robustness(
    files: ImageFiles,
    net: FeatureNet,
    size: str,
    *,
    count: int = 0,
    batch_size: int = 64,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Frechet distances between images and the same images changed, by change.

    size: the preprocessing of `eval.images.resize`, which comes before the change, as it does for images
    that a sampler draws at this size. count: images, 0: all. `halves` is the distance between two random
    halves of the unchanged images, for scale. Raises UserError for fewer than four images.
    """
    original = image_source(files)
    assert original.count is not None
    images = min(count or original.count, original.count)
    if images < 4:
        raise UserError(f"{files.name} has {images} images; robustness needs at least 4")

    def features(source: ImageSource, label: str) -> torch.Tensor:
        measure = {"features": Measure(size=size, function=lambda pixels, _: net(pixels).float())}
        progress(label, 0, 1)
        rows = measure_source(source, range(images), measure, work=MeasureOptions(batch_size=batch_size))
        progress(label, 1, 1)
        return rows.values["features"]

    reference = features(original, "unchanged")
    distances = {
        name: _distance(reference, features(_changed(original, change), name))
        for name, change in CHANGES.items()
    }
    # The images in random order, because files are often sorted by content.
    order = torch.randperm(images, generator=generator(0, EvalStream.FLOOR))
    first, second = order.chunk(2)
    return {
        "images": images,
        "features": net.name,
        "preprocessing": size,
        "distances": distances,
        "halves": _distance(reference[first], reference[second]),
    }


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of features [N, D] and [M, D]."""
    a, b = a.double(), b.double()
    return frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


def _changed(source: ImageSource, change: Change) -> ImageSource:
    """The images of a source after a change that follows their preprocessing."""

    def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
        with ThreadPoolExecutor(usable_cores()) as pool:
            for batch in source.draw(numbers, batch_size, sizes):
                views = {
                    size: torch.from_numpy(
                        np.stack(list(pool.map(lambda image: to_array(change(to_pil(image))), images)))
                    )
                    for size, images in batch.views.items()
                }
                yield replace(batch, views=views)

    return replace(source, draw=draw)
