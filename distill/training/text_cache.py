"""Encodings of prompts that came before, so that a list that is short is encoded once."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from d2g.diffusion.conditioning import Conditioning


class TextCache:
    """`encode` with a memory of the `limit` prompts used last, on the CPU; with 0 it forgets everything.

    With a memory, prompts are encoded one at a time: an encoding's last digits depend on its batch, and a
    resumed run must not differ from an unbroken one by what it remembers.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], Conditioning], limit: int, device: torch.device
    ) -> None:
        self.encode, self.limit, self.device = encode, limit, device
        self.known: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> what the networks are told, on the device."""
        if not self.limit:
            return self.encode(prompts).to(self.device)
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.known:
                self.known[prompt] = self.encode([prompt]).to("cpu")
            self.known.move_to_end(prompt)
        joined = Conditioning.cat([self.known[prompt] for prompt in prompts])
        while len(self.known) > self.limit:
            self.known.popitem(last=False)
        return joined.to(self.device)
