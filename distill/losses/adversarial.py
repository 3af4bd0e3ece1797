"""GAN losses and mix-and-match augmentation as pure functions of tensors; none of them calls backward."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from d2g.diffusion.conditioning import Conditioning
from distill.config.discriminator import GanLoss
from distill.config.regression import Reduction

Logits = Mapping[str, Tensor]
"""Discriminator logits [B, 1, h_s, w_s] by head name. Heads of a second discriminator are PREFIX.HEAD."""


Weights = Mapping[str, float]
"""Weight of each discriminator's loss, by the prefix of its heads ("" for the first); 1 if it is missing."""


def discriminator_loss(
    real: Logits,
    fake: Logits,
    kind: GanLoss = "ns",
    reduction: Reduction = "mean",
    weights: Weights | None = None,
) -> Tensor:
    """Compute the discriminator loss: the mean over rows and positions, then `reduction` over heads.

    Returns a scalar in fp32. Of two discriminators, each has a loss over its own heads, and the losses are
    added with `weights`.

    `kind` selects the loss:

    - ns: softplus(-D(real)) + softplus(D(fake)) (method.md "GAN losses").
    - hinge: relu(1 - D(real)) + relu(1 + D(fake)) (Lim and Ye 2017).
    - rpgan: softplus(D(fake) - D(real)). Row i of `real` and row i of `fake` share noise and conditioning
      (Jolicoeur-Martineau 2018; R3GAN, eq. 2).
    """
    terms = {h: _discriminator_terms(real[h].float(), fake[h].float(), kind).mean() for h in real}
    return weighted_sum(terms, reduction, weights)


def _discriminator_terms(real: Tensor, fake: Tensor, kind: GanLoss) -> Tensor:
    if kind == "rpgan":
        return F.softplus(fake - real)
    if kind == "hinge":
        return F.relu(1 - real) + F.relu(1 + fake)
    return F.softplus(-real) + F.softplus(fake)


def generator_loss(
    fake: Logits,
    kind: GanLoss = "ns",
    reduction: Reduction = "mean",
    real: Logits | None = None,
    weights: Weights | None = None,
) -> Tensor:
    """Compute the generator loss, reduced like the discriminator loss: a scalar in fp32.

    ns: softplus(-D(fake)); hinge: -D(fake); rpgan: softplus(D(real) - D(fake)). Only rpgan needs `real`: the
    logits of the targets of the same rows, computed with the same discriminator weights.
    """
    if kind == "rpgan":
        assert real is not None, "the relativistic loss needs D's logits of the real rows"
        terms = {h: F.softplus(real[h].float() - v.float()).mean() for h, v in fake.items()}
    elif kind == "hinge":
        terms = {h: (-v.float()).mean() for h, v in fake.items()}
    else:
        terms = {h: F.softplus(-v.float()).mean() for h, v in fake.items()}
    return weighted_sum(terms, reduction, weights)


def by_discriminator(terms: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Group values by head name into lists by discriminator.

    A discriminator is named by the prefix of its heads, the part before a dot, or "".
    """
    groups: dict[str, list[Tensor]] = {}
    for head, value in terms.items():
        groups.setdefault(head.partition(".")[0] if "." in head else "", []).append(value)
    return groups


def weighted_sum(terms: Mapping[str, Tensor], reduction: Reduction, weights: Weights | None = None) -> Tensor:
    """Reduce the scalar terms over the heads of each discriminator, then sum with `weights`: a scalar."""
    weights = weights or {}
    losses = [weights.get(n, 1.0) * reduce_heads(v, reduction) for n, v in by_discriminator(terms).items()]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def reduce_heads(terms: Sequence[Tensor], reduction: Reduction) -> Tensor:
    """Reduce the scalar loss terms of all heads to one scalar, by mean or sum."""
    stacked = torch.stack(list(terms))
    return stacked.sum() if reduction == "sum" else stacked.mean()


def sample_mismatches(
    prompts: Sequence[str],
    fraction: float,
    uniform_samples: Tensor,
    shares: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Choose the mix-and-match swap of each fake row (method.md "Mix-and-match augmentation").

    Returns (mode [B], partner [B]), int64, on the CPU. Mode 0 leaves the row unchanged; modes 1, 2 and 3 take
    the latents x, the conditioning c or the noise z from row `partner`. `uniform_samples` [B] lies in [0, 1).
    A `fraction` of the rows is swapped, split over the three modes in proportion to `shares` (x, c, z).

    Rows 2i and 2i + 1 are partners. Rows are already in random order, and this pairing does not depend on how
    the batch is split over ranks. If both partners have the same prompt, both stay unchanged. B must be even
    unless `fraction` is 0.
    """
    # Split [0, fraction) into three intervals, one per swap.
    share_x, share_xc = shares[0] / sum(shares), (shares[0] + shares[1]) / sum(shares)
    not_x, not_xc = uniform_samples >= fraction * share_x, uniform_samples >= fraction * share_xc
    swap = 1 + not_x.long() + not_xc.long()
    mode = torch.where(uniform_samples < fraction, swap, 0)
    # Pair neighboring rows and undo the swap where both have the same prompt.
    partner = torch.arange(len(prompts))
    if fraction > 0:
        partner ^= 1
        same_prompt = [prompts[row] == prompts[row ^ 1] for row in range(len(prompts))]
        mode[torch.tensor(same_prompt)] = 0
    return mode, partner


def mix_and_match(
    fake: Tensor, real: Tensor, noise: Tensor, text: Conditioning, mode: Tensor, partner: Tensor
) -> tuple[Tensor, Tensor, Conditioning]:
    """Replace some fake rows by real triples with one mismatched member (`mode` of `sample_mismatches`).

    fake, real, noise: [B, C, h, w]; mode, partner: [B]. Returns (latents, noise, conditioning).
    Mode 1 takes the target latents of the partner row with this row's noise and text. Modes 2 and 3 take this
    row's target with the partner's text or noise. All these rows count as fake: the image is real, but it
    does not match its noise and text.
    """
    mode, partner = mode.to(fake.device), partner.to(fake.device)

    def select_rows(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (b.ndim - 1)), a, b)

    latents = select_rows(mode == 1, real[partner], select_rows(mode >= 2, real, fake))
    swapped_noise = select_rows(mode == 3, noise[partner], noise)
    cond = text[partner].map(lambda a, b: select_rows(mode == 2, a, b), text)
    return latents, swapped_noise, cond
