"""Diversity of the images of one prompt: mean pairwise distance (DreamDiv, with any features)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from d2g.core.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Diversity:
    """Mean over prompts, its standard error (infinite for one prompt), and counts."""

    mean: float
    standard_error: float
    prompts: int
    images: int


def prompt_diversity(features: Tensor, prompts: Sequence[str]) -> Diversity:
    """Mean over prompts of the mean pairwise 1 - cos of features [N, D], over all images of the prompt.

    Each prompt needs several images from different noise, in any order; prompts with one image are left out.
    With DreamSim embeddings this is Diffusion2GAN's DreamDiv (method.md "DreamSim metrics"). Raises UserError
    when no prompt has two images.
    """
    assert len(features) == len(prompts)
    # Group the images by prompt.
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    groups = [group for _, group in sorted(rows.items()) if len(group) > 1]
    if not groups:
        raise UserError(
            "diversity needs at least two images of some prompt; sample each prompt more than once"
        )
    # One mean per prompt: prompts are the independent samples.
    unit = normalize(features.double(), dim=1)
    means = torch.tensor([_pairwise(unit[group]) for group in groups], dtype=torch.float64)
    error = means.std().item() / len(means) ** 0.5 if len(means) > 1 else float("inf")
    return Diversity(
        mean=means.mean().item(),
        standard_error=error,
        prompts=len(groups),
        images=sum(map(len, groups)),
    )


def _pairwise(rows: Tensor) -> float:
    """Mean of 1 - cos over unordered pairs of unit rows [n, D]."""
    n = len(rows)
    cosines = rows @ rows.T
    return 1 - float((cosines.sum() - cosines.trace()) / (n * (n - 1)))
