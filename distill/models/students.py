"""All kinds of students by name (`student.kind`).

To add one, write `distill/models/NAME_student.py` with a `StudentKind` at its top level, and add NAME to
`StudentName` in `distill/config/student.py`, with its settings if it has any. A - in the name is a _ in
the file's.
"""

from importlib import import_module
from typing import get_args

from d2g.core.errors import SettingError
from distill.config.run import FROM_TEACHER, DistillConfig
from distill.config.student import StudentConfig, StudentName
from distill.models.student import Student
from distill.models.student_kind import StudentKind


def _load(name: str) -> StudentKind:
    """Return the `StudentKind` at the top level of a kind's module."""
    module = import_module(f"distill.models.{name.replace('-', '_')}_student")
    (kind,) = (value for value in vars(module).values() if isinstance(value, StudentKind))
    assert kind.name == name, f"{module.__name__} defines the student {kind.name}"
    return kind


STUDENTS: dict[str, StudentKind] = {name: _load(name) for name in get_args(StudentName)}
"""Kinds of students by their name in `student.kind`."""


def build_student(
    teacher: str, timestep: int, config: StudentConfig, seed: int = 0, stage: str = "gan"
) -> Student:
    """Build a student with its initial weights: the teacher's, or random ones from `seed`."""
    return STUDENTS[config.kind].build(teacher, timestep, config, seed, stage)


def build_student_on_meta(
    teacher: str, timestep: int, config: StudentConfig, seed: int = 0, stage: str = "gan"
) -> Student:
    """Build the same student on torch's meta device, without weights."""
    return STUDENTS[config.kind].build_on_meta(teacher, timestep, config, seed, stage)


def check_student(config: DistillConfig) -> None:
    """Raise SettingError if the run's stage or settings do not fit its kind of student."""
    student, gan = config.student, config.gan
    if student.is_diffusion:
        return
    kind = f"student.kind is {student.kind!r}"

    # A GAN student lacks the teacher's network: no init=teacher, no other stages, no own text encoders.
    if config.init == FROM_TEACHER:
        raise SettingError(
            f"{kind}, which has none of the teacher's weights, but init is {FROM_TEACHER!r}; leave it out, "
            "or give a run of this kind"
        )
    if config.stage not in ("ode", "gan") or config.own_text:
        raise SettingError(
            f"{kind}, which `d2g distill gan` trains; stage {config.stage}, or own text encoders, needs the "
            "teacher's network: set student.kind=diffusion"
        )

    # The noise of a generator is not that of the pairs, so regression and noise conditioning do not apply.
    if not STUDENTS[student.kind].regresses and config.regression.losses:
        raise SettingError(
            f"{kind}, whose noise is its own, so that it has no latents of the pairs to compare with; "
            "train it by `d2g distill gan` with regression.losses=[]"
        )
    own_noise = STUDENTS[student.kind].own_noise
    if own_noise and config.stage == "gan" and gan.sees_noise:
        raise SettingError(
            f"{kind}, whose noise is its own, but gan.z_conditioning is true; set gan.z_conditioning=false "
            "and gan.mix_z=0"
        )

    # Photographs have the full resolution; such a student trains on reduced latents.
    mixes = config.stage == "gan" and gan.real and not config.without_pairs
    if mixes and (STUDENTS[student.kind].enlarges or student.generator.resolution):
        raise SettingError(
            f"{kind}, for which the latents of pairs are reduced, but gan.real mixes photographs with them; "
            "leave gan.real out"
        )
    if own_noise and config.train.validate_pairs:
        raise SettingError(
            f"{kind}, whose noise is its own, but train.validate_pairs is {config.train.validate_pairs}; set "
            "it to 0, and give --validate PROTOCOL"
        )
