"""A cache of prompt embeddings, so that a short list of prompts is encoded only once."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from d2g.diffusion.conditioning import Conditioning


class TextCache:
    """Wraps `encode` with a least-recently-used cache of `limit` prompts on the CPU; 0 disables the cache.

    With the cache, prompts are encoded one at a time. The rounding of an embedding depends on its batch, and
    a resumed run must not differ from an uninterrupted one by the content of its cache.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], Conditioning], limit: int, device: torch.device
    ) -> None:
        self.encode, self.limit, self.device = encode, limit, device
        self.cache: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of B prompts on the device."""
        if not self.limit:
            return self.encode(prompts).to(self.device)
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.cache:
                self.cache[prompt] = self.encode([prompt]).to("cpu")
            self.cache.move_to_end(prompt)
        cond = Conditioning.cat([self.cache[prompt] for prompt in prompts])
        while len(self.cache) > self.limit:
            self.cache.popitem(last=False)
        return cond.to(self.device)
