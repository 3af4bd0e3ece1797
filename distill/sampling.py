"""Load a student from a run or an exported folder and generate images with it in one step."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from d2g.core.captioned_grid import captioned_grid
from d2g.core.config import RESTORE_CONFIG_HINT, from_json
from d2g.core.distributed import checkpoint, process_group
from d2g.core.errors import SettingError, UserError
from d2g.core.json_files import read_json_object
from d2g.core.logs import logger
from d2g.core.png import image_grid, save_png
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioner, Conditioning
from d2g.diffusion.families.registry import FAMILIES
from d2g.diffusion.latents import decode, to_uint8
from d2g.diffusion.lora import has_lora, merged
from d2g.diffusion.pipelines import family_of
from d2g.diffusion.teacher_sampler import SolverSettings, load_sampler, prior_seed, stage_before
from distill.config.components import StudentConfig
from distill.models.student import Student, add_guidance_embedding, student_from_teacher
from distill.models.students import build_student
from distill.models.text_student import split_tensors

REMEDIES = {
    "student.json": "export the student again",
    "config.json": RESTORE_CONFIG_HINT,
}
"""Files that describe a student, and what to do if one is damaged."""


@dataclass(frozen=True)
class OneStep:
    """A student with its teacher's conditioner and autoencoder, on one device."""

    student: Student
    conditioner: Conditioner
    vae: Any
    device: torch.device
    guidance: float = 8.0
    """Guidance scale for a student that takes it as an input; other students ignore it."""
    prior: "OneStep | None" = None
    """The student of the stage before, for a later stage of a cascade; that whose latents an upsampler
    enlarges."""
    own_text: bool = False
    """Whether the conditioner's text encoders are the student's own, from `d2g distill text`."""
    psi: float = 1.0
    """Truncation of the styles, in [0, 1], for a student that has some; 1: none."""

    def __call__(self, prompts: Sequence[str], seed: int = 0) -> Tensor:
        """Generate one image per prompt: uint8 [N, 3, H, W], CPU. Image i uses the noise of (seed, i)."""
        return torch.cat([images for images, _ in self.sample(prompts, seed)])

    @property
    def examples(self) -> list[str]:
        """Two valid prompts, for example to compare two exported forms of the student."""
        return self.conditioner.example_prompts

    @property
    def example_prior(self) -> Tensor | None:
        """Random latents for the two `examples`, of the stage before or for an upsampler; None for other
        students."""
        if self.student.prior_shape is not None:
            return noise(1, range(2), self.student.prior_shape)
        family = self.student.family
        if family.prior_family is None:
            return None
        side = FAMILIES[family.prior_family].default_size or 1
        return noise(1, range(2), (family.prior_channels(self.student.conditioning_config), side, side))

    @torch.no_grad()
    def latents(self, noise: Tensor, prompts: Sequence[str], prior: Tensor | None = None) -> Tensor:
        """Generate scaled latents [B, C, h, w] from noise [B, C, h, w] and B prompts in one step.

        prior: B latents of the stage before, for a later stage of a cascade.
        """
        cond = self.conditioner.encode(prompts)
        return self.latents_of(noise, cond if prior is None else cond.with_prior(prior))

    @torch.no_grad()
    def latents_of(self, noise: Tensor, cond: Conditioning) -> Tensor:
        """Generate scaled latents [B, C, h, w] from noise [B, C, h, w] and encoded prompts in one step."""
        guidance = torch.full((len(noise),), self.guidance) if self.student.guided else None
        styles = (self.psi,) if self.student.has_styles else ()
        latents: Tensor = self.student(noise.to(self.device), cond, guidance, *styles)
        return latents

    def prior_latents(self, seed: int, numbers: Sequence[int], prompts: Sequence[str]) -> Tensor | None:
        """Latents of the stage before for these images and their prompts, drawn by `prior` in one step from
        noise of a stream of `seed`; None where there is no such stage."""
        if self.prior is None:
            return None
        shape = self.prior.student.noise_shape
        return self.prior.latents(noise(prior_seed(seed), numbers, shape), prompts)

    @torch.no_grad()
    def images(self, noise: Tensor, prompts: Sequence[str], prior: Tensor | None = None) -> Tensor:
        """Generate uint8 images [B, 3, H, W] on the CPU from noise [B, C, h, w] and B prompts.

        prior: as in `latents`.
        """
        return self.decode(self.latents(noise, prompts, prior))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents [B, C, h, w] to uint8 images [B, 3, H, W] on the CPU.

        Raises UserError for latents that are not finite, which would become images of one color.
        """
        if not latents.isfinite().all():
            raise UserError(
                "the student gives latents that are not finite; its weights are damaged or its training has "
                "diverged, or the noise is scaled too far"
            )
        return to_uint8(decode(self.vae, latents)).cpu()

    def sample(
        self, prompts: Sequence[str], seed: int, start: int = 0, batch_size: int = 32
    ) -> Iterator[tuple[Tensor, list[str]]]:
        """Generate batches of (uint8 images [B, 3, H, W], B prompts).

        Image i uses the noise of (seed, start + i), whatever the batch size.
        """
        for first in range(0, len(prompts), batch_size):
            part = list(prompts[first : first + batch_size])
            rows = range(start + first, start + first + len(part))
            prior = self.prior_latents(seed, rows, part)
            yield self.images(noise(seed, rows, self.student.noise_shape), part, prior), part


class CommonFacts(TypedDict):
    """What a run's config.json and an export's student.json both say of the student."""

    teacher: NotRequired[str]
    student_timestep: NotRequired[int]
    guidance: NotRequired[float]
    """Of an export whose teacher takes the guidance scale as an input: the scale of its pairs."""
    condition_teacher: NotRequired[str]
    """Of an export of a cascade's later stage: the denoiser's sha256 of the stage before."""
    clip_guidance_sha256: NotRequired[str]
    """Of an export of a student that a CLIP guided: `guiding_clip`."""
    inputs: NotRequired[dict[str, Any]]


class StudentFacts(CommonFacts):
    """What is read of either file."""

    student: NotRequired[dict[str, Any]]
    """The settings of the student; of an export, where it is not the teacher's network."""


