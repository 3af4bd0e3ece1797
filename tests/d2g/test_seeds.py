"""d2g.core.seeds: noise depends on (seed, index) only and is pinned bit by bit; keys are distinct."""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2g.core.errors import SettingError
from d2g.core.seeds import box_muller, generator, noise, seed_step

MOST = 2**63 - 1

# Changing these invalidates every pair store made with `--noise seeded`: don't.
GOLDEN = {
    (0, 0): [
        "0x1.44ad640000000p-3",
        "0x1.7dcefe0000000p+1",
        "-0x1.ecfa260000000p+0",
        "-0x1.a65ca40000000p-1",
    ],
    (0, 1): [
        "0x1.6067380000000p-8",
        "-0x1.4918ac0000000p-1",
        "-0x1.c63ef00000000p-1",
        "0x1.82c7680000000p-4",
    ],
    (0, 2**40): [
        "0x1.746a5e0000000p-2",
        "0x1.1ed7700000000p+0",
        "0x1.1fa48c0000000p+0",
        "0x1.8c3a740000000p+0",
    ],
    (MOST, MOST): [
        "-0x1.da7dc00000000p-2",
        "-0x1.2e5e920000000p+1",
        "0x1.cfd7c00000000p+0",
        "0x1.4aa1da0000000p+0",
    ],
}


def words(seed: int, index: int, count: int) -> np.ndarray:
    return np.random.Philox(key=np.array([seed, index], dtype=np.uint64)).random_raw(count)


def sha256(values: np.ndarray) -> str:
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<")).tobytes()).hexdigest()[:16]


# Random words at the edges of the transform: cells, quarters of the circle, range of the logarithm.
EDGES = [0, 2**11, 2**12, 2**52, 2**53, 2**61, 2**62, 2**63, 3 * 2**62, 0xB504F333F9DE6484]
EXTREMES = np.array(
    [(word + step) % 2**64 for word in EDGES for step in (-(2**12), -1, 0, 1, 2**12)], np.uint64
)
PAIRS_OF_EXTREMES = np.stack(np.meshgrid(EXTREMES, EXTREMES), axis=-1).reshape(-1)


# Pinned values.


@pytest.mark.parametrize("key", GOLDEN)
def test_noise_is_pinned_bit_for_bit(key: tuple[int, int]) -> None:
    row = noise(key[0], [key[1]], (4,), torch.float32)[0]
    assert [x.hex() for x in row.tolist()] == GOLDEN[key]


def test_full_rows_and_fp16_values_are_pinned() -> None:
    assert sha256(noise(5, range(3), (4, 64, 64)).numpy()) == "098764a1757916a8"
    assert sha256(box_muller(words(5, 0, 2**14))) == "c71d7ee413a8a260", "the last bits of float64 too"
    half = torch.tensor([[-0.1954345703125, -1.1923828125, -0.9873046875, 2.23828125]], dtype=torch.float16)
    assert torch.equal(noise(7, [3], (4,), torch.float16), half)


def transform_with_python_floats(first: int, second: int) -> tuple[float, float]:
    """Transform two words with Python floats, one IEEE operation at a time."""

    def series(z: float, terms: list[float]) -> float:
        total = z * terms[-1]
        for term in reversed(terms[:-1]):
            total = (total + term) * z
        return total

    odd = float(first >> 11 | 1)
    (bits,) = struct.unpack("<q", struct.pack("<d", odd))
    power = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = math.ldexp(odd, -power)
    s = (1 - m) / (1 + m)
    square = series(s * s, [4 / (2 * k + 1) for k in range(1, 11)]) * s + 4 * s
    radius = math.sqrt(square + (53 - power) * (2 * 0.6931471805599453))
    quarter, left = divmod(second + 2**61, 2**62)
    angle = float((left - 2**61) >> 10 | 1) * (3.141592653589793 * 2.0**-53)
    sin = series(angle * angle, [(-1) ** k / math.factorial(2 * k + 1) for k in range(1, 9)]) * angle + angle
    cos = math.sqrt(1 - sin * sin)
    x, y = [(cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos)][quarter % 4]
    return x * radius, y * radius


def test_vectorized_transform_is_bit_identical_to_python_floats() -> None:
    raw = np.concatenate([words(1, 2, 2000), PAIRS_OF_EXTREMES])
    plain = [list(transform_with_python_floats(a, b)) for a, b in raw.reshape(-1, 2).tolist()]
    assert box_muller(raw).reshape(-1, 2).tolist() == plain


def test_the_documented_code_gives_this_noise(documented_draw: Callable[..., Any]) -> None:
    for seed, index in [(0, 0), (3, 2**40), (MOST, MOST)]:
        for shape in [(4, 8, 8), (3, 5, 7)]:
            for dtype in ("float32", "float16"):
                outside = documented_draw(seed, index, shape, dtype)
                ours = noise(seed, [index], shape, getattr(torch, dtype)).numpy()[0]
                assert outside.dtype == ours.dtype and outside.tobytes() == ours.tobytes()


