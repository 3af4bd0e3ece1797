"""core.seeds: noise is a function of (seed, index) alone, pinned; epochs are permutations from any start."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.seeds import generator, noise, permuted_batch, seed_step, standard_normal

# Changing these invalidates every pair store made with `--noise seeded`: don't.
GOLDEN = {
    0: ["0x1.44ad640000000p-3", "0x1.7dcefe0000000p+1", "-0x1.ecfa260000000p+0", "-0x1.a65ca40000000p-1"],
    1: ["0x1.6067380000000p-8", "-0x1.4918ac0000000p-1", "-0x1.c63ef00000000p-1", "0x1.82c7680000000p-4"],
    2**40: ["0x1.746a5e0000000p-2", "0x1.1ed7700000000p+0", "0x1.1fa48c0000000p+0", "0x1.8c3a740000000p+0"],
}


def test_noise_is_pinned_bit_for_bit() -> None:
    expected = torch.tensor([[float.fromhex(x) for x in row] for row in GOLDEN.values()])
    assert torch.equal(noise(0, [0, 1, 2**40], (4,), torch.float32), expected)
    half = torch.tensor([[-0.1954345703125, -1.1923828125, -0.9873046875, 2.23828125]], dtype=torch.float16)
    assert torch.equal(noise(7, [3], (4,), torch.float16), half)


@given(
    st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5), st.integers(1, 9)
)
def test_a_row_depends_on_seed_and_index_alone(seed: int, indices: list[int], size: int) -> None:
    together = noise(seed, indices, (size,))
    alone = torch.cat([noise(seed, [index], (size,)) for index in indices])
    assert torch.equal(together, alone)
    assert together.isfinite().all()


def test_shape_only_folds_the_stream() -> None:
    assert torch.equal(noise(1, [5], (2, 3, 4)).flatten(), noise(1, [5], (24,)).flatten())
    assert torch.equal(noise(1, [5], (3,))[0], noise(1, [5], (4,))[0, :3]), "an odd count cuts the last pair"


def test_rounding_to_half_happens_after_single_precision() -> None:
    assert torch.equal(noise(2, [0], (4096,), torch.float16), noise(2, [0], (4096,)).half())


def test_noise_is_standard_normal() -> None:
    rows = noise(11, range(256), (4, 16, 16)).double()
    count = rows.numel()  # 262,144: the bounds below are 5 standard errors
    assert abs(rows.mean()) < 5 / count**0.5
    assert abs(rows.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((rows**3).mean()) < 5 * (15 / count) ** 0.5
    assert abs((rows**4).mean() - 3) < 5 * (96 / count) ** 0.5
    assert 4 < rows.abs().max() < 6.5


def test_neighbouring_indices_and_seeds_are_independent() -> None:
    size = 4096
    rows = torch.cat([noise(seed, range(16), (size,)) for seed in (0, 1)]).double()
    correlation = torch.corrcoef(rows).fill_diagonal_(0).abs().max()
    assert correlation < 5.5 / size**0.5
    assert not torch.equal(noise(0, [1], (8,)), noise(1, [0], (8,))), "seed and index do not commute"


def test_the_two_halves_of_box_muller_are_independent() -> None:
    pairs = torch.from_numpy(standard_normal(0, 0, 2**16)).view(-1, 2)
    assert abs(torch.corrcoef(pairs.T)[0, 1]) < 5 / 2**7.5
    assert abs(torch.corrcoef(pairs.square().T)[0, 1]) < 5 / 2**7.5


def test_generators_mix_all_of_their_key() -> None:
    assert generator(1, 2, 3).initial_seed() == 3773880422699760768, "pinned: runs resume across releases"
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (2**40, 0, 0)]
    assert len({generator(*key).initial_seed() for key in keys}) == len(keys)
    assert torch.equal(
        torch.rand(3, generator=seed_step(1, 2, 3)), torch.rand(3, generator=generator(1, 2, 3))
    )


@pytest.mark.parametrize("size", [1, 2, 7])
def test_each_epoch_is_a_permutation(size: int) -> None:
    rows = permuted_batch(0, size, 0, 5 * size)
    epochs = [rows[i : i + size] for i in range(0, len(rows), size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)


def test_epochs_and_seeds_differ() -> None:
    rows = permuted_batch(0, 50, 0, 100)
    assert rows[:50] != rows[50:] and rows[:50] != list(range(50))
    assert rows[:50] != permuted_batch(1, 50, 0, 50)


@given(st.integers(1, 12), st.lists(st.integers(0, 9), max_size=6), st.integers(0, 40))
def test_any_split_reads_the_same_stream(size: int, counts: list[int], start: int) -> None:
    whole = permuted_batch(3, size, start, sum(counts))
    parts: list[int] = []
    for count in counts:
        parts += permuted_batch(3, size, start + len(parts), count)
    assert parts == whole