class RunFacts(CommonFacts):
    """What is read of a run's config.json."""

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


def student_guidance(name: str, teacher: str) -> float:
    """The guidance scale at which a student is drawn unless the user gives another.

    Where the teacher takes the scale as an input: that of the run's first pair store, as recorded.
    """
    usual = family_of(teacher).embedded_guidance
    if usual is None:
        return OneStep.guidance
    _, _, facts = _student_facts(name)
    stores = facts.get("inputs", {}).get("pairs", [])
    return float(stores[0]["guidance"] if stores else facts.get("guidance", usual))


def condition_teacher(name: str) -> str:
    """The denoiser's sha256 of the teacher whose latents conditioned the pairs of a student; "" for none."""
    _, _, facts = _student_facts(name)
    stores = facts.get("inputs", {}).get("pairs", [])
    return str(stores[0].get("condition_teacher", "") if stores else facts.get("condition_teacher", ""))


def with_prior(one: OneStep, name: str, prior: str | None) -> OneStep:
    """A loaded student `name` that draws images, with the student `prior` of the stage before if it is the
    later stage of a cascade.

    Raises SettingError where a stage is missing or there is none, UserError for a `prior` of another teacher
    than the pairs of the student.
    """
    if one.student.prior_shape is not None:
        return _upsampler_with_prior(one, name, prior)
    before = stage_before("student", name, one.student.family, prior)
    if before is None or prior is None:
        return one
    # The stage before must be a student of the teacher that made the latents in the pairs.
    _, teacher, _ = student_folder(prior)
    if family_of(teacher) is not before:
        raise UserError(f"student {prior} is of {family_of(teacher).title}; expected one of {before.title}")
    expected = condition_teacher(name)
    if expected and pretrained.denoiser_sha256(teacher) != expected:
        raise UserError(
            f"student {prior} is of another teacher than the latents that student {name} was trained with: "
            f"sha256 {pretrained.denoiser_sha256(teacher)[:12]}, expected {expected[:12]}"
        )
    return replace(one, prior=load_student(prior, device=one.device))


