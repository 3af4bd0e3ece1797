"""Images of a report: galleries, side-by-side tables, rankings, and thumbnails as data URLs."""

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

PIXEL_ART = 128
"""Images up to this side in pixels keep their pixels and are shown enlarged with hard edges."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """N rows of images. `columns`: N images by name, uint8 [3, H, W] each, or one tensor [N, 3, H, W].

    One column is shown as a gallery, several as a table: row i holds image i of every column. `prompts` and
    `notes` have one entry per row, `captions` one per image (column -> N lines); each may be empty.
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
        sizes = {len(rows) for rows in (*self.columns.values(), *self.captions.values())}
        sizes |= {len(rows) for rows in (self.prompts, self.notes) if rows}
        assert len(sizes) == 1, (
            f"{self.title}: columns, prompts, notes and captions have {sorted(sizes)} rows"
        )

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """The images with the worst and the best scores."""

    worst: Pictures
    best: Pictures


def rank_images(
    score: str,
    values: Sequence[float],
    columns: Mapping[str, Sequence[Tensor] | Tensor],
    prompts: Sequence[str],
    *,
    better: Literal["lower", "higher"],
    count: int = 8,
) -> Ranking:
    """The `count` worst and the `count` best rows by `values` [N], most extreme first.

    Reads only these rows from `columns`, so a lazy sequence over a folder works. With fewer than 2 `count`
    rows each end gets half of them. Ties go to the lower index. Raises UserError for fewer than two values or
    a value that is not finite.
    """
    scores = torch.tensor(values, dtype=torch.float64)
    if len(scores) < 2 or not scores.isfinite().all():
        raise UserError(f"{score}: ranking needs two or more finite values, got {len(scores)} values")
    count = min(count, len(scores) // 2)
    ascending = scores.argsort(stable=True).tolist()
    descending = (-scores).argsort(stable=True).tolist()
    worst, best = (descending, ascending) if better == "lower" else (ascending, descending)
    return Ranking(
        worst=_rows(f"Worst by {score}", score, worst[:count], scores, columns, prompts),
        best=_rows(f"Best by {score}", score, best[:count], scores, columns, prompts),
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


def beside_nearest(
    nearest: Nearest,
    generated: Sequence[Tensor] | Tensor,
    training: Sequence[Tensor] | Tensor,
    prompts: Sequence[str] = (),
    *,
    features: str,
) -> Pictures:
    """Each generated image beside its nearest training images, nearest first, with their distances.

    `training` is read at `nearest.indices` only. `features` names the network of the distances.
    """
    names = [f"nearest {place + 1}" if place else "nearest" for place in range(nearest.indices.shape[1])]
    neighbors = {name: [training[int(i)] for i in nearest.indices[:, n]] for n, name in enumerate(names)}
    captions = {
        name: [
            f"{distance:.4g}, image {index}"
            for distance, index in zip(nearest.distances[:, n], nearest.indices[:, n], strict=True)
        ]
        for n, name in enumerate(names)
    }
    return Pictures(
        title="Nearest training images",
        columns={"generated": generated, **neighbors},
        prompts=prompts,
        captions=captions,
        text=f"Euclidean distance of {features} features. A generator that copies shows distances near 0.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Thumbnail:
    """An encoded image: data URL, size on the page in CSS pixels, and whether pixels keep hard edges."""

    url: str
    width: int
    height: int
    pixelated: bool


def thumbnail(image: Tensor, side: int) -> Thumbnail:
    """uint8 [3, H, W] -> a lossless PNG up to PIXEL_ART pixels, else WebP of at most `side` pixels."""
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
