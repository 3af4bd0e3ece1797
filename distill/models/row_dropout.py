"""Dropout whose masks are functions of (seed, row): the same however a batch is shared out.

torch's own draws a batch's masks from one stream, so that a row's mask depends on its neighbours.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from d2g.core.seeds import Stream, generator

WORD, ODD = 2**32, 0x45D9F3B


def row_keys(seed: int, rows: Iterable[int]) -> Tensor:
    """What the masks of the rows of these numbers depend on: [B] int64 on the CPU, each of 32 bits."""
    return torch.tensor([generator(seed, Stream.DROPOUT, row).initial_seed() % WORD for row in rows])


class RowDropout(nn.Module):
    """Sets values to 0 with probability p in training, and divides the others by 1 - p (Srivastava et al.
    2014). Its keys [B] (`row_keys`) must be given before the rows are (`give_keys`).
    """

    def __init__(self, p: float, layer: int) -> None:
        """layer: its number in the network, which tells its masks from those of others."""
        super().__init__()
        self.p, self.layer = p, layer
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, ...] -> the same shape and dtype."""
        if not self.training:
            return x
        assert self.keys is not None and len(self.keys) == len(x), "a key for each row"
        return torch.where(kept(self.keys, self.layer, x.shape, self.p), x, 0.0) / (1 - self.p)


def switch(network: nn.Module, on: bool) -> None:
    """Dropout on or off. The rest of a network is as the teacher is used, whatever dropout its config has."""
    for module in network.modules():
        if isinstance(module, RowDropout):
            module.train(on)


def give_keys(network: nn.Module, keys: Tensor) -> None:
    """Tell all RowDropouts of a network which rows come next; the masks stay until the next call, also where
    activations are computed again."""
    for module in network.modules():
        if isinstance(module, RowDropout):
            module.keys = keys


def kept(keys: Tensor, layer: int, shape: torch.Size, p: float) -> Tensor:
    """Which values of [B, C, ...] stay, each with probability 1 - p: bool on the keys' device.

    Hashes of integers, which all devices compute alike: of (key, layer, channel) and of the position in
    int64, then one more round of both together in int32, for which an activation's size is large.
    """
    count = shape[2:].numel()
    numbers = torch.arange(max(shape[1], count), device=keys.device)
    channels = _hash(_hash(_hash(keys) ^ _hash(numbers.new_full((), layer)))[:, None] ^ numbers[: shape[1]])
    places = _hash(numbers[:count] + WORD // 3)
    words = _signed(channels)[:, :, None] ^ _signed(places)
    words = ((words >> 16 & 0xFFFF) ^ words) * ODD  # which wraps
    return (words >= round(p * WORD) - WORD // 2).view(shape)


def _signed(words: Tensor) -> Tensor:
    return (words - WORD // 2).to(torch.int32)


def _hash(words: Tensor) -> Tensor:
    """32 bits of 32 bits, in int64: a product below 2^59 overflows nowhere. The multiply and xor-shift rounds
    are those of Mueller's integer hash."""
    for _ in range(2):
        words = ((words >> 16) ^ words) * ODD & (WORD - 1)
    return (words >> 16) ^ words