def _upsampler_with_prior(one: OneStep, name: str, prior: str | None) -> OneStep:
    """A loaded upsampler `name` with the student `prior` whose latents it enlarges.

    Raises SettingError without one, UserError for one whose latents have other channels or are too small.
    """
    channels, height, width = one.student.prior_shape or (0, 0, 0)
    if prior is None:
        raise SettingError(
            f"prior is not set, but student {name} enlarges latents of {height}x{width}; give --prior the "
            "student that draws them"
        )
    small = load_student(prior, device=one.device)
    shape = small.student.latent_shape
    if shape[0] != channels or shape[1] < height or shape[2] < width:
        raise UserError(
            f"student {prior} draws latents of {'x'.join(map(str, shape))}, but student {name} enlarges "
            f"latents of {channels}x{height}x{width}; give a student of the same latent space"
        )
    return replace(one, prior=with_prior(small, prior, None))


def stored_tensors(name: str, folder: Path | None = None) -> dict[str, Tensor]:
    """Load the EMA weights of a run, or the weights of an exported student, as they are stored.

    folder: one of the run's checkpoints, in place of the newest one.
    """
    if folder is not None:
        return checkpoint.open_checkpoint(folder).tensors("ema")
    _, file, _ = _student_facts(name)
    # An exported student has no checkpoint before it.
    advice = REMEDIES[file] if file == "student.json" else ""
    return checkpoint.Checkpoint(student_folder(name)[0], 0, {}, advice).tensors("ema")


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
    return build_student(teacher, timestep, kind_settings(name))


def load_student_weights(
    student: Student, name: str, conditioner: Conditioner | None = None, folder: Path | None = None
) -> bool:
    """Load the EMA weights of a run, or those of an exported student, into a `student` without adapters.

    Adapters are merged first. If the weights take the guidance scale as an input, a guidance embedding is
    added to `student`. conditioner: the teacher's, into which a student's own text encoders go. folder: one
    of the run's checkpoints, in place of the newest one. Returns whether it has text encoders of its own.
    Raises UserError if a tensor is missing, unexpected, or has another shape, and for text encoders without a
    conditioner.
    """
    tensors, own_text = split_tensors(student_tensors(name, folder))
    if own_text and conditioner is None:
        raise SettingError(
            f"{name} has text encoders of its own, which this run would drop; set "
            "student.own_text_encoder=true"
        )
    if "unet.time_embedding.cond_proj.weight" in tensors and not student.guided:
        add_guidance_embedding(student.network)
    tensors = student.grown(tensors)
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


def default_student_prompts(name: str, teacher: str | None = None) -> list[str]:
    """Return the prompts to use if the user gives none: every class once, or one empty prompt.

    name: the student; empty with a `teacher` that draws alone. Raises SettingError for text-conditioned
    networks, which have no default prompts.
    """
    prompts = pretrained.default_prompts(teacher or student_folder(name)[1])
    if not prompts:
        raise SettingError("nothing to draw; give --prompt TEXT or --prompts FILE")
    return prompts


def load_student(name: str, teacher: str | None = None, device: torch.device | str = "cpu") -> OneStep:
    """Load a student with its conditioner and autoencoder, ready to generate images.

    name: an exported folder, a run folder (its newest checkpoint), or "miniature", which ships with the
    package. `teacher` replaces the teacher recorded in the student's folder. Raises UserError if the folder
    holds no student or the weights do not fit the teacher.

    >>> student = load_student("miniature")
    >>> student(["a red circle on a white background"], seed=0).dtype
    torch.uint8
    """
    _, recorded_teacher, timestep = student_folder(name)
    source = teacher or recorded_teacher
    student, conditioner = empty_student(name, source, timestep), pretrained.load_conditioner(source)
    own_text = load_student_weights(student, name, conditioner)
    one = _one_step(student, source, device, student_guidance(name, source), conditioner)
    return replace(one, own_text=own_text)


def load_checkpoint(run: str, folder: Path, teacher: str, device: torch.device | str = "cpu") -> OneStep:
    """Load the averaged student of one checkpoint folder of `run`, ready to sample on `device`."""
    student, conditioner = (
        empty_student(run, teacher, student_folder(run)[2]),
        pretrained.load_conditioner(teacher),
    )
    own_text = load_student_weights(student, run, conditioner, folder)
    one = _one_step(student, teacher, device, student_guidance(run, teacher), conditioner)
    return replace(one, own_text=own_text)


