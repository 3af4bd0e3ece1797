"""What one kind of student consists of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from distill.config.student import StudentConfig
from distill.models.student import Student


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentKind:
    """A value of `student.kind`: how it is built from a teacher, and what it can be trained with.

    `build` and `build_on_meta` take (teacher, timestep, settings, seed of new weights, stage of the run).
    What a student draws from, and how a row becomes its input, is said by `Student`.
    """

    name: str
    build: Callable[[str, int, StudentConfig, int, str], Student]
    """The student with its initial weights."""
    build_on_meta: Callable[[str, int, StudentConfig, int, str], Student]
    """The same without weights, for sharding and for predicting memory."""
    shard_units: Callable[[str, Student], Iterable[nn.Module]]
    """(teacher, student) -> the blocks that FSDP2 gathers and activation checkpointing recomputes."""
    settings: tuple[str, ...] = ()
    """Fields of GeneratorConfig that not every kind reads."""
    regresses: bool = True
    """Whether its output for a row belongs to the row's latents, so that a regression loss compares them."""
    enlarges: bool = False
    """Whether it enlarges the latents of another student, and draws no image alone."""
