"""Dropout whose masks depend only on (seed, row number), not on how a batch is split over ranks.

`torch.nn.Dropout` samples the masks of a batch from one stream, so a row's mask depends on the other rows.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from d2g.core.seeds import Stream, generator

WORD = 2**32
"""Number of values of a 32-bit word."""

ODD = 0x45D9F3B
"""Multiplier of the integer hash."""


def row_keys(seed: int, rows: Iterable[int]) -> Tensor:
    """Return the mask keys of these row numbers: int64 [B] on the CPU, each in [0, 2^32)."""
    return torch.tensor([generator(seed, Stream.DROPOUT, row).initial_seed() % WORD for row in rows])


class RowDropout(nn.Module):
    """Sets values to 0 with probability p in training and divides the others by 1 - p.

    Call `set_dropout_keys` with the keys [B] of the batch (`row_keys`) before each forward pass in training.
    Source: Srivastava et al. 2014.
    """

    def __init__(self, p: float, layer: int) -> None:
        """layer: index of this layer in the network; each layer has its own masks."""
        super().__init__()
        self.p, self.layer = p, layer
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout to x [B, C, ...]; the result has the same shape and dtype."""
        if not self.training:
            return x
        assert self.keys is not None and len(self.keys) == len(x), "a key for each row"
        return torch.where(keep_mask(self.keys, self.layer, x.shape, self.p), x, 0.0) / (1 - self.p)


def set_row_dropout(network: nn.Module, enabled: bool) -> None:
    """Enable or disable every RowDropout of a network; other modules keep their mode."""
    for module in network.modules():
        if isinstance(module, RowDropout):
            module.train(enabled)


def set_dropout_keys(network: nn.Module, keys: Tensor) -> None:
    """Set the keys [B] of the next batch in every RowDropout of a network.

    The keys stay until the next call, so activation checkpointing recomputes the same masks.
    """
    for module in network.modules():
        if isinstance(module, RowDropout):
            module.keys = keys


def keep_mask(keys: Tensor, layer: int, shape: torch.Size, p: float) -> Tensor:
    """Return the bool mask [B, C, ...] of the values to keep, each with probability 1 - p.

    It lies on the keys' device. The mask comes from integer hashes, which are identical on all devices.
    """
    # Hash (key, layer, channel) and the position separately in int64: both tensors are small.
    count = shape[2:].numel()
    numbers = torch.arange(max(shape[1], count), device=keys.device)
    channels = _hash(_hash(_hash(keys) ^ _hash(numbers.new_full((), layer)))[:, None] ^ numbers[: shape[1]])
    positions = _hash(numbers[:count] + WORD // 3)
    # Combine both with one more hash round in int32, which saves memory at the size of an activation.
    words = _signed(channels)[:, :, None] ^ _signed(positions)
    words = ((words >> 16 & 0xFFFF) ^ words) * ODD  # the product wraps around
    return (words >= round(p * WORD) - WORD // 2).view(shape)


def _signed(words: Tensor) -> Tensor:
    return (words - WORD // 2).to(torch.int32)


def _hash(words: Tensor) -> Tensor:
    """Hash 32-bit words stored as int64 to 32-bit words (multiply and xor-shift rounds of Mueller's hash).

    Products stay below 2^59, so int64 does not overflow.
    """
    for _ in range(2):
        words = ((words >> 16) ^ words) * ODD & (WORD - 1)
    return (words >> 16) ^ words
