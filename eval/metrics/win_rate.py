"""How often one model's images score above another's on the same prompts."""

from dataclasses import dataclass

from torch import Tensor

from d2g.core.errors import UserError
from eval.metrics.intervals import wilson_interval


@dataclass(frozen=True, kw_only=True, slots=True)
class WinRate:
    """Share of prompts that the first model wins, a tie counting half; `interval`: 95 %."""

    rate: float
    interval: tuple[float, float]
    wins: int
    ties: int
    losses: int


def win_rate(first: Tensor, second: Tensor, *, margin: float = 0.0) -> WinRate:
    """How often `first` [N] scores above `second` [N] on the same N prompts and noise.

    Scores within `margin` of each other are ties. The interval is Wilson's (1927) of the rate. It also covers
    the case with ties, because half points vary less than wins and losses. Raises UserError without prompts.
    """
    assert first.shape == second.shape and first.ndim == 1 and margin >= 0
    if not len(first):
        raise UserError("a win rate needs at least one prompt; got none")
    difference = first.double() - second.double()
    wins, losses = int((difference > margin).sum()), int((difference < -margin).sum())
    ties = len(first) - wins - losses
    rate = (wins + ties / 2) / len(first)
    return WinRate(rate=rate, interval=wilson_interval(rate, len(first)), wins=wins, ties=ties, losses=losses)
