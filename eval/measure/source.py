"""Where images come from: numbered, each a function of its number alone."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d2g.core.config import digest
from d2g.core.errors import UserError
from eval.images.folders import Batch, ImageFiles, Reading, load_all, read_images
from eval.images.resize import NATIVE, prepare_batch
from eval.measure.latency import Parts


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledBatch:
    """Images `first`, `first` + 1, … at each size asked for (`eval.images.resize` -> uint8 [B, 3, H, W]), and their
    B prompts ("" where there is none). Of files also: how many were converted from what, and sha256 [B, 32].
    """

    first: int
    views: Mapping[str, Tensor]
    prompts: list[str]
    converted: Mapping[str, int] = field(default_factory=dict)
    digests: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)


Draw = Callable[[range, int, Sequence[str]], Iterator[SampledBatch]]
"""(numbers, batch size, sizes) -> the images of those numbers, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A sampler, or files. `facts`: JSON, all that decides an image: a run resumed with others is refused.

    `count`: how many images there are, None where there is no end. `parts`: what latency is
    made of.
    """

    name: str
    facts: Mapping[str, Any]
    draw: Draw
    count: int | None = None
    parts: Parts | None = None

    def image(self, number: int) -> Tensor:
        """One image as it is, uint8 [3, H, W]."""
        return next(self.draw(range(number, number + 1), 1, (NATIVE,))).views[NATIVE][0]


def views_of(images: Tensor, sizes: Sequence[str]) -> dict[str, Tensor]:
    """uint8 [B, 3, H, W] at each size."""
    return {size: prepare_batch(images, size) for size in sizes}


def image_source(files: ImageFiles, prompts: Sequence[str] = ()) -> Source:
    """Images from files; `prompts`, if given, are theirs in order. Raises UserError for too few of them."""
    count = len(files)
    if prompts and len(prompts) < count:
        raise UserError(
            f"{files.name} holds {count} images, and there are {len(prompts)} prompts; give one for each, in "
            "the order of the file names"
        )

    def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
        # Each size from the file itself: pictures of several sizes cannot be stacked before they are resized.
        reading, before = Reading(), Counter[str]()
        readers = [
            read_images(
                files,
                start=numbers.start,
                limit=len(numbers),
                resize=size,
                batch_size=batch_size,
                reading=None if place else reading,
            )
            for place, size in enumerate(sizes)
        ]
        first = numbers.start
        for batches in zip(*readers, strict=True):
            own = batches[0][1]
            texts = list(prompts[first : first + len(own)]) if prompts else own
            views = {size: images for size, (images, _) in zip(sizes, batches, strict=True)}
            digests = torch.frombuffer(bytearray(b"".join(reading.digests[-len(own) :])), dtype=torch.uint8)
            yield SampledBatch(
                first=first,
                views=views,
                prompts=texts,
                converted=reading.converted - before,
                digests=digests.reshape(len(own), -1),
            )
            before, first = reading.converted.copy(), first + len(own)

    facts = {"kind": "images", "name": files.name, "files_sha256": digest(files.listing()), "images": count}
    if prompts:
        facts["prompts_sha256"] = digest(list(prompts))
    return Source(name=files.name, facts=facts, draw=draw, count=count)


def batch_source(name: str, batches: Iterable[Batch]) -> Source:
    """Images that are in memory already. Raises UserError when there are none."""
    images, prompts = load_all(batches)

    def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
        for first in range(numbers.start, numbers.stop, batch_size):
            part = slice(first, min(first + batch_size, numbers.stop))
            yield SampledBatch(first=first, views=views_of(images[part], sizes), prompts=prompts[part])

    return Source(name=name, facts={"kind": "memory", "name": name}, draw=draw, count=len(images))
