"""Loss terms as plain functions over tensors; nothing here calls backward."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Logits = Mapping[str, Tensor]


def discriminator_loss(real: Logits, fake: Logits) -> Tensor:
    """Non-saturating D loss, softplus(-D(real)) + softplus(D(fake)): mean over positions, then over heads."""
    terms = [F.softplus(-real[h].float()).mean() + F.softplus(fake[h].float()).mean() for h in real]
    return torch.stack(terms).mean()


def generator_loss(fake: Logits) -> Tensor:
    """-E[log D(G)] = softplus(-D(G)) (method.md 4.1): mean over positions, then over heads."""
    return torch.stack([F.softplus(-logits.float()).mean() for logits in fake.values()]).mean()


def mismatch(prompts: Sequence[str], fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mix-and-match draws for a batch of fake rows: (mode [B], partner [B]).

    mode 0: plain; 1, 2, 3: x, c or z comes from row `partner`, which never has the row's own prompt. A row
    without such a partner stays plain. `fraction` is shared by the three swaps (method.md 4.4).
    """
    size = len(prompts)
    drawn = torch.rand(size, generator=generator)
    start = torch.randint(size, (size,), generator=generator)
    mode = (
        torch.where(drawn < fraction, 1 + (drawn / fraction * 3).long().clamp(max=2), 0)
        if fraction
        else drawn.long()
    )
    partner = torch.arange(size)
    for row in range(size):
        others = ((int(start[row]) + step) % size for step in range(size))
        match = next((other for other in others if prompts[other] != prompts[row]), None)
        if match is None:
            mode[row] = 0
        else:
            partner[row] = match
    return mode, partner


def mix_and_match(
    fake: Tensor, real: Tensor, noise: Tensor, text: Tensor, mode: Tensor, partner: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The fake batch (x, z, c) with some rows replaced by real triples that have one wrong member.

    x-swap: another row's target latent with this row's noise and text; c-swap and z-swap: this row's target
    with another row's text or noise. All are labelled fake: what is wrong is the alignment, not the image.
    """
    mode, partner = mode.to(fake.device), partner.to(fake.device)

    def where(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(chosen.view(-1, *[1] * (b.ndim - 1)), a, b)

    x = where(mode == 1, real[partner], where(mode >= 2, real, fake))
    c = where(mode == 2, text[partner], text)
    z = where(mode == 3, noise[partner], noise)
    return x, z, c