def test_the_documented_example_is_correct() -> None:
    text = (Path(__file__).parents[2] / "docs" / "pair-format.md").read_text(encoding="utf-8")
    shown = re.search(r'`draw\(0, 0, \(4,\), "float32"\)` is `(\[.*?\])`', text)
    assert shown and torch.equal(torch.tensor(json.loads(shown[1])), noise(0, [0], (4,))[0])


@pytest.fixture(scope="module")
def documented_draw() -> Callable[..., Any]:
    """The function `draw` of docs/pair-format.md."""
    text = (Path(__file__).parents[2] / "docs" / "pair-format.md").read_text(encoding="utf-8")
    (code,) = re.findall(
        r"```python\n(.*?)```", text.split("## Drawing seeded noise")[1].split("\n## ")[0], re.S
    )
    names: dict[str, Any] = {}
    exec(code, names)
    return names["draw"]  # type: ignore[no-any-return]


# Correctness.


def box_muller_in_decimals(first: int, second: int) -> tuple[Decimal, Decimal]:
    """Box-Muller with 50 digits, without the argument reductions of the code."""
    pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
    u = (Decimal(first >> 12) + Decimal("0.5")) / 2**52
    angle = 2 * pi * (Decimal(second >> 11) + Decimal("0.5")) / 2**53
    cos, sin, term, order = Decimal(0), Decimal(0), Decimal(1), 0
    while abs(term) > Decimal("1e-48") or order < 8:
        if order % 2:
            sin += term if order % 4 == 1 else -term
        else:
            cos += term if order % 4 == 0 else -term
        order += 1
        term *= angle / order
    radius = (-2 * u.ln()).sqrt()
    return radius * cos, radius * sin


