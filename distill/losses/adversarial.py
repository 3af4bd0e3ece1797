"""Loss terms as plain functions over tensors; nothing here calls backward."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from d2g.diffusion.conditioning import Conditioning
from distill.config.components import GanLoss, Reduction

Logits = Mapping[str, Tensor]


def discriminator_loss(
    real: Logits, fake: Logits, kind: GanLoss = "ns", reduction: Reduction = "mean"
) -> Tensor:
    """D's loss: mean over rows and positions, then `reduction` over the heads. fp32.

    ns: softplus(-D(real)) + softplus(D(fake)) (method.md "GAN losses"). hinge: relu(1 - D(real)) + relu(1 +
    D(fake)) (Lim and Ye 2017). rpgan: softplus(D(fake) - D(real)), each row against its own: they share z and
    c (Jolicoeur-Martineau 2018; R3GAN, eq. 2).
    """
    return reduced([_against(real[h].float(), fake[h].float(), kind).mean() for h in real], reduction)


def _against(real: Tensor, fake: Tensor, kind: GanLoss) -> Tensor:
    if kind == "rpgan":
        return F.softplus(fake - real)
    if kind == "hinge":
        return F.relu(1 - real) + F.relu(1 + fake)
    return F.softplus(-real) + F.softplus(fake)


def generator_loss(
    fake: Logits, kind: GanLoss = "ns", reduction: Reduction = "mean", real: Logits | None = None
) -> Tensor:
    """G's loss, reduced as D's. ns: softplus(-D(G)); hinge: -D(G); rpgan: softplus(D(real) - D(G)), for which
    `real` is needed: D's logits of the same rows' targets, by the same weights of D.
    """
    if kind == "rpgan":
        assert real is not None, "the relativistic loss needs D's logits of the real rows"
        return reduced([F.softplus(real[h].float() - v.float()).mean() for h, v in fake.items()], reduction)
    terms = [(-v.float() if kind == "hinge" else F.softplus(-v.float())).mean() for v in fake.values()]
    return reduced(terms, reduction)


def reduced(terms: Sequence[Tensor], reduction: Reduction) -> Tensor:
    """Mean or sum of the heads' terms."""
    stacked = torch.stack(list(terms))
    return stacked.sum() if reduction == "sum" else stacked.mean()


def mismatch(
    prompts: Sequence[str],
    fraction: float,
    drawn: Tensor,
    shares: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Mix-and-match for a batch of fake rows: (mode [B], partner [B]).

    mode 0: plain; 1, 2, 3: x, c or z comes from row `partner`, which never has the row's own prompt.
    `fraction` goes to the three swaps by their relative `shares` (method.md "Mix-and-match augmentation"),
    according to `drawn` [B] ~ U(0, 1). Rows come in random order, so the neighbour serves: rows 2i and 2i + 1
    are partners, however a batch is shared out. Where the two have one prompt both stay plain. B is even
    unless `fraction` is 0.
    """
    first, second = shares[0] / sum(shares), (shares[0] + shares[1]) / sum(shares)
    swap = 1 + (drawn >= fraction * first).long() + (drawn >= fraction * second).long()
    mode = torch.where(drawn < fraction, swap, 0)
    partner = torch.arange(len(prompts))
    if fraction > 0:
        partner ^= 1
        alike = [prompts[row] == prompts[row ^ 1] for row in range(len(prompts))]
        mode[torch.tensor(alike)] = 0
    return mode, partner


def mix_and_match(
    fake: Tensor, real: Tensor, noise: Tensor, text: Conditioning, mode: Tensor, partner: Tensor
) -> tuple[Tensor, Tensor, Conditioning]:
    """The fake batch (x, z, c) with some rows replaced by real triples that have one wrong member.

    x-swap: another row's target latent with this row's noise and text; c-swap and z-swap: this row's target
    with another row's text or noise. All are labelled fake: what is wrong is the alignment, not the image.
    """
    mode, partner = mode.to(fake.device), partner.to(fake.device)

    def where(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(chosen.view(-1, *[1] * (b.ndim - 1)), a, b)

    x = where(mode == 1, real[partner], where(mode >= 2, real, fake))
    z = where(mode == 3, noise[partner], noise)
    return x, z, text[partner].map(lambda a, b: where(mode == 2, a, b), text)
