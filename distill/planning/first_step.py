"""Where the sampler of the pairs and the student start at different timesteps."""

from dataclasses import replace
from pathlib import Path

from d2g.diffusion import pretrained
from d2g.diffusion.schedule import Schedule
from distill.config.run import DistillConfig
from distill.planning.fake_networks import known_teacher
from pairgen.store.spec import StoreSpec, read_spec


def first_step_notes(config: DistillConfig, model: str) -> list[str]:
    """A line for each pair store on this disk whose first timestep is not that of the student.

    For example SD 1.5: 50 DDIM steps with leading spacing start at 981, the student at 999. model: a key of
    `reference_models.NAMES`, whose schedule stands in for a teacher that is not on this disk.
    """
    folders = [Path(name) for name in config.pairs.split(",") if name]
    stores = {folder: read_spec(folder) for folder in folders if (folder / "store.json").is_file()}
    if not stores:
        return []
    with known_teacher(config, model) as known:
        schedule = pretrained.load_any_schedule(known.teacher) if known is not None else None
    # Flows and EDM start at pure noise, pairs as well as students (SANA's pairs at s = 0.9997).
    if not isinstance(schedule, Schedule):
        return []
    student = int(schedule.one_step(config.student_timestep).t)
    firsts = {folder: first_timestep(schedule, spec) for folder, spec in stores.items()}
    return [
        f"{folder}: its pairs start at timestep {first}, the student at {student}; student_timestep={first} "
        "starts both at the same noise level"
        for folder, first in firsts.items()
        if first != student
    ]


def first_timestep(schedule: Schedule, spec: StoreSpec) -> int:
    """The timestep at which the sampler of a store evaluated the teacher first."""
    offset = int(spec.teacher_facts.get("steps_offset", schedule.steps_offset))
    sampled = replace(schedule, spacing=spec.spacing, steps_offset=offset)
    _, height, width = spec.latent_shape
    return int(sampled.points(spec.steps, (height, width))[0].t)