@pytest.mark.parametrize("raw", [words(3, 4, 1000), PAIRS_OF_EXTREMES[::7]], ids=["random", "extreme"])
def test_the_transform_is_within_four_ulp_of_the_formula(raw: np.ndarray) -> None:
    normals = box_muller(raw[: len(raw) // 2 * 2])
    with localcontext() as context:
        context.prec = 50
        for i in range(0, len(normals), 2):
            for x, right in zip(
                normals[i : i + 2].tolist(), box_muller_in_decimals(int(raw[i]), int(raw[i + 1])), strict=True
            ):
                error = abs(Decimal(x) - right) / Decimal(math.ulp(float(right)))
                assert error < 4, (int(raw[i]), int(raw[i + 1]), x, right)


def test_extreme_words_give_finite_values_and_the_largest() -> None:
    values = box_muller(PAIRS_OF_EXTREMES)
    assert np.isfinite(values).all() and (values != 0).all()
    assert abs(values).max() == pytest.approx(math.sqrt(106 * math.log(2)), rel=1e-15)
    corners = box_muller(np.array([0, 0, 0, 2**62, 0, 2**63, 0, 3 * 2**62], np.uint64))
    assert corners.round(3).tolist() == [8.572, 0, 0, 8.572, -8.572, 0, 0, -8.572]
    least = box_muller(np.array([2**64 - 1, 2**61], np.uint64))
    assert least == pytest.approx([2.0**-26.5] * 2, rel=1e-12), "u nearest to 1: 1 - 2^-53"
    assert np.isfinite(values.astype(np.float16)).all()


def test_noise_is_standard_normal() -> None:
    rows = noise(11, range(256), (4, 16, 16)).double()
    count = rows.numel()  # 262,144: the bounds below are 5 standard errors
    assert abs(rows.mean()) < 5 / count**0.5
    assert abs(rows.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((rows**3).mean()) < 5 * (15 / count) ** 0.5
    assert abs((rows**4).mean() - 3) < 5 * (96 / count) ** 0.5
    assert 4 < rows.abs().max() < 6.5


def test_noise_has_the_normal_distribution_function() -> None:
    """Kolmogorov-Smirnov tests at the 0.1 % level: both values of each pair, and their radii (Rayleigh)."""
    pairs = box_muller(words(12, 0, 2**16)).reshape(-1, 2)
    bound = 1.95 / len(pairs) ** 0.5
    ranks = np.arange(len(pairs)) / len(pairs)
    for values in pairs.T:
        normal = np.array([0.5 + 0.5 * math.erf(x / 2**0.5) for x in np.sort(values).tolist()])
        assert abs(normal - ranks).max() < bound
    radii = np.sort((pairs**2).sum(axis=1))
    assert abs(1 - np.exp(-radii / 2) - ranks).max() < bound


def test_neighboring_indices_and_seeds_are_independent() -> None:
    size = 4096
    rows = torch.cat([noise(seed, range(16), (size,)) for seed in (0, 1)]).double()
    for values in (rows, rows.square()):
        correlation = torch.corrcoef(values).fill_diagonal_(0).abs().max()
        assert correlation < 5.5 / size**0.5
    assert not torch.equal(noise(0, [1], (8,)), noise(1, [0], (8,))), "seed and index do not commute"


def test_the_two_halves_of_box_muller_are_independent() -> None:
    pairs = torch.from_numpy(box_muller(words(0, 0, 2**16))).view(-1, 2)
    assert abs(torch.corrcoef(pairs.T)[0, 1]) < 5 / 2**7.5
    assert abs(torch.corrcoef(pairs.square().T)[0, 1]) < 5 / 2**7.5


# Dependence on (seed, index) only.


@given(st.integers(0, MOST), st.lists(st.integers(0, MOST), max_size=5), st.integers(1, 9))
def test_a_row_depends_on_seed_and_index_only(seed: int, indices: list[int], size: int) -> None:
    batch = noise(seed, indices, (size,))
    single_rows = [noise(seed, [index], (size,)) for index in indices]
    assert torch.equal(batch, torch.cat([torch.empty(0, size), *single_rows]))
    assert batch.isfinite().all()


def test_rows_do_not_depend_on_the_block_size() -> None:
    rows = noise(1, range(40), (4, 32, 32))  # 8 rows at a time
    assert torch.equal(rows[[0, 7, 8, 39]], torch.cat([noise(1, [i], (4, 32, 32)) for i in (0, 7, 8, 39)]))
    assert torch.equal(noise(1, [8], (200_001,))[0, :4096], rows[8].flatten()), "longer than a block"


def test_shape_only_reshapes_the_stream() -> None:
    assert torch.equal(noise(1, [5], (2, 3, 4)).flatten(), noise(1, [5], (24,)).flatten())
    assert torch.equal(noise(1, [5], (3,))[0], noise(1, [5], (4,))[0, :3]), "an odd count cuts the last pair"
    assert noise(1, [5, 6], ()).shape == (2,) and noise(1, [5, 6], (0, 4)).shape == (2, 0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_from_fp32(dtype: torch.dtype) -> None:
    assert torch.equal(noise(2, [0], (4096,), dtype), noise(2, [0], (4096,)).to(dtype))


@pytest.mark.parametrize("wrong", [-1, 2**63, 2**64])
def test_seeds_and_indices_out_of_range_are_refused(wrong: int) -> None:
    with pytest.raises(SettingError, match=rf"^noise: seed is {wrong}; give an integer from 0 to 2\^63 - 1$"):
        noise(wrong, [0], (4,))
    with pytest.raises(
        SettingError, match=rf"^noise: index is {wrong}; give an integer from 0 to 2\^63 - 1$"
    ):
        noise(0, [0, wrong], (4,))
    with pytest.raises(SettingError, match=rf"^random key is {wrong}; "):
        generator(0, wrong)


def test_indices_may_have_any_integer_type() -> None:
    rows = noise(0, [3, 4], (4,))
    assert torch.equal(noise(0, torch.tensor([3, 4]), (4,)), rows)
    assert torch.equal(noise(0, np.array([3, 4], np.uint64), (4,)), rows)
    with pytest.raises(TypeError):
        noise(0, [3.5], (4,))  # type: ignore[list-item]


# Streams of keys.


def test_generators_depend_on_every_part_of_their_key() -> None:
    assert generator(1, 2, 3).initial_seed() == 8778505123642563612, "pinned: runs resume across releases"
    assert torch.equal(
        torch.rand(3, generator=seed_step(1, 2, 3)), torch.rand(3, generator=generator(1, 2, 3))
    )


def test_keys_that_numpy_does_not_distinguish_differ() -> None:
    """SeedSequence drops trailing zeros and concatenates the words of integers without separators."""
    keys = [
        (),
        (0,),
        (0, 0),
        (1,),
        (1, 0),
        (1, 0, 0),
        (2, 1),
        (1, 1),
        (2**32,),
        (0, 1),
        (0, 2**32),
        (2**32, 0),
    ]
    keys += [
        (1, 2**32),
        (2, 0, 1),
        (2**32, 5),
        (0, 1 + 5 * 2**32),
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 0),
        (1, 0, 1),
    ]
    assert len({generator(*key).initial_seed() for key in keys}) == len(keys)


@given(st.lists(st.lists(st.integers(0, MOST), max_size=4).map(tuple), min_size=2, max_size=2, unique=True))
def test_different_keys_have_different_streams(keys: list[tuple[int, ...]]) -> None:
    a, b = (generator(*key).initial_seed() for key in keys)
    assert a != b
