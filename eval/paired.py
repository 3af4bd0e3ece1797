"""How near is the student to its teacher on the same noise (DreamSim-5k's question, with any distance)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import UserError

Distance = Callable[[Tensor, Tensor], Tensor]
"""(student [B, ...], teacher [B, ...]) -> [B]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedDistance:
    """Mean over pairs, its standard error, and the number of pairs."""

    mean: float
    standard_error: float
    pairs: int


def rmse(student: Tensor, teacher: Tensor) -> Tensor:
    """Root mean squared difference per sample [B], in the unit of its arguments."""
    return (student.double() - teacher.double()).square().flatten(1).mean(1).sqrt()


@torch.no_grad()
def paired_distances(
    pairs: Iterable[tuple[Tensor, Tensor]], distances: Mapping[str, Distance]
) -> dict[str, PairedDistance]:
    """Each distance between student's and teacher's outputs of the same noise and prompt, over all pairs."""
    values: dict[str, list[Tensor]] = {name: [] for name in distances}
    for student, teacher in pairs:
        for name, distance in distances.items():
            values[name].append(distance(student, teacher).double().cpu())
    if not all(values.values()):
        raise UserError("no pairs to compare; give at least one held-out pair")
    return {name: _summary(torch.cat(parts)) for name, parts in values.items()}


def _summary(values: Tensor) -> PairedDistance:
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("inf")
    return PairedDistance(mean=values.mean().item(), standard_error=error, pairs=len(values))
