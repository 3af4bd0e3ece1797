"""Distance between the images of student and teacher from the same noise (as DreamSim-5k, any distance)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from d2g.core.errors import UserError

Distance = Callable[[Tensor, Tensor], Tensor]
"""(student [B, ...], teacher [B, ...]) -> [B]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedDistance:
    """Mean over pairs, its standard error (infinite for one pair), and the number of pairs."""

    mean: float
    standard_error: float
    pairs: int


def rmse(student: Tensor, teacher: Tensor) -> Tensor:
    """Root mean squared difference per sample, [B], in the unit of the arguments."""
    return (student.double() - teacher.double()).square().flatten(1).mean(1).sqrt()


def psnr(student: Tensor, teacher: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 images [B, 3, H, W] in dB: 20 log10(255 / RMSE), [B].

    Equal images count as if one value differed by one level, so that the mean over pairs is finite.
    """
    assert student.dtype == teacher.dtype == torch.uint8
    least = student[0].numel() ** -0.5
    return 20 * (255 / rmse(student, teacher).clamp(min=least)).log10()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos of features [B, D], [B]; of DreamSim embeddings: DreamSim (Fu et al. 2023)."""
    a, b = normalize(student.double(), dim=1), normalize(teacher.double(), dim=1)
    return 1 - (a * b).sum(1)


def encoded(encode: Callable[[Tensor], Tensor], distance: Distance) -> Distance:
    """`distance` between the encodings of both, for example features of a network or latents of a VAE."""
    return lambda student, teacher: distance(encode(student), encode(teacher))


def mean_distance(values: Tensor) -> PairedDistance:
    """Mean and standard error of the distances [N] of pairs. Raises UserError when there are none."""
    if not len(values):
        raise UserError("no pairs to compare; give at least one held-out pair")
    values = values.double()
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("inf")
    return PairedDistance(mean=values.mean().item(), standard_error=error, pairs=len(values))
