"""Nearest training images by features: does a generator repeat what it was shown?"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from d2g.core.errors import SettingError, UserError
from eval.metrics.distances import SPARE, closest

_QUERIES = 256  # generated rows at a time, so that the candidates of many queries stay small


@dataclass(frozen=True, kw_only=True, slots=True)
class Nearest:
    """distances [M, k], ascending, in the features' unit; indices [M, k]: rows of the training set."""

    distances: Tensor
    indices: Tensor


@torch.no_grad()
def nearest_neighbors(generated: Tensor, training: Iterable[Tensor], *, k: int) -> Nearest:
    """The k nearest training rows (Euclidean, float64) of each generated row [M, D].

    `training` yields the features of the training set in order, in chunks [n, D] of any sizes (a tensor's
    `.split(4096)`, or a network over a folder): never M x N in memory, and the result does not depend on the
    chunks. Ties go to the lower index. For cosine distance, feed unit rows. Raises SettingError for k < 1,
    UserError when the training set has fewer than k rows, another width, or a value that is not finite.
    """
    if k < 1:
        raise SettingError(f"k is {k}; expected 1 or more neighbours")
    queries = _checked(generated, "generated", generated.shape[1])
    squared = torch.empty(len(queries), 0, dtype=torch.float64)
    indices = torch.empty(len(queries), 0, dtype=torch.int64)
    centre, count = queries.double().mean(0), 0
    for chunk in training:
        rows = _checked(chunk, "training", queries.shape[1])
        found = [closest(part, rows, centre, k + SPARE) for part in queries.split(_QUERIES)]
        squared = torch.cat([squared, torch.cat([near for near, _ in found])], 1)
        indices = torch.cat([indices, torch.cat([where for _, where in found]) + count], 1)
        # What is kept is sorted and of lower indices than what is new: a stable sort settles ties.
        squared, order = (part[:, :k] for part in squared.sort(dim=1, stable=True))
        indices, count = indices.gather(1, order), count + len(rows)
    if count < k:
        raise UserError(f"the training set has {count} images; {k} nearest neighbours need at least {k}")
    return Nearest(distances=squared.sqrt(), indices=indices)


def _checked(rows: Tensor, name: str, width: int) -> Tensor:
    if rows.ndim != 2 or rows.shape[1] != width:
        raise UserError(
            f"{name} features are {list(rows.shape)}; expected [n, {width}]: use one network for both"
        )
    if not rows.isfinite().all():
        raise UserError(f"{name} features hold a value that is not finite; look for a broken image")
    return rows.cpu()
