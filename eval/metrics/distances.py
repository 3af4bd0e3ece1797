"""Distances between many rows as float64 would give them, at the speed of float32, block by block.

A product in float32 settles every comparison that its rounding can't turn around; what is left, a few pairs
in a million, is measured by differences in float64. Memory is O(chunk^2 + N), never N x N.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SPARE = 5
"""Candidates beyond k that are measured again, since rounding may have changed their order."""

CONFIDENCE = 8.0
"""Rounding of a dot product of D terms exceeds CONFIDENCE * sqrt(D) * eps of the terms' size with a
probability below 1e-13 (Higham & Mary 2019, Theorem 2.4).
"""

PAIRS = 4096
"""Pairs measured at once."""


class Rows:
    """Rows [N, D] around `centre` [D]: distances from dot products lose digits far from the origin."""

    def __init__(self, rows: Tensor, centre: Tensor) -> None:
        self.exact, self.centre = rows, centre
        # Where the user allows TF32 or bfloat16 products, float32 promises nothing.
        self.dtype = torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64
        self.rough = torch.cat([self.centred(part, self.dtype) for part in blocks(len(rows), PAIRS)])
        self.norms = self.rough.square().sum(1)

    def __len__(self) -> int:
        return len(self.exact)

    def centred(self, part: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Rows minus the centre, in `dtype`."""
        return (self.exact[part].double() - self.centre).to(dtype)


class Block:
    """Squared distances [n, m] of some rows of `a` to some of `b`: rough, each within `bound` of true."""

    def __init__(self, a: Rows, rows: slice, b: Rows, columns: slice) -> None:
        self.a, self.rows, self.b, self.columns = a, rows, b, columns
        x, y = (a.rough[rows], a.norms[rows]), (b.rough[columns], b.norms[columns])
        self.rough, self.bound = _products(*x, *y)

    def within(self, radius: Tensor) -> Tensor:
        """Which pairs are no farther apart than `radius`, squared, float64, [n, 1] or [1, m]: bool [n, m]."""
        inside = self.rough <= (radius - self.bound).to(self.rough.dtype)
        unsettled = (self.rough <= (radius + self.bound).to(self.rough.dtype)).logical_xor_(inside)
        pairs = unsettled.nonzero()
        if len(pairs) * 100 > inside.numel():  # a collapsed set, say: float64 settles more of them at once
            squared, bound = self._fine()
            return squared <= radius + bound
        for part in pairs.split(PAIRS):
            i, j = part.unbind(1)
            inside[i, j] = self._measure(i, j) <= radius.expand_as(inside)[i, j]
        return inside

    def _fine(self) -> tuple[Tensor, float]:
        x = self.a.centred(self.rows, torch.float64)
        y = self.b.centred(self.columns, torch.float64)
        return _products(x, x.square().sum(1), y, y.square().sum(1))

    def _measure(self, i: Tensor, j: Tensor) -> Tensor:
        return measure(self.a.exact[self.rows][i], self.b.exact[self.columns][j])


def _products(x: Tensor, xx: Tensor, y: Tensor, yy: Tensor) -> tuple[Tensor, float]:
    """|x|^2 + |y|^2 - 2 x.y of rows with squared norms xx, yy, and a bound on its rounding."""
    squared = torch.addmm(yy.expand(len(x), -1), x, y.T, alpha=-2).add_(xx[:, None])
    size = float(xx.max().sqrt() + yy.max().sqrt()) ** 2
    # The 4: rounding of centred rows, of norms and of the two sums.
    return squared, CONFIDENCE * (x.shape[1] ** 0.5 + 4) * torch.finfo(x.dtype).eps * size


def measure(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances of x[..., i, :] and y[..., i, :] by differences, in float64."""
    return (x.double() - y.double()).square().sum(-1)


def blocks(count: int, chunk: int) -> Iterator[slice]:
    """Slices of at most `chunk` that cover range(count)."""
    for start in range(0, count, chunk):
        yield slice(start, min(start + chunk, count))


def reaches(a: Rows, ranks: Sequence[int], chunk: int) -> Tensor:
    """Squared distance [N, len(ranks)], float64, of each row to its neighbour of each rank (1: nearest).

    The row itself is no neighbour; each pair is measured once for both its rows.
    """
    most, number = max(ranks), len(a) - 1
    assert 1 <= min(ranks) and most <= number, (ranks, number)
    keep = min(most + SPARE, number)
    best = torch.full((len(a), keep), torch.inf, dtype=a.dtype, device=a.exact.device)
    where = torch.zeros(len(a), keep, dtype=torch.int64, device=a.exact.device)
    bound = 0.0
    for rows in blocks(len(a), chunk):
        for columns in blocks(len(a), chunk):
            if columns.start < rows.start:
                continue
            block = Block(a, rows, a, columns)
            bound = max(bound, block.bound)
            if columns == rows:
                block.rough.fill_diagonal_(torch.inf)
            else:
                _merge(best[columns], where[columns], block.rough.T, rows.start)
            _merge(best[rows], where[rows], block.rough, columns.start)
    squared = best.double()
    wanted = torch.tensor([rank - 1 for rank in ranks], device=squared.device)
    # Rounding moves the value of a rank by `bound` at most: what is farther than twice that from it is not
    # it.
    candidates = ((squared[:, :, None] - squared[:, None, wanted]).abs() <= 2 * bound).any(2)
    for pairs in candidates.nonzero().split(PAIRS):
        i, j = pairs.unbind(1)
        squared[i, j] = measure(a.exact[i], a.exact[where[i, j]])
    squared = squared.sort(dim=1).values
    if keep < number:  # a row that was left out may be as near
        doubtful = (squared[:, most - 1] > best[:, -1].double() - bound).nonzero()[:, 0]
        for chosen in blocks(len(doubtful), max(1, chunk * chunk // number)):
            part = doubtful[chosen]
            squared[part] = closest(a.exact[part], a.exact, a.centre, keep, itself=part)[0]
    return squared[:, wanted]


def _merge(best: Tensor, where: Tensor, squared: Tensor, start: int) -> None:
    """Keep the smallest of `best` and `squared` [n, m] of columns from `start`, in place."""
    values, columns = squared.topk(min(best.shape[1], squared.shape[1]), largest=False)
    both, numbers = torch.cat([best, values], 1), torch.cat([where, columns + start], 1)
    kept, order = both.topk(best.shape[1], largest=False)
    best.copy_(kept)
    where.copy_(numbers.gather(1, order))


def closest(
    x: Tensor, y: Tensor, centre: Tensor, count: int, itself: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Squared distances [n, count], ascending, of rows x [n, D] to the nearest of y [m, D], and their places.

    Picked by float64 products around `centre` [D], measured by differences. Ties go to the lower place;
    `itself` [n]: the row of y that is no neighbour of a row of x.
    """
    a, b = x.double() - centre, y.double() - centre
    squared, _ = _products(a, a.square().sum(1), b, b.square().sum(1))
    if itself is not None:
        squared[torch.arange(len(x), device=x.device), itself] = torch.inf
    where = squared.topk(min(count, len(y)), largest=False).indices.sort(dim=1).values
    squared, order = measure(x[:, None], y[where]).sort(dim=1, stable=True)
    return squared, where.gather(1, order)
