"""Distance between the images of student and teacher from the same noise (as DreamSim-5k, any distance)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

Distance = Callable[[Tensor, Tensor], Tensor]
"""(student [B, ...], teacher [B, ...]) -> [B]."""


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
