"""Random order without memory: position -> row, a permutation computed for each position alone.

A keyed Feistel network (Luby and Rackoff, 1988) on a grid with a few more cells than rows, walked on from the
cells too many (Black and Rogaway, 2002). The whole state is one integer, the position in an endless stream of
epochs: any process can start anywhere, and the order of 12M rows costs no array of 12M.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from d2g.core.seeds import U64, Stream, checked_key, seed_sequence

I64 = NDArray[np.int64]

MOST_ROWS = 2**40  # 32 hash bits choose among sqrt(rows) cells: within 2^-12 of evenly, at worst
# With 9 rows or more, 12 rounds show no fault; fewer rows mix slower. Over a million epochs of 8 rows, a
# chi-square test of all 40,320 orders still sees 20 rounds (z = 3.2), but not 24 (z = 1.1).
ROUNDS = 24


def _mix(x: U64) -> U64:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): a bijection, each bit of x acts on all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _turn(place: U64, length: U64, word: U64) -> U64:
    """`place` moved round a ring of `length` by an amount from the upper 32 bits of a mixed word."""
    moved = place + (((word >> 32) * length) >> 32)
    return np.asarray(np.minimum(moved, moved - length))  # modulo: below 0 wraps to huge


def _network(keys: U64, rows: U64, columns: U64, cell: U64, tweak: U64) -> U64:
    """A permutation of range(rows * columns): turns every column by a hash of its number, then every row."""
    row = cell // columns
    column = cell - row * columns
    for number, key in enumerate(keys):
        word = tweak ^ key
        if number % 2:
            column = _turn(column, columns, _mix(row ^ word))
        else:
            row = _turn(row, rows, _mix(column ^ word))
    return row * columns + column


def _shuffled(keys: U64, size: I64, x: I64, tweak: U64) -> I64:
    """Where a permutation of range(size) takes x [N]; `tweak` says which. `size` and `tweak`: [N] or [1]."""
    assert (x < size).all(), "a walk from outside need not end"
    # An even number of rows: turns of odd rings alone would reach the even permutations only.
    rows = np.sqrt((size - 1).astype(np.float64)).astype(np.int64) // 2 * 2 + 2
    sides = rows.astype(np.uint64), (-(-size // rows)).astype(np.uint64)
    y = _network(keys, *sides, x.astype(np.uint64), tweak)
    high, wide, limit, which = np.broadcast_arrays(*sides, size.astype(np.uint64), tweak, y)[:4]
    while len(out := np.flatnonzero(y >= limit)):
        y[out] = _network(keys, high[out], wide[out], y[out], which[out])
    return y.astype(np.int64)


@lru_cache(maxsize=16)
def _keys(seed: int, purpose: int) -> U64:
    return seed_sequence(seed, Stream.SHUFFLE, purpose).generate_state(ROUNDS, np.uint64).astype(np.uint64)


def _arguments(seed: int, epoch: ArrayLike, size: int, positions: ArrayLike) -> tuple[int, U64, I64]:
    """The seed checked; epochs, mixed, and positions as vectors. An epoch [1] broadcasts to positions [N]."""
    assert 1 <= size <= MOST_ROWS, f"{size} rows to shuffle, expected 1 to 2^40"
    epochs, places = (np.atleast_1d(np.asarray(part, dtype=np.int64)) for part in (epoch, positions))
    assert (epochs >= 0).all(), "an epoch below 0"
    assert ((places >= 0) & (places < size)).all(), f"a position outside 0 to {size - 1}"
    return checked_key("shuffle: seed", seed), _mix(epochs.astype(np.uint64)), places


def permuted(seed: int, epoch: ArrayLike, size: int, positions: ArrayLike) -> I64:
    """The rows at `positions` [N] of an epoch: a permutation of range(size), fixed by (seed, epoch, size).

    size from 1 to 2^40, positions from 0 to size - 1; one epoch, or one for each position. Constant time and
    memory for each position. SettingError for a seed outside 0 to 2^63 - 1.
    """
    seed, tweak, places = _arguments(seed, epoch, size, positions)
    return _shuffled(_keys(seed, 0), np.array([size]), places, tweak)


def permuted_blocks(
    seed: int, epoch: ArrayLike, size: int, positions: ArrayLike, block: int, window: int
) -> I64:
    """Like `permuted`, but neighbours come from few places: blocks of `block` consecutive rows (the last may
    be shorter) are permuted, then the rows of each `window` blocks in a row among themselves.

    Weaker than `permuted`: each `window * block` positions from the epoch's start on hold whole blocks and
    nothing else, so rows of one block never come further apart than that. Where neighbours on disk are alike,
    let a window span many blocks; one as long as the epoch is a full shuffle.
    """
    assert block >= 1 and window >= 1, f"blocks of {block} rows in windows of {window}, expected 1 or more"
    seed, tweak, places = _arguments(seed, epoch, size, positions)
    others = -(-size // block) - 1  # blocks beside the last: whole ones
    missing = (others + 1) * block - size  # rows that the last is short of
    window = min(window, others + 1)
    span = window * block
    # The last block draws its slot first and the others share the rest, so that nobody has to search for it.
    slot = (_mix(tweak ^ _keys(seed, 1)[0]) % (others + 1)).astype(np.int64)
    short = slot // window  # the window it falls in
    # Which window, where it begins and how many rows it holds.
    number = (places + missing * (places >= (short + 1) * span - missing)) // span
    first = number * span - missing * (number > short)
    held = np.minimum(span, (others + 1) * block - number * span) - missing * (number == short)
    place = first + _shuffled(_keys(seed, 2), held, places - first, _mix(tweak ^ number.astype(np.uint64)))
    # Which slot, and which block lies there.
    place += missing * (place >= (slot + 1) * block - missing)
    at, row = np.divmod(place, block)
    rank = np.maximum(at - (at >= slot), 0)  # among the others
    order = _shuffled(_keys(seed, 3), np.array([max(others, 1)]), rank, tweak)
    return np.asarray(np.where(at == slot, others, order) * block + row)


def permuted_batch(
    seed: int, size: int, start: int, count: int, block: int = 0, window: int = 0
) -> list[int]:
    """Rows `start … start + count` of an endless stream of epochs, each a fresh permutation of range(size).

    `block` and `window` as in `permuted_blocks`; 0 for either is the full shuffle of `permuted`.
    """
    stream = start + np.arange(count, dtype=np.int64)
    epoch, positions = stream // size, stream % size
    if block and window:
        rows = permuted_blocks(seed, epoch, size, positions, block, window)
    else:
        rows = permuted(seed, epoch, size, positions)
    return [int(row) for row in rows]
