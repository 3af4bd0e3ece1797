"""Distances between many rows: float64 accuracy at the speed of float32, block by block.

Products in float32 settle every comparison that their rounding cannot change. The few remaining pairs, about
one in a million, are measured by differences in float64. Memory is O(chunk^2 + N), never N x N.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from d2g.core.precision import fp32_products_are_exact

SPARE = 5
"""Number of candidates beyond k whose distance is also computed exactly: rounding may change their order."""

CONFIDENCE = 8.0
"""The rounding error of a dot product of D terms exceeds CONFIDENCE * sqrt(D) * eps * (size of the terms)
with a probability below 1e-13 (Higham & Mary 2019, Theorem 2.4).
"""

PAIRS = 4096
"""Number of pairs whose distance is computed exactly at once."""


class CenteredRows:
    """Rows [N, D] centered around `center` [D]: far from the origin, dot products lose digits.

    `exact` holds the rows as given, `centered` the rows minus the center in the dtype of the products, and
    `norms` their squared norms.
    """

    def __init__(self, rows: Tensor, center: Tensor) -> None:
        self.exact, self.center = rows, center
        # If the user allows TF32 or bfloat16 products, float32 gives no bound on rounding.
        self.dtype = torch.float32 if fp32_products_are_exact(rows.device) else torch.float64
        self.centered = torch.cat([self.center_rows(part, self.dtype) for part in blocks(len(rows), PAIRS)])
        self.norms = self.centered.square().sum(1)

    def __len__(self) -> int:
        return len(self.exact)

    def center_rows(self, part: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `part` minus the center, in `dtype`."""
        return (self.exact[part].double() - self.center).to(dtype)


class DistanceBlock:
    """Approximate squared distances [n, m] of some rows of `a` to some rows of `b`, each within `bound`."""

    def __init__(self, a: CenteredRows, rows: slice, b: CenteredRows, columns: slice) -> None:
        self.a, self.rows, self.b, self.columns = a, rows, b, columns
        x, y = (a.centered[rows], a.norms[rows]), (b.centered[columns], b.norms[columns])
        self.approximate, self.bound = _products(*x, *y)

    def within(self, radius: Tensor) -> Tensor:
        """Whether each pair is within the squared `radius`, float64 [n, 1] or [1, m]: bool [n, m]."""
        # Pairs that rounding cannot move across the radius are settled; the others are computed again.
        inside = self.approximate <= (radius - self.bound).to(self.approximate.dtype)
        maybe_inside = self.approximate <= (radius + self.bound).to(self.approximate.dtype)
        unsettled = maybe_inside.logical_xor_(inside)
        pairs = unsettled.nonzero()
        # Many unsettled pairs, as of a collapsed set: one float64 product is faster than exact pairs.
        if len(pairs) * 100 > inside.numel():
            squared, bound = self._float64_products()
            return squared <= radius + bound
        for part in pairs.split(PAIRS):
            i, j = part.unbind(1)
            inside[i, j] = self._exact(i, j) <= radius.expand_as(inside)[i, j]
        return inside

    def _float64_products(self) -> tuple[Tensor, float]:
        x = self.a.center_rows(self.rows, torch.float64)
        y = self.b.center_rows(self.columns, torch.float64)
        return _products(x, x.square().sum(1), y, y.square().sum(1))

    def _exact(self, i: Tensor, j: Tensor) -> Tensor:
        return exact_squared_distances(self.a.exact[self.rows][i], self.b.exact[self.columns][j])


def _products(x: Tensor, xx: Tensor, y: Tensor, yy: Tensor) -> tuple[Tensor, float]:
    """|x|^2 + |y|^2 - 2 x.y for rows x, y with squared norms xx, yy, and a bound on the rounding error."""
    squared = torch.addmm(yy.expand(len(x), -1), x, y.T, alpha=-2).add_(xx[:, None])
    size = float(xx.max().sqrt() + yy.max().sqrt()) ** 2
    # The 4 covers the rounding of the centered rows, of the norms and of the two sums.
    return squared, CONFIDENCE * (x.shape[1] ** 0.5 + 4) * torch.finfo(x.dtype).eps * size