def _one_step(
    student: Student,
    teacher: str,
    device: torch.device | str,
    guidance: float,
    conditioner: Conditioner | None = None,
) -> OneStep:
    """A student, frozen, with the teacher's autoencoder and its `conditioner`, or else the teacher's."""
    device = torch.device(device)
    return OneStep(
        student.requires_grad_(False).to(device).eval(),
        (conditioner or pretrained.load_conditioner(teacher)).to(device),
        pretrained.load_vae(teacher).to(device),
        device,
        guidance,
    )


def save_samples(
    name: str,
    prompts: Sequence[str],
    out: Path,
    seed: int,
    batch_size: int = 32,
    teacher: str | None = None,
    guidance: float | None = None,
    progress: Progress = quiet,
    prior: str | None = None,
    psi: float | None = None,
) -> dict[str, Any]:
    """Generate one image per prompt; write OUT/00000.png, ... with the prompt as metadata, and OUT/grid.png.

    guidance: the guidance scale to imitate. prior: the student of the stage before, in a cascade, or that
    whose latents an upsampler enlarges. psi: truncation of the styles. Returns the output folder, the number
    of images and the seconds per image. Raises SettingError if `guidance` or `psi` is set but the student
    does not take it, and as `with_prior` does.
    """
    images, seconds = _student_images(
        name, prompts, seed, batch_size, teacher, guidance, progress, prior=prior, psi=psi
    )
    _write_images(images, prompts, seed, out)
    return {"out": str(out), "images": len(images), "seconds_per_image": seconds}


def with_psi(one: OneStep, name: str, psi: float | None) -> OneStep:
    """A loaded student `name` that truncates its styles by psi; None leaves it.

    Raises SettingError for a student without styles, and outside [0, 1].
    """
    if psi is None:
        return one
    if not one.student.has_styles:
        raise SettingError(
            f"psi is {psi:g}, but student {name} has no styles to truncate; leave it out, or use "
            "noise_scale, which shrinks the noise"
        )
    if not 0 <= psi <= 1:
        raise SettingError(f"psi is {psi:g}; expected 0 (the mean style) to 1 (no truncation)")
    return replace(one, psi=psi)


