"""Numbered sources of images. Each image is a function of its number alone."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d2g.core.config import digest
from d2g.core.errors import UserError
from eval.images.folders import (
    Batch,
    ImageFiles,
    Reading,
    expect_numbered_order,
    load_all,
    read_images,
)
from eval.images.resize import NATIVE, prepare_batch
from eval.measure.latency import Parts


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledBatch:
    """The images `first`, `first` + 1, ... and their B prompts ("" for an image without one).

    `views`: the images at each requested preprocessing (`eval.images.resize`), uint8 [B, 3, H, W]. For images
    from files, `converted` counts what was converted to 8-bit RGB, and `digests` [B, 32] holds their sha256.
    """

    first: int
    views: Mapping[str, Tensor]
    prompts: list[str]
    converted: Mapping[str, int] = field(default_factory=dict)
    digests: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)


DrawBatches = Callable[[range, int, Sequence[str]], Iterator[SampledBatch]]
"""(image numbers, batch size, preprocessings) -> batches of these images, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSource:
    """A sampler, or image files.

    `facts`: everything that decides an image, as JSON; an evaluation resumes only with equal facts. `count`:
    the number of images, None for an endless sampler. `parts`: the parts that latency is measured of.
    """

    name: str
    facts: Mapping[str, Any]
    draw: DrawBatches
    count: int | None = None
    parts: Parts | None = None

    def image(self, number: int) -> Tensor:
        """One image without preprocessing, uint8 [3, H, W]."""
        return next(self.draw(range(number, number + 1), 1, (NATIVE,))).views[NATIVE][0]


def views_of(images: Tensor, sizes: Sequence[str]) -> dict[str, Tensor]:
    """uint8 [B, 3, H, W] at each preprocessing of `sizes`."""
    return {size: prepare_batch(images, size) for size in sizes}


def image_source(files: ImageFiles, prompts: Sequence[str] = ()) -> ImageSource:
    """A source of image files. `prompts` replaces their captions, in the order of the files.

    Raises UserError for another number of prompts than of images, and as `expect_numbered_order` does.
    """
    count = len(files)
    if prompts:
        expect_numbered_order(files)
    if prompts and len(prompts) != count:
        raise UserError(
            f"{files.name} holds {count} images, and there are {len(prompts)} prompts; give one for each, in "
            "the order of the file names"
        )

    def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
        # Read the files once per preprocessing: images of several sizes cannot be stacked before resizing.
        # Only the first reader counts conversions and digests.
        reading, counted = Reading(), Counter[str]()
        readers = [
            read_images(
                files,
                start=numbers.start,
                limit=len(numbers),
                resize=size,
                batch_size=batch_size,
                reading=None if position else reading,
            )
            for position, size in enumerate(sizes)
        ]

        # Join the batches of all preprocessings, with prompts, conversions and digests of these files.
        first = numbers.start
        for batches in zip(*readers, strict=True):
            captions = batches[0][1]
            count = len(captions)
            texts = list(prompts[first : first + count]) if prompts else captions
            views = {size: images for size, (images, _) in zip(sizes, batches, strict=True)}
            digests = torch.frombuffer(bytearray(b"".join(reading.digests[-count:])), dtype=torch.uint8)
            yield SampledBatch(
                first=first,
                views=views,
                prompts=texts,
                converted=reading.converted - counted,
                digests=digests.reshape(count, -1),
            )
            counted, first = reading.converted.copy(), first + count

    facts = {"kind": "images", "name": files.name, "files_sha256": digest(files.listing()), "images": count}
    if prompts:
        facts["prompts_sha256"] = digest(list(prompts))
    elif files.column or files.caption_files:
        facts["captions_sha256"] = digest([files.column, files.caption_listing()])
    return ImageSource(name=files.name, facts=facts, draw=draw, count=count)


def batch_source(name: str, batches: Iterable[Batch]) -> ImageSource:
    """A source of images that are already in memory: batches of uint8 [B, 3, H, W] and B captions.

    Raises UserError when there are none, and for other tensors or another number of captions.
    """
    images, prompts = load_all(_checked(name, batches))

    def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
        for first in range(numbers.start, numbers.stop, batch_size):
            part = slice(first, min(first + batch_size, numbers.stop))
            yield SampledBatch(first=first, views=views_of(images[part], sizes), prompts=prompts[part])

    return ImageSource(name=name, facts={"kind": "memory", "name": name}, draw=draw, count=len(images))


def _checked(name: str, batches: Iterable[Batch]) -> Iterator[Batch]:
    for images, captions in batches:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"{name}: images are {images.dtype} {tuple(images.shape)}; expected torch.uint8 [B, 3, H, W] "
                "of 0 to 255"
            )
        if len(captions) != len(images):
            raise UserError(
                f"{name}: {len(images)} images with {len(captions)} captions; expected one for each image, "
                '"" where there is none'
            )
        yield images, captions
