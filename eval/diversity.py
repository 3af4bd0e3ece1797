"""How different are pictures of one prompt: mean pairwise distance (DreamDiv, with any features)."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from core.errors import UserError
from eval.features import FeatureNet


def prompt_diversity(batches: Iterable[tuple[Tensor, list[str]]], features: FeatureNet) -> dict[str, float]:
    """Mean over prompts of the mean pairwise 1 - cos of features, over all images of the prompt.

    `batches` hold uint8 images and prompts, several images (other noise) per prompt, in any order. With
    DreamSim embeddings this is Diffusion2GAN's DreamDiv. Returns `diversity`, `prompts` and `images`. Raises
    UserError when no prompt has two images.
    """
    rows: dict[str, list[Tensor]] = {}
    for images, prompts in batches:
        for feature, prompt in zip(normalize(features(images).double(), dim=1).cpu(), prompts, strict=True):
            rows.setdefault(prompt, []).append(feature)
    groups = [torch.stack(group) for _, group in sorted(rows.items()) if len(group) > 1]
    if not groups:
        raise UserError(
            "diversity needs at least two images of some prompt; sample each prompt more than once"
        )
    means = [_pairwise(group) for group in groups]
    return {
        "diversity": sum(means) / len(means),
        "prompts": float(len(groups)),
        "images": float(sum(map(len, groups))),
    }


def _pairwise(rows: Tensor) -> float:
    """Mean of 1 - cos over unordered pairs of unit rows [n, D]."""
    n = len(rows)
    cosines = rows @ rows.T
    return 1 - float((cosines.sum() - cosines.trace()) / (n * (n - 1)))