def save_teacher_samples(
    name: str,
    prompts: Sequence[str],
    out: Path,
    seed: int,
    batch_size: int,
    settings: SolverSettings,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """`save_samples` of a teacher, which draws with its first-order solver, in a cascade after the stage
    before.

    Raises SettingError and UserError as `load_sampler` does.
    """
    images, seconds = _teacher_images(name, prompts, seed, batch_size, settings, progress)
    _write_images(images, prompts, seed, out)
    return {"out": str(out), "images": len(images), "seconds_per_image": seconds}


def save_both_samples(
    student: str,
    teacher: str,
    prompts: Sequence[str],
    out: Path,
    seed: int,
    batch_size: int,
    settings: SolverSettings,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Student and teacher on the same noise: OUT/student, OUT/teacher, and OUT/grid.png with both in a row
    and the prompts below.

    The guidance of the settings is for a student that takes it, too, else for the teacher alone. By default
    both have the scale of the student's pairs where the teacher takes it as an input. In a cascade, the prior
    of the settings is the student of the stage before; the teacher draws after that student's teacher.
    """
    prior = settings.prior
    if settings.guidance is None and family_of(teacher).embedded_guidance is not None:
        settings = replace(settings, guidance=student_guidance(student, teacher))
    student_images = _student_images(
        student,
        prompts,
        seed,
        batch_size,
        teacher,
        settings.guidance,
        progress,
        must_take_guidance=False,
        prior=prior,
    )
    settings = replace(settings, prior=None if prior is None else student_folder(prior)[1])
    timed: dict[str, tuple[list[Tensor], float]] = {
        "student": student_images,
        "teacher": _teacher_images(teacher, prompts, seed, batch_size, settings, progress),
    }
    for name, (images, _) in timed.items():
        _write_images(images, prompts, seed, out / name)
    # Rows of student and teacher, side by side.
    rows = [image for pair in zip(*(images for images, _ in timed.values()), strict=True) for image in pair]
    if len({image.shape for image in rows}) == 1:
        steps = f"{settings.steps}" if prior is None else f"{settings.prior_steps} + {settings.steps}"
        names = ("one step" if prior is None else "two steps", f"teacher, {steps} steps")
        titles = [f"{name}: {text}" for text in prompts for name in names]
        same = kind_settings(student).is_diffusion
        shared = "on the same noise" if same else "with noise of their own"
        heading = f"{Path(student).name} and its teacher {Path(teacher).name} {shared}, seed {seed}"
        across = 2 if len(rows) <= 16 else 8
        save_png(captioned_grid(torch.stack(rows[:64]), titles[:64], heading, across), out / "grid.png", {})
    return {
        "out": str(out),
        "images": len(rows),
        "seconds_per_image": timed["student"][1],
        "teacher_seconds_per_image": timed["teacher"][1],
    }


def _student_images(
    name: str,
    prompts: Sequence[str],
    seed: int,
    batch_size: int,
    teacher: str | None,
    guidance: float | None,
    progress: Progress,
    must_take_guidance: bool = True,
    prior: str | None = None,
    psi: float | None = None,
) -> tuple[list[Tensor], float]:
    """One image per prompt, uint8 [3, H, W] each, and the seconds per image."""
    one_step = with_prior(load_student(name, teacher, process_group.own_device()), name, prior)
    one_step = with_psi(one_step, name, psi)
    # The guidance scale is an input of some students only.
    if guidance is not None and one_step.student.guided:
        one_step = replace(one_step, guidance=guidance)
    elif guidance is not None and must_take_guidance:
        raise SettingError(
            f"student {name} has its guidance in its weights; leave --guidance out, or train one with "
            "student.guidance_conditioning=true"
        )
    started, samples = time.monotonic(), list[Tensor]()
    for images, _ in one_step.sample(prompts, seed, batch_size=batch_size):
        samples += list(images)
        progress("sample", len(samples), len(prompts))
    return samples, (time.monotonic() - started) / len(samples)


def _teacher_images(
    name: str,
    prompts: Sequence[str],
    seed: int,
    batch_size: int,
    settings: SolverSettings,
    progress: Progress,
) -> tuple[list[Tensor], float]:
    """One image per prompt, uint8 [3, H, W] each, and the seconds per image."""
    sampler = load_sampler(name, settings, process_group.own_device())
    vae = pretrained.load_vae(name).to(sampler.teacher.device)
    started, samples = time.monotonic(), list[Tensor]()
    for first in range(0, len(prompts), batch_size):
        # Image i has the noise of (seed, i), as a student's.
        part = list(prompts[first : first + batch_size])
        latents = sampler.latents(seed, range(first, first + len(part)), part)
        with torch.no_grad():
            samples += list(to_uint8(decode(vae, latents)).cpu())
        progress("sample teacher", len(samples), len(prompts))
    return samples, (time.monotonic() - started) / len(samples)


def _write_images(images: Sequence[Tensor], prompts: Sequence[str], seed: int, out: Path) -> None:
    """One file per image, and a grid of the first ones."""
    for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        save_png(
            image, out / f"{number:05d}.png", {"prompt": prompt, "seed": str(seed), "index": str(number)}
        )
    save_png(image_grid(torch.stack(list(images[:64]))), out / "grid.png", {})
    log_earlier_samples(out, len(images))


def log_earlier_samples(out: Path, count: int) -> None:
    """Log which images of an earlier call OUT holds beside the `count` new ones; a user may want them."""
    numbered = (path for path in out.glob("*.png") if path.stem.isdecimal())
    if earlier := sorted(path for path in numbered if int(path.stem) >= count):
        logger.warning(
            "%s also holds %d images of an earlier call, from %s on; remove them, or choose another --out",
            out,
            len(earlier),
            earlier[0].name,
        )


def untrained_one_step(teacher: str, device: torch.device | str = "cpu") -> OneStep:
    """Build the untrained student: the teacher's weights, used in one step without classifier-free
    guidance."""
    guidance = family_of(teacher).embedded_guidance or OneStep.guidance
    return _one_step(student_from_teacher(teacher), teacher, device, guidance)
