"""Pictures of a report: what stands beside what, which are worst and best, and how they become data URLs."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from d2g.core.errors import UserError
from eval.metrics.nearest import Nearest

Better = Literal["lower", "higher", ""]
"""Which end of a measure is the good one, if any is."""

PIXEL_ART = 128
"""Images of at most this side are kept as they are and shown enlarged with hard edges."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """Rows of images. `columns`: per name N images, uint8 [3, H, W] each (a tensor [N, 3, H, W] will do).

    With one column the images form a gallery, with more a table: row i holds image i of every column.
    `prompts` and `notes` are per row, `captions` per image (column -> N lines); each is empty or whole.
    """

    title: str
    columns: Mapping[str, Sequence[Tensor] | Tensor]
    prompts: Sequence[str] = ()
    notes: Sequence[str] = ()
    captions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        assert self.columns, f"{self.title}: no column"
        assert set(self.captions) <= set(self.columns), f"{self.title}: captions of {list(self.captions)}"
        given = [*self.columns.values(), *self.captions.values(), self.prompts, self.notes]
        sizes = {len(part) for part in given if part is not self.prompts and part is not self.notes}
        sizes |= {len(part) for part in (self.prompts, self.notes) if part}
        assert len(sizes) == 1, (
            f"{self.title}: columns, prompts, notes and captions have {sorted(sizes)} rows"
        )

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """The two ends of a score per image."""

    worst: Pictures
    best: Pictures


def rank(
    score: str,
    values: Sequence[float],
    columns: Mapping[str, Sequence[Tensor] | Tensor],
    prompts: Sequence[str],
    *,
    better: Literal["lower", "higher"],
    count: int = 8,
) -> Ranking:
    """The `count` worst and the `count` best rows by `values` [N], the extreme one first.

    Only the rows shown are read from `columns`, so a lazy sequence over a folder will do. With fewer than
    2 `count` rows the two ends share none: each gets half. Ties go to the lower index. Raises UserError for
    fewer than two values or one that is not finite.
    """
    scores = torch.tensor(values, dtype=torch.float64)
    if len(scores) < 2 or not scores.isfinite().all():
        raise UserError(f"{score}: ranking needs two or more finite values, got {len(scores)} values")
    shown = min(count, len(scores) // 2)
    rising = scores.argsort(stable=True).tolist()
    falling = (-scores).argsort(stable=True).tolist()
    worst, best = (falling, rising) if better == "lower" else (rising, falling)
    return Ranking(
        worst=_rows(f"Worst by {score}", score, worst[:shown], scores, columns, prompts),
        best=_rows(f"Best by {score}", score, best[:shown], scores, columns, prompts),
    )


def _rows(
    title: str,
    score: str,
    rows: list[int],
    scores: Tensor,
    columns: Mapping[str, Sequence[Tensor] | Tensor],
    prompts: Sequence[str],
) -> Pictures:
    return Pictures(
        title=title,
        columns={name: [images[row] for row in rows] for name, images in columns.items()},
        prompts=[prompts[row] for row in rows] if prompts else (),
        notes=[f"{score} {scores[row]:.4g}, image {row}" for row in rows],
    )


def beside_neighbours(
    found: Nearest,
    generated: Sequence[Tensor] | Tensor,
    training: Sequence[Tensor] | Tensor,
    prompts: Sequence[str] = (),
    *,
    features: str,
) -> Pictures:
    """Each generated image beside its nearest training images, nearest first, with their distances.

    `training` is indexed by `found.indices` and only there. `features` names the network of the distances.
    """
    order = range(found.indices.shape[1])
    names = [f"nearest {place + 1}" if place else "nearest" for place in order]
    near = {name: [training[int(i)] for i in found.indices[:, n]] for n, name in enumerate(names)}
    said = {
        name: [
            f"{distance:.4g}, image {index}"
            for distance, index in zip(found.distances[:, n], found.indices[:, n], strict=True)
        ]
        for n, name in enumerate(names)
    }
    return Pictures(
        title="Nearest training images",
        columns={"generated": generated, **near},
        prompts=prompts,
        captions=said,
        text=f"Euclidean distance of {features} features. A generator that copies shows distances near 0.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Thumbnail:
    """An encoded image: data URL, size on the page in CSS pixels, and whether to keep its pixels' edges."""

    url: str
    width: int
    height: int
    pixelated: bool


def thumbnail(image: Tensor, side: int) -> Thumbnail:
    """uint8 [3, H, W] -> PNG as it is up to PIXEL_ART pixels, else WebP of at most `side` pixels."""
    assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3, image.shape
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    buffer, longest = io.BytesIO(), max(picture.size)
    if longest <= PIXEL_ART:
        picture.save(buffer, "PNG", optimize=True)
        times = PIXEL_ART // longest  # whole, so that every pixel becomes a square of one size
        width, height = picture.width * times, picture.height * times
        return Thumbnail(url=_data_url("png", buffer), width=width, height=height, pixelated=True)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    picture.save(buffer, "WEBP", quality=88, method=4)
    width, height = picture.size
    return Thumbnail(url=_data_url("webp", buffer), width=width, height=height, pixelated=False)


def _data_url(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
