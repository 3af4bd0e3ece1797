"""d2g.core.shuffle: uniform permutations, optionally in blocks, and endless streams from any start."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from d2g.core.errors import SettingError
from d2g.core.shuffle import permuted, permuted_batch, permuted_blocks

SMALL = st.one_of(st.integers(1, 40), st.integers(1, 3000))
SIZES = st.one_of(SMALL, st.sampled_from([9973, 2**14, 2**14 + 1, 10**5]))
MOST = 2**63 - 1


def z_score(counts: np.ndarray) -> float:
    """Pearson's chi-square against equal counts, in standard deviations."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


# Permutations.


@given(SIZES, st.integers(0, MOST), st.integers(0, MOST))
@example(1, 0, 0)
@example(2, 0, 0)
@example(97, MOST, MOST)
@example(10**5, 0, 0)
@settings(max_examples=60, deadline=None)
def test_every_epoch_of_every_size_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    rows = permuted(seed, epoch, size, np.arange(size))
    assert rows.dtype == np.int64 and np.array_equal(np.sort(rows), np.arange(size))


@given(st.data(), SIZES, st.integers(0, MOST), st.integers(0, MOST))
@settings(max_examples=60, deadline=None)
def test_a_row_does_not_depend_on_other_queried_positions(
    data: st.DataObject, size: int, seed: int, epoch: int
) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), max_size=9))
    permutation = permuted(seed, epoch, size, np.arange(size))
    assert permuted(seed, epoch, size, positions).tolist() == permutation[positions].tolist()
    assert [permuted(seed, epoch, size, place).item() for place in positions] == permutation[
        positions
    ].tolist()


