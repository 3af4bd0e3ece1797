"""`StudentKind`: how one kind of student is built, sharded and configured."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from distill.config.student import StudentConfig
from distill.models.student import Student


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentKind:
    """A value of `student.kind`: how it is built from a teacher, and what it can be trained with.

    `build` and `build_on_meta` take (teacher, timestep, settings, seed of new weights, stage of the run). The
    class `Student` defines the input of a student: its noise, and how a row's latents reach it.
    """

    name: str
    build: Callable[[str, int, StudentConfig, int, str], Student]
    """Returns the student with its initial weights."""
    build_on_meta: Callable[[str, int, StudentConfig, int, str], Student]
    """Returns the same student without weights, for sharding and for predicting memory."""
    shard_units: Callable[[str, Student], Iterable[nn.Module]]
    """(teacher, student) -> the blocks that FSDP2 gathers and activation checkpointing recomputes."""
    settings: tuple[str, ...] = ()
    """Fields of GeneratorConfig that this kind uses and others may not."""
    own_noise: bool = False
    """Whether its noise is not that of the pairs, as `Student.own_noise` says."""
    regresses: bool = True
    """Whether its output corresponds to the latents of the same row, so that a regression loss applies."""
    enlarges: bool = False
    """Whether it is an upsampler: it enlarges the latents of another student and cannot sample alone."""
