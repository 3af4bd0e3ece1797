"""The kind of student that is the teacher's network, in one step: Diffusion2GAN's."""

from distill.models.consistency import wrapper_of
from distill.models.student import meta_student, student_from_teacher
from distill.models.student_kind import StudentKind

DIFFUSION = StudentKind(
    name="diffusion",
    # Adapters come after the weights of a run that it starts from.
    build=lambda teacher, timestep, config, seed, stage: student_from_teacher(
        teacher, timestep, wrapper=wrapper_of(stage)
    ),
    build_on_meta=lambda teacher, timestep, config, seed, stage: meta_student(
        teacher, timestep, config, seed, wrapper_of(stage)
    ),
    shard_units=lambda teacher, student: student.family.shard_units(student),
)
