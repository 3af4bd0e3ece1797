"""Read the facts and the weights of a run of `d2g distill`, or of an exported student."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from torch import Tensor

from d2g.core.config import RESTORE_CONFIG_HINT, from_json
from d2g.core.distributed import checkpoint
from d2g.core.errors import SettingError, UserError
from d2g.core.json_files import read_json_object
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioner
from d2g.diffusion.lora import has_lora, merged
from d2g.diffusion.pipelines import family_of
from distill.config.student import StudentConfig
from distill.models.student import DiffusionStudent, Student, add_guidance_embedding
from distill.models.students import build_student
from distill.models.text_student import split_tensors

DEFAULT_GUIDANCE = 8.0
"""Guidance scale of a student that takes it as an input, where nothing else is known."""
GUIDANCE_WEIGHT = "unet.time_embedding.cond_proj.weight"
"""The weight of a guidance input that was added to a teacher's network."""
REMEDIES = {
    "student.json": "export the student again",
    "config.json": RESTORE_CONFIG_HINT,
}
"""Files that describe a student, and what to do if one is damaged."""


class CommonFacts(TypedDict):
    """Facts that a run's config.json and an export's student.json share."""

    teacher: NotRequired[str]
    student_timestep: NotRequired[int]
    guidance: NotRequired[float]
    """Of an export: `student_guidance` of its run if it takes the scale, else `pairs_guidance`."""
    condition_teacher: NotRequired[str]
    """Of an export of a cascade's later stage: the denoiser's sha256 of the stage before."""
    teacher_sha256: NotRequired[str]
    """Of an export: `recorded_teacher_sha256`."""
    clip_guidance_sha256: NotRequired[str]
    """Of an export of a student that a CLIP guided: `guiding_clip`."""
    latent_size: NotRequired[list[int]]
    """Of an export of a student of pairs: height and width of their latents."""
    inputs: NotRequired[dict[str, Any]]


class StudentFacts(CommonFacts):
    """The facts that are read from either file."""

    student: NotRequired[dict[str, Any]]
    """The settings of the student; of an export, where it is not the teacher's network."""


class RunFacts(CommonFacts):
    """The facts that are read from a run's config.json alone."""

    student: dict[str, Any]


def student_folder(name: str) -> tuple[Path, str, int]:
    """Locate a student: (weights folder, teacher, timestep) of an export or of a run's newest checkpoint.

    name: a folder or "miniature". Raises UserError for any other folder and for a run without a checkpoint.
    """
    folder, file, config = _student_facts(name)
    # A run: its newest checkpoint holds the weights.
    if file == "config.json":
        last = checkpoint.latest(folder / "checkpoints")
        if last is None:
            raise UserError(f"student {name}: the run has no checkpoint yet; train it first")
        folder = last.folder
    try:
        return folder, str(config["teacher"]), int(config["student_timestep"])
    except KeyError as error:
        raise UserError(f"student {name}: {file} has no {error}; expected a folder that d2g wrote") from error


def _student_facts(name: str) -> tuple[Path, str, dict[str, Any]]:
    """The folder of a student, the file that tells a run from an exported student, and its content."""
    folder = pretrained.SHIPPED[name] / "student" if name in pretrained.SHIPPED else Path(name)
    for file in REMEDIES:
        if (folder / file).is_file():
            return folder, file, read_json_object(folder / file, REMEDIES[file], StudentFacts)
    raise UserError(
        f"student {name}: expected a run of `d2g distill` (config.json) or an exported student (student.json)"
    )


def guiding_clip(name: str) -> str:
    """`clip_sha256` of the CLIP that guided a student in training; "" where none did or none is recorded."""
    _, _, facts = _student_facts(name)
    return str(facts.get("inputs", {}).get("clip", "") or facts.get("clip_guidance_sha256", ""))


def recorded_teacher_sha256(name: str) -> str:
    """The denoiser's sha256 of the teacher that a student was trained from; "" if none is recorded."""
    _, _, facts = _student_facts(name)
    return str(facts.get("inputs", {}).get("teacher", "") or facts.get("teacher_sha256", ""))


def sampled_guidance(scales: Sequence[float]) -> float:
    """The guidance scale at which a student of pairs with these scales is drawn: DEFAULT_GUIDANCE, or the
    nearest scale in their range, because the student has learned no other."""
    return min(max(DEFAULT_GUIDANCE, min(scales)), max(scales))


def student_guidance(name: str, teacher: str) -> float:
    """The guidance scale at which a student is drawn unless the user gives another: `pairs_guidance`, or the
    usual one where no scale is recorded."""
    if (scale := pairs_guidance(name, teacher)) is not None:
        return scale
    embedded = family_of(teacher).embedded_guidance
    return DEFAULT_GUIDANCE if embedded is None else embedded


def pairs_guidance(name: str, teacher: str) -> float | None:
    """The guidance scale of a student's pairs, at which its teacher is drawn beside it; None if not recorded.

    `sampled_guidance` of the scales of its pair stores; where the teacher takes the scale as an input, that
    of the first store.
    """
    _, _, facts = _student_facts(name)
    stores = facts.get("inputs", {}).get("pairs", [])
    if scales := [float(store["guidance"]) for store in stores if "guidance" in store]:
        return sampled_guidance(scales) if family_of(teacher).embedded_guidance is None else scales[0]
    return float(facts["guidance"]) if "guidance" in facts else None


