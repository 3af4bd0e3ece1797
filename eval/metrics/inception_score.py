"""Inception score: whether single images are recognizable and all images together are diverse."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from d2g.core.errors import SettingError


@dataclass(frozen=True, kw_only=True, slots=True)
class InceptionScore:
    """Mean and (population) standard deviation of the score over the splits: 1 to the number of classes."""

    mean: float
    deviation: float
    splits: int

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, from the deviation over disjoint splits; needs two splits."""
        return self.deviation / math.sqrt(self.splits - 1)


def inception_score(
    logits: Tensor, generator: torch.Generator | None = None, *, splits: int = 10
) -> InceptionScore:
    """Mean over splits of exp E_x KL(p(y|x) || p(y)) of logits [N, classes], in float64.

    Source: Salimans et al. 2016, section 4. With a generator, rows are shuffled first: in class order, each
    split would see few classes. Raises SettingError unless 1 <= splits <= N.
    """
    if not 1 <= splits <= len(logits):
        raise SettingError(
            f"the Inception score of {len(logits)} images takes 1 to that many splits, got {splits}"
        )
    if generator is not None:
        logits = logits[torch.randperm(len(logits), generator=generator).to(logits.device)]
    # Each split has a marginal of its own.
    log_p = logits.double().log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        log_marginal = part.logsumexp(0) - torch.tensor(len(part), dtype=torch.float64).log()
        scores.append((part.exp() * (part - log_marginal)).sum(1).mean().exp())
    values = torch.stack(scores)
    return InceptionScore(mean=values.mean().item(), deviation=values.std(correction=0).item(), splits=splits)
