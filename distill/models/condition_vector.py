"""The condition of a row as one vector or class label, for heads and generators that take no tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.pipelines import family_of, open_pipeline


def condition_vector(cond: Conditioning) -> Tensor | None:
    """Reduce a conditioning of B rows to one vector or label per row.

    Returns the class labels [B], int64; or the pooled text [B, P]; or the mean of the text tokens [B, D],
    without padding where there is a mask; or None for an unconditional teacher.
    """
    tensors = cond.tensors
    if "class_labels" in tensors:
        return tensors["class_labels"]
    if "pooled" in tensors:
        return tensors["pooled"]
    if "hidden" not in tensors:
        return None
    hidden = tensors["hidden"]
    if "mask" not in tensors:
        return hidden.mean(1)
    mask = tensors["mask"].to(hidden.dtype)[:, :, None]
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


@dataclass(frozen=True)
class ConditionShape:
    """Sizes of a teacher's condition. All are 0 for an unconditional teacher."""

    classes: int = 0
    """Number of classes."""
    text_width: int = 0
    """Width of `condition_vector` for texts."""
    token_width: int = 0
    """Width of the text's tokens."""


def condition_shape(teacher: str) -> ConditionShape:
    """Return the sizes of a teacher's condition, from its config files alone."""
    family, pipeline = family_of(teacher), open_pipeline(teacher)
    with torch.device("cpu"):
        if not family.reads_text:
            return ConditionShape(classes=pretrained.conditioner_on_meta(teacher).num_labels)
        network: Any = pretrained.load_on_meta(teacher, family.network)
        cond = family.fake_conditioning(pipeline, network.config, 1)
    vector = condition_vector(cond)
    assert vector is not None
    return ConditionShape(text_width=vector.shape[1], token_width=cond.tensors["hidden"].shape[2])