@pytest.mark.parametrize("size", [2**32 - 1, 2**32 + 1, 2**40])
def test_huge_sizes_stay_in_range_without_collisions(size: int) -> None:
    places = np.concatenate([np.arange(5000), size - 1 - np.arange(5000)])
    rows = permuted(1, 2, size, places)
    assert rows.min() >= 0 and rows.max() < size and len(set(rows.tolist())) == 10_000
    counts = np.bincount(rows * 20 // size, minlength=20)
    assert abs(z_score(counts)) < 5


def test_epochs_and_seeds_differ() -> None:
    places = np.arange(1000)
    count_orders = [
        permuted(seed, epoch, 1000, places) for seed in (0, 1, MOST) for epoch in (0, 1, 2**32, MOST)
    ]
    for i, a in enumerate([*count_orders, places]):
        for b in count_orders[:i]:
            assert (a == b).sum() < 10, "two random permutations agree in one place on average"
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / 1000**0.5


def test_orders_are_pinned() -> None:
    """Runs can be resumed with a later release."""
    assert permuted(7, 3, 10, np.arange(10)).tolist() == [6, 1, 7, 0, 2, 4, 5, 9, 3, 8]
    assert permuted(0, 3, 12_000_000, [6_000_000, 6_000_001]).tolist() == [3370038, 760105]
    assert permuted_blocks(7, 3, 10, np.arange(10), 3, 2).tolist() == [3, 5, 6, 8, 4, 7, 2, 9, 1, 0]


def count_orders(
    size: int, number: int, epochs: int, order: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Count how often each of the `number` possible orders of range(size) occurs in `epochs` epochs."""
    code = np.zeros(epochs, dtype=np.int64)
    for place in range(size):
        code = code * size + order(np.arange(epochs), np.full(epochs, place))
    counts = np.unique(code, return_counts=True)[1]
    assert len(counts) <= number
    return np.pad(counts, (0, number - len(counts)))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7])
def test_every_order_is_equally_likely(size: int) -> None:
    """All size! orders, odd permutations included."""
    counts = count_orders(size, math.factorial(size), 40_000, lambda epoch, at: permuted(5, epoch, size, at))
    assert abs(z_score(counts)) < 4


@pytest.mark.parametrize("size", [1000, 10_007, 12_000_000])
def test_positions_epochs_and_seeds_are_independent(size: int) -> None:
    """Chi-square tests of joint counts on a 25 x 25 grid."""
    epoch, place = np.divmod(np.arange(60_000), size)
    rows, far = permuted(0, epoch, size, place), size // 3
    others = {
        "the next": permuted(0, epoch, size, (place + 1) % size),
        "one far away": permuted(0, epoch, size, (place + far) % size),
        "the next epoch": permuted(0, epoch + 1, size, place),
        "the next seed": permuted(1, epoch, size, place),
    }
    for name, other in others.items():
        counts = np.bincount(rows * 25 // size * 25 + other * 25 // size, minlength=625)
        assert z_score(counts) < 5, name


# Blocks.


@given(SMALL, st.integers(0, MOST), st.integers(0, MOST), st.integers(1, 50), st.integers(1, 12))
@example(10, 0, 0, 10, 1)
@example(10, 0, 0, 11, 1)
@example(10, 0, 0, 1, 1)
@example(45, 3, 6, 7, 25)
@example(10**5, 0, 0, 1024, 16)
@settings(max_examples=100, deadline=None)
def test_each_window_of_an_epoch_contains_complete_blocks(
    size: int, seed: int, epoch: int, block: int, window: int
) -> None:
    """A window contains exactly the rows of `window` blocks, also at incomplete ends."""
    rows = permuted_blocks(seed, epoch, size, np.arange(size), block, window)
    assert rows.dtype == np.int64 and np.array_equal(np.sort(rows), np.arange(size))
    missing, start, left = -size % block, 0, -(-size // block)
    while left:
        here = min(window, left)
        blocks = set((rows[start : start + here * block - missing] // block).tolist())
        assert len(blocks) == here
        held = [row for b in sorted(blocks) for row in range(b * block, min(size, (b + 1) * block))]
        assert sorted(rows[start : start + len(held)].tolist()) == held
        start, left = start + len(held), left - here
    assert start == size


@given(st.data(), st.integers(1, 300), st.integers(1, 20), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_a_row_in_blocks_does_not_depend_on_other_queried_positions(
    data: st.DataObject, size: int, block: int, window: int
) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), max_size=9))
    epochs = data.draw(st.lists(st.integers(0, MOST), min_size=len(positions), max_size=len(positions)))
    epoch_order = [
        permuted_blocks(1, e, size, p, block, window).item() for e, p in zip(epochs, positions, strict=True)
    ]
    assert permuted_blocks(1, epochs, size, positions, block, window).tolist() == epoch_order


@pytest.mark.parametrize(
    ("size", "block", "window", "number"),
    [
        (5, 1, 2, 120),  # blocks of one row: a full shuffle
        (6, 2, 1, 6 * 2**3),  # orders of the blocks times orders of the rows in each
        (5, 2, 1, 6 * 2**2),  # the short block may be at any place
        (5, 2, 3, 120),  # one window: a full shuffle
        (5, 2, 2**62, 120),
    ],
)
def test_every_order_of_blocks_and_rows_is_equally_likely(
    size: int, block: int, window: int, number: int
) -> None:
    counts = count_orders(
        size, number, 40_000, lambda epoch, at: permuted_blocks(5, epoch, size, at, block, window)
    )
    assert abs(z_score(counts)) < 4


def test_windows_and_epochs_are_shuffled_independently() -> None:
    rows = permuted_blocks(0, 0, 6400, np.arange(6400), 10, 10).reshape(64, 10, 10)
    within = (rows % 10).reshape(64, 100)
    assert len(np.unique(within, axis=0)) == 64, "two windows share an order"
    other_epoch = permuted_blocks(0, 1, 6400, np.arange(6400), 10, 10)
    assert (other_epoch == rows.flatten()).sum() < 20


# Endless stream.


@given(
    st.integers(1, 12),
    st.lists(st.integers(0, 9), max_size=6),
    st.one_of(st.integers(0, 40), st.integers(0, 2**62)),
    st.integers(0, 4),
    st.integers(0, 3),
)
@settings(deadline=None)
def test_batch_sizes_do_not_change_the_stream(
    size: int, counts: list[int], start: int, block: int, window: int
) -> None:
    permutation = permuted_batch(3, size, start, sum(counts), block, window)
    parts: list[int] = []
    for count in counts:
        parts += permuted_batch(3, size, start + len(parts), count, block, window)
    assert parts == permutation


@pytest.mark.parametrize(("block", "window"), [(0, 0), (3, 2)])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_each_epoch_of_the_stream_is_a_fresh_permutation(size: int, block: int, window: int) -> None:
    rows = permuted_batch(0, size, 0, 9 * size, block, window)
    epochs = [rows[i : i + size] for i in range(0, len(rows), size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size == 1 or len(set(map(tuple, epochs))) > 1
    assert all(isinstance(row, int) for row in rows), "plain integers, for lists and tensors alike"


def test_the_stream_concatenates_the_epochs() -> None:
    places = np.arange(50)
    assert permuted_batch(4, 50, 75, 50) == [
        *permuted(4, 1, 50, places[25:]),
        *permuted(4, 2, 50, places[:25]),
    ]
    blocks = [permuted_blocks(4, epoch, 50, places, 8, 2).tolist() for epoch in (0, 1)]
    assert permuted_batch(4, 50, 0, 100, block=8, window=2) == blocks[0] + blocks[1]
    for block, window in [(0, 5), (5, 0)]:
        assert permuted_batch(4, 50, 0, 100, block, window) == permuted_batch(4, 50, 0, 100)


def test_invalid_arguments_are_refused() -> None:
    for seed in (-1, 2**63):
        with pytest.raises(SettingError, match=r"shuffle: seed is .*; give an integer from 0 to 2\^63 - 1"):
            permuted_batch(seed, 10, 0, 1)
    for size, epoch, place in [(0, 0, 0), (2**40 + 1, 0, 0), (10, -1, 0), (10, 0, 10), (10, 0, -1)]:
        with pytest.raises(AssertionError, match=r"rows to shuffle|epochs must be 0 or more|outside 0 to 9"):
            permuted(0, epoch, size, place)
    with pytest.raises(AssertionError, match="block 0 and window 1"):
        permuted_blocks(0, 0, 10, 0, 0, 1)
