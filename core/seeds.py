"""Randomness as a function of keys: pair noise of (seed, index), streams of (seed, rank, nimg).

Pair noise is ours bit for bit: NumPy guarantees the raw stream of its Philox bit generator, and the normal
transform below is fixed here. torch.randn guarantees neither across devices nor across releases.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor


def standard_normal(seed: int, index: int, count: int) -> np.ndarray:
    """`count` float64 standard normals of the stream (seed, index): Philox-4x64 bits, Box-Muller.

    A uniform is the top 53 bits, plus one half, over 2^53: never 0 or 1.
    """
    bits = np.random.Philox(key=np.array([seed, index], dtype=np.uint64)).random_raw(2 * ((count + 1) // 2))
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[0::2]))
    angle = 2.0 * np.pi * uniform[1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]


def noise(
    seed: int, indices: Iterable[int], shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Noise rows [B, *shape] ~ N(0, 1) on the CPU, rounded to `dtype`. Row i depends on (seed, indices[i])
    only.
    """
    rows = [standard_normal(seed, int(index), prod(shape)) for index in indices]
    return torch.from_numpy(np.stack(rows).reshape(-1, *shape)).to(torch.float32).to(dtype)


def generator(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator whose seed mixes all of `key` (non-negative integers)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) & (2**63 - 1))


def seed_step(seed: int, rank: int, nimg: int) -> torch.Generator:
    """The generator of one training step: re-derived, so that a resumed run equals an unbroken one."""
    return generator(seed, rank, nimg)


@lru_cache(maxsize=2)  # an epoch of 12M rows takes a second to shuffle and is asked for at every step
def _epoch(seed: int, size: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, 0x5EED, epoch))


def permuted_batch(seed: int, size: int, start: int, count: int) -> list[int]:
    """Rows `start … start+count` of an endless stream of epochs, each a fresh permutation of range(size)."""
    rows: list[int] = []
    while len(rows) < count:
        epoch, offset = divmod(start + len(rows), size)
        rows += _epoch(seed, size, epoch)[offset : offset + count - len(rows)].tolist()
    return rows
