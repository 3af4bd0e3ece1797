"""Nearest training images by features: whether a generator repeats its training images."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from d2g.core.errors import SettingError, UserError
from eval.metrics.distances import SPARE, closest

_QUERIES = 256  # generated rows per step, which bounds the memory of their candidates


@dataclass(frozen=True, kw_only=True, slots=True)
class Nearest:
    """`distances` [M, k], ascending, in units of the features; `indices` [M, k] into the training set."""

    distances: Tensor
    indices: Tensor


@torch.no_grad()
def nearest_neighbors(generated: Tensor, training: Iterable[Tensor], *, k: int) -> Nearest:
    """The k nearest training rows (Euclidean, float64) of each generated row [M, D].

    `training` yields the features of the training set in order, in chunks [n, D] of any size (for example a
    tensor's `.split(4096)`). Memory is never M x N, and the result does not depend on the chunks. Ties go to
    the lower index. For cosine distance, pass unit rows. Raises SettingError for k < 1, UserError when the
    training set has fewer than k rows, another width, or a value that is not finite.
    """
    if k < 1:
        raise SettingError(f"k is {k}; expected 1 or more neighbors")
    # Candidates so far: squared distances and training rows.
    queries = _checked(generated, "generated", generated.shape[1])
    squared = torch.empty(len(queries), 0, dtype=torch.float64)
    indices = torch.empty(len(queries), 0, dtype=torch.int64)
    center, count = queries.double().mean(0), 0
    for chunk in training:
        rows = _checked(chunk, "training", queries.shape[1])
        candidates = [closest(part, rows, center, k + SPARE) for part in queries.split(_QUERIES)]
        squared = torch.cat([squared, torch.cat([near for near, _ in candidates])], 1)
        indices = torch.cat([indices, torch.cat([index for _, index in candidates]) + count], 1)
        # Earlier candidates are sorted and have lower indices than new ones: a stable sort settles ties.
        squared, order = (part[:, :k] for part in squared.sort(dim=1, stable=True))
        indices, count = indices.gather(1, order), count + len(rows)
    if count < k:
        raise UserError(f"the training set has {count} images; {k} nearest neighbors need at least {k}")
    return Nearest(distances=squared.sqrt(), indices=indices)


def _checked(rows: Tensor, name: str, width: int) -> Tensor:
    if rows.ndim != 2 or rows.shape[1] != width:
        raise UserError(
            f"{name} features are {list(rows.shape)}; expected [n, {width}]: use one network for both"
        )
    if not rows.isfinite().all():
        raise UserError(f"{name} features hold a value that is not finite; look for a broken image")
    return rows.cpu()