def student_prediction(name: str) -> str:
    """What the network of a student predicts, such as "epsilon": as its pairs record it, or as the scheduler
    of its teacher says if that is on this disk; "" if it is not known."""
    _, _, facts = _student_facts(name)
    stores = facts.get("inputs", {}).get("pairs", [])
    recorded = stores[0].get("teacher_facts") if stores else None
    if isinstance(recorded, dict) and "prediction_type" in recorded:
        return str(recorded["prediction_type"])
    teacher = str(facts.get("teacher", ""))
    here = teacher in pretrained.SHIPPED or (Path(teacher) / "model_index.json").is_file()
    return pretrained.load_schedule(teacher).prediction if here else ""


def condition_teacher(name: str) -> str:
    """The denoiser's sha256 of the teacher whose latents conditioned the pairs of a student; "" for none."""
    _, _, facts = _student_facts(name)
    stores = facts.get("inputs", {}).get("pairs", [])
    return str(stores[0].get("condition_teacher", "") if stores else facts.get("condition_teacher", ""))


def pairs_size(name: str) -> tuple[int, int] | None:
    """Height and width of the latents of a student's pairs; None if they are not recorded."""
    _, _, facts = _student_facts(name)
    stores = facts.get("inputs", {}).get("pairs", [])
    shape = stores[0].get("latent_shape") if stores else None
    size = shape[-2:] if shape else facts.get("latent_size")
    return None if size is None else (int(size[0]), int(size[1]))


def teacher_prior(teacher: str, prior: str | None) -> str | None:
    """The teacher of the stage before, for a `teacher` that draws beside a student after the student `prior`.

    It is the teacher of `prior` in a cascade. None where `teacher` reads no other stage, as that of an
    upsampler, which draws alone.
    """
    reads_prior = prior is not None and family_of(teacher).prior_family is not None
    return student_folder(prior)[1] if prior is not None and reads_prior else None


def stored_tensors(name: str, folder: Path | None = None) -> dict[str, Tensor]:
    """Load the EMA weights of a run, or the weights of an exported student, as they are stored.

    folder: one of the run's checkpoints, in place of the newest one.
    """
    exported, file, _ = _student_facts(name)
    if file == "student.json":  # it has no checkpoint before it
        return checkpoint.Checkpoint(exported, 0, {}, REMEDIES[file]).tensors("ema")
    return checkpoint.open_checkpoint(folder or student_folder(name)[0]).tensors("ema")


def student_tensors(name: str, folder: Path | None = None) -> dict[str, Tensor]:
    """`stored_tensors`, with LoRA adapters merged."""
    tensors = stored_tensors(name, folder)
    if not has_lora(tensors):
        return tensors
    config = student_config(name)
    return merged(tensors, config.lora_rank, config.alpha)


def student_config(name: str) -> StudentConfig:
    """Read the student settings (adapters, guidance conditioning) of a run."""
    config = read_json_object(Path(name) / "config.json", REMEDIES["config.json"], RunFacts)
    return from_json(StudentConfig, config["student"])


def kind_settings(name: str) -> StudentConfig:
    """The settings that build a student: its kind, and the sizes of a network of its own. Adapters and other
    additions are in the weights."""
    _, _, facts = _student_facts(name)
    config = from_json(StudentConfig, facts.get("student", {}))
    return StudentConfig() if config.is_diffusion else config


def empty_student(name: str, teacher: str, timestep: int) -> Student:
    """A student of the kind and sizes of `name`, for its weights."""
    student = build_student(teacher, timestep, kind_settings(name))
    if isinstance(student, DiffusionStudent):
        student.latent_size = pairs_size(name)
    return student


def load_student_weights(
    student: Student, name: str, conditioner: Conditioner | None = None, folder: Path | None = None
) -> bool:
    """Load the EMA weights of a run, or those of an exported student, into a `student` without adapters.

    Adapters are merged first. If the weights have an input for the guidance scale, it is added to `student`.

    - conditioner: the teacher's conditioner, which receives the student's own text encoders.
    - folder: a checkpoint of the run, instead of the newest.

    Returns whether the student has its own text encoders. Raises UserError if a tensor is missing,
    unexpected, or has another shape, and for text encoders without a conditioner.
    """
    # Separate the student's own text encoders.
    tensors, own_text = split_tensors(student_tensors(name, folder))
    if own_text and conditioner is None:
        raise SettingError(
            f"{name} has text encoders of its own, which this run would drop; set "
            "student.own_text_encoder=true"
        )

    # Add what the network lacks for these weights, then load them.
    if GUIDANCE_WEIGHT in tensors and not student.guided:
        add_guidance_embedding(student.network)
    tensors = student.grow_weights(tensors)
    try:
        student.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=True)
        if own_text and conditioner is not None:
            conditioner.load_state_dict({k: v.float() for k, v in own_text.items()}, strict=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"student {name} does not fit its teacher: {first}") from error
    return bool(own_text)


def load_same_adapters(student: Student, name: str, config: StudentConfig) -> bool:
    """Load the adapters of a run `name`, and the weights below them, into a `student` with those of `config`.

    Returns False, and loads nothing, if the run has no adapters, or has others (rank, alpha, layers).
    """
    tensors, _ = split_tensors(stored_tensors(name))
    if not has_lora(tensors):
        return False
    earlier = student_config(name)
    shapes = {key: value.shape for key, value in student.state_dict().items()}
    if earlier.alpha != config.alpha or shapes != {key: value.shape for key, value in tensors.items()}:
        return False
    student.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=True)
    return True
