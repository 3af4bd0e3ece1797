"""Where the sampler of the pairs and the student start at different timesteps."""

from dataclasses import replace
from pathlib import Path

from d2g.diffusion import pretrained
from d2g.diffusion.schedule import FlowSchedule, Schedule
from distill.config.run import DistillConfig
from distill.planning.fake_networks import planning_config
from pairgen.store.spec import StoreSpec, read_spec


def first_step_notes(config: DistillConfig, model: str) -> list[str]:
    """A line for each pair store on this disk whose first timestep is not that of the student.

    For example SD 1.5: 50 DDIM steps with leading spacing start at 981, the student at 999. SANA's own grid
    starts at 999 (s = 0.9997), a student of a flow at 1000. model: a key of `reference_models.NAMES`, whose
    schedule stands in for a teacher that is not on this disk.
    """
    folders = [Path(name) for name in config.pairs.split(",") if name]
    stores = {folder: read_spec(folder) for folder in folders if (folder / "store.json").is_file()}
    # A generator with noise of its own has no timestep.
    if not stores or not config.student.is_diffusion:
        return []
    with planning_config(config, model) as planned:
        schedule = pretrained.load_schedule(planned.teacher) if planned is not None else None
    # EDM and cascades start at pure noise, pairs as well as students.
    if not isinstance(schedule, Schedule | FlowSchedule):
        return []
    student = int(schedule.one_step(config.student_timestep).t)
    firsts = {folder: first_timestep(schedule, spec) for folder, spec in stores.items()}
    remedy = "pairs with spacing=linspace start there, too"
    if isinstance(schedule, Schedule):
        remedy = "student_timestep={} starts both at the same noise level"
    return [
        f"{folder}: its pairs start at timestep {first}, the student at {student}; {remedy.format(first)}"
        for folder, first in firsts.items()
        if first != student
    ]


def first_timestep(schedule: Schedule | FlowSchedule, spec: StoreSpec) -> int:
    """The timestep at which the sampler of a store evaluated the teacher first."""
    _, height, width = spec.latent_shape
    if isinstance(schedule, FlowSchedule):
        flow = replace(schedule, spacing=spec.spacing)  # type: ignore[arg-type]
        return int(flow.points(spec.steps, (height, width))[0].t)
    offset = int(spec.teacher_facts.get("steps_offset", schedule.steps_offset))
    sampled = replace(schedule, spacing=spec.spacing, steps_offset=offset)
    return int(sampled.points(spec.steps, (height, width))[0].t)