def exact_squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances of x[..., i, :] and y[..., i, :], from differences in float64."""
    return (x.double() - y.double()).square().sum(-1)


def blocks(count: int, chunk: int) -> Iterator[slice]:
    """Slices of at most `chunk` that cover range(count)."""
    for start in range(0, count, chunk):
        yield slice(start, min(start + chunk, count))


def kth_neighbor_distances(a: CenteredRows, ranks: Sequence[int], chunk: int) -> Tensor:
    """Squared distance [N, len(ranks)], float64, of each row to its neighbor of each rank (1: the nearest).

    A row is not its own neighbor. Each block of pairs is measured once for both of its row ranges.
    """
    largest, number = max(ranks), len(a) - 1
    assert 1 <= min(ranks) and largest <= number, (ranks, number)
    # Collect the approximately nearest candidates of each row, and where they are.
    keep = min(largest + SPARE, number)
    best = torch.full((len(a), keep), torch.inf, dtype=a.dtype, device=a.exact.device)
    position = torch.zeros(len(a), keep, dtype=torch.int64, device=a.exact.device)
    bound = 0.0
    for rows in blocks(len(a), chunk):
        for columns in blocks(len(a), chunk):
            if columns.start < rows.start:
                continue
            block = DistanceBlock(a, rows, a, columns)
            bound = max(bound, block.bound)
            if columns == rows:
                block.approximate.fill_diagonal_(torch.inf)
            else:
                _merge(best[columns], position[columns], block.approximate.T, rows.start)
            _merge(best[rows], position[rows], block.approximate, columns.start)
    squared = best.double()
    columns_of_ranks = torch.tensor([rank - 1 for rank in ranks], device=squared.device)
    # Measure exactly every candidate that may have one of the ranks. Rounding moves the value of a rank by at
    # most `bound`, so a candidate farther than twice that from it cannot have the rank.
    candidates = ((squared[:, :, None] - squared[:, None, columns_of_ranks]).abs() <= 2 * bound).any(2)
    for pairs in candidates.nonzero().split(PAIRS):
        i, j = pairs.unbind(1)
        squared[i, j] = exact_squared_distances(a.exact[i], a.exact[position[i, j]])
    squared = squared.sort(dim=1).values
    # Search again, in float64, where a row outside the candidates may be as near as the last rank.
    if keep < number:
        doubtful = (squared[:, largest - 1] > best[:, -1].double() - bound).nonzero()[:, 0]
        for batch in blocks(len(doubtful), max(1, chunk * chunk // number)):
            part = doubtful[batch]
            squared[part] = closest(a.exact[part], a.exact, a.center, keep, itself=part)[0]
    return squared[:, columns_of_ranks]


def _merge(best: Tensor, position: Tensor, squared: Tensor, start: int) -> None:
    """Merge squared distances [n, m] to the rows from `start` on into the smallest ones so far, in place."""
    values, columns = squared.topk(min(best.shape[1], squared.shape[1]), largest=False)
    candidates, positions = torch.cat([best, values], 1), torch.cat([position, columns + start], 1)
    smallest, order = candidates.topk(best.shape[1], largest=False)
    best.copy_(smallest)
    position.copy_(positions.gather(1, order))


def closest(
    x: Tensor, y: Tensor, center: Tensor, count: int, itself: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` nearest rows of y [m, D] for each row of x [n, D]: (squared distances, indices into y).

    Both are [n, count], ascending. Candidates are picked by float64 products around `center` [D] and measured
    by differences. Ties go to the lower index. `itself` [n]: the row of y that is the row of x itself.
    """
    a, b = x.double() - center, y.double() - center
    squared, _ = _products(a, a.square().sum(1), b, b.square().sum(1))
    if itself is not None:
        squared[torch.arange(len(x), device=x.device), itself] = torch.inf
    indices = squared.topk(min(count, len(y)), largest=False).indices.sort(dim=1).values
    squared, order = exact_squared_distances(x[:, None], y[indices]).sort(dim=1, stable=True)
    return squared, indices.gather(1, order)
