"""A cache of prompt embeddings, so that a short list of prompts is encoded only once."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from d2g.core.transfer import to_device, to_host
from d2g.diffusion.conditioning import Conditioning

PROMPTS_AT_ONCE = 8
"""Prompts that are encoded together."""


class TextCache:
    """Wraps `encode` with a least-recently-used cache of `limit` prompts on the CPU; 0 disables the cache.

    With the cache, new prompts are always encoded PROMPTS_AT_ONCE at a time; repeats of the last one fill a
    batch up. The rounding of an embedding depends on the size of its batch, and a resumed run must not differ
    from an uninterrupted one by the content of its cache.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], Conditioning], limit: int, device: torch.device
    ) -> None:
        self.encode, self.limit, self.device = encode, limit, device
        self.cache: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of B prompts on the device. Does not wait for the device."""
        if not self.limit:
            return self.encode(prompts).to(self.device)
        # Encode what is not in the cache.
        distinct = list(dict.fromkeys(prompts))
        missing = [prompt for prompt in distinct if prompt not in self.cache]
        for start in range(0, len(missing), PROMPTS_AT_ONCE):
            new = missing[start : start + PROMPTS_AT_ONCE]
            encoded = self.encode([*new, *new[-1:] * (PROMPTS_AT_ONCE - len(new))])
            for row, prompt in enumerate(new):
                self.cache[prompt] = encoded[row : row + 1].map(to_host)
        # Copy the rows back, then forget what was not used for longest.
        for prompt in distinct:
            self.cache.move_to_end(prompt)
        cond = Conditioning.cat(
            [self.cache[prompt].map(lambda row: to_device(row, self.device)) for prompt in prompts]
        )
        while len(self.cache) > self.limit:
            self.cache.popitem(last=False)
        return cond
