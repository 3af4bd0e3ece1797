"""Load a student from a run or an exported folder, and sample images with it in one step."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.errors import SettingError, UserError
from d2g.core.logs import log_once
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioner, Conditioning, require_list
from d2g.diffusion.families.registry import FAMILIES
from d2g.diffusion.latents import decode, to_uint8
from d2g.diffusion.pipelines import family_of
from d2g.diffusion.teacher_sampler import prior_seed, stage_before
from distill.models.student import DiffusionStudent, Student, student_from_teacher
from distill.student_files import (
    DEFAULT_GUIDANCE,
    condition_teacher,
    empty_student,
    load_student_weights,
    recorded_teacher_sha256,
    student_folder,
    student_guidance,
    student_prediction,
)


@dataclass(frozen=True)
class OneStepSampler:
    """Samples images with a student in one step: the student with its conditioner and autoencoder."""

    student: Student
    conditioner: Conditioner
    vae: Any
    device: torch.device
    guidance: float = DEFAULT_GUIDANCE
    """Guidance scale, for a student that takes it as an input; other students ignore it."""
    prior: "OneStepSampler | None" = None
    """For a later stage of a cascade: the student of the stage before. For an upsampler: the student whose
    latents it enlarges."""
    own_text: bool = False
    """Whether the conditioner holds the student's own text encoders, from `d2g distill text`."""
    psi: float = 1.0
    """Truncation in [0, 1], for a student with styles; 1 is none."""

    def drop_weights(self) -> None:
        """Free the memory of all networks. What describes the student stays."""
        for network in (self.student, self.conditioner, self.vae):
            network.to("meta")

    def __call__(self, prompts: Sequence[str], seed: int = 0) -> Tensor:
        """Sample one image per prompt: uint8 [N, 3, H, W], CPU. Image i uses the noise of (seed, i)."""
        return torch.cat([images for images, _ in self.sample(prompts, seed)])

    @property
    def examples(self) -> list[str]:
        """Two valid prompts, for example to compare an exported student with the original."""
        return self.conditioner.example_prompts

    @property
    def example_prior(self) -> Tensor | None:
        """Random `prior` [2, C, h, w] of a cascade's later stage or an upsampler; None for other students."""
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
        require_list(prompts)
        cond = self.conditioner.encode(prompts)
        return self.latents_of(noise, cond if prior is None else cond.with_prior(prior))

    @torch.no_grad()
    def latents_of(self, noise: Tensor, cond: Conditioning) -> Tensor:
        """Generate scaled latents [B, C, h, w] from noise [B, C, h, w] and encoded prompts in one step."""
        guidance = torch.full((len(noise),), self.guidance) if self.student.guided else None
        styles = (self.psi,) if self.student.has_styles else ()
        # Class labels come from a conditioner without weights, which is on no device.
        latents: Tensor = self.student(noise.to(self.device), cond.to(self.device), guidance, *styles)
        return latents

    def prior_latents(self, seed: int, numbers: Sequence[int], prompts: Sequence[str]) -> Tensor | None:
        """Sample the latents with which `prior` conditions these images; None without a `prior`.

        numbers: numbers of the images. Their noise comes from a stream of its own of `seed`.
        """
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
        require_list(prompts)
        for begin in range(0, len(prompts), batch_size):
            batch = list(prompts[begin : begin + batch_size])
            numbers = range(start + begin, start + begin + len(batch))
            prior = self.prior_latents(seed, numbers, batch)
            yield self.images(noise(seed, numbers, self.student.noise_shape), batch, prior), batch


def with_prior(sampler: OneStepSampler, name: str, prior: str | None) -> OneStepSampler:
    """Add the student `prior` to a loaded student `name` that needs one to draw images.

    A later stage of a cascade needs the stage before, an upsampler the student whose latents it enlarges.
    Raises SettingError for a missing or needless `prior`, and UserError for a `prior` whose teacher is not
    that of the student's pairs.
    """
    if sampler.student.prior_shape is not None:
        return _upsampler_with_prior(sampler, name, prior)
    before = stage_before("student", name, sampler.student.family, prior)
    if before is None or prior is None:
        return sampler
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
    return replace(sampler, prior=load_student(prior, device=sampler.device))


def _upsampler_with_prior(sampler: OneStepSampler, name: str, prior: str | None) -> OneStepSampler:
    """Add the student `prior`, whose latents it enlarges, to a loaded upsampler `name`.

    Raises SettingError without a `prior`, UserError if its latents have other channels or are too small.
    """
    channels, height, width = sampler.student.prior_shape or (0, 0, 0)
    if prior is None:
        raise SettingError(
            f"prior is not set, but student {name} enlarges latents of {height}x{width}; give --prior the "
            "student that draws them"
        )
    small = load_student(prior, device=sampler.device)
    shape = small.student.latent_shape
    if shape[0] != channels or shape[1] < height or shape[2] < width:
        raise UserError(
            f"student {prior} draws latents of {'x'.join(map(str, shape))}, but student {name} enlarges "
            f"latents of {channels}x{height}x{width}; give a student of the same latent space"
        )
    return replace(sampler, prior=with_prior(small, prior, None))


def with_psi(sampler: OneStepSampler, name: str, psi: float | None) -> OneStepSampler:
    """Set the truncation psi of a loaded student `name`; None leaves it unchanged.

    Raises SettingError for a student without styles, and for a psi outside [0, 1].
    """
    if psi is None:
        return sampler
    if not sampler.student.has_styles:
        raise SettingError(
            f"psi is {psi:g}, but student {name} has no styles to truncate; leave it out, or shrink "
            "the noise with noise_scale (an option of `d2g explore`, a setting of `d2g eval`)"
        )
    if not 0 <= psi <= 1:
        raise SettingError(f"psi is {psi:g}; expected 0 (the mean style) to 1 (no truncation)")
    return replace(sampler, psi=psi)


def default_student_prompts(
    name: str, teacher: str | None = None, options: str = "--prompt TEXT or --prompts FILE"
) -> list[str]:
    """Return the prompts to use if the user gives none: every class once, or one empty prompt.

    name: the student; "" if a `teacher` draws alone. options: the options that the error names. Raises
    SettingError for text-conditional networks, which have no default prompts.
    """
    prompts = pretrained.default_prompts(teacher or student_folder(name)[1])
    if not prompts:
        raise SettingError(f"nothing to draw; give {options}")
    return prompts


def load_student(name: str, teacher: str | None = None, device: torch.device | str = "cpu") -> OneStepSampler:
    """Load a student with its conditioner and autoencoder, ready to generate images.

    name: an exported folder, a run folder (its newest checkpoint), or "miniature", which ships with the
    package. `teacher` replaces the teacher recorded in the student's folder. Raises UserError if the folder
    holds no student or the weights do not fit the teacher.

    >>> student = load_student("miniature")
    >>> student(["a red circle on a white background"], seed=0).dtype
    torch.uint8
    """
    folder, recorded_teacher, _ = student_folder(name)
    return load_checkpoint(name, folder, teacher or recorded_teacher, device)


def _expect_prediction(name: str, student: Student, teacher: str) -> None:
    """Raise UserError if the weights of the student `name` predict something else than `teacher` does."""
    prediction = student_prediction(name)
    if isinstance(student, DiffusionStudent) and prediction not in ("", student.schedule.prediction):
        raise UserError(
            f"student {name} makes a prediction of type {prediction}, but teacher {teacher} has "
            f"{student.schedule.prediction}; give the teacher that the student was made of"
        )


def _warn_of_other_teacher(name: str, teacher: str) -> None:
    """Warn if the text encoders of `teacher`, which read the prompts, may not be those of the training."""
    trained, now = recorded_teacher_sha256(name), pretrained.denoiser_sha256(teacher)
    if trained not in ("", now):
        log_once(
            f"teacher {teacher} (sha256 {now[:12]}) is not the one that student {name} was trained from "
            f"({trained[:12]}); its text encoders read the prompts, so images may be wrong; give --teacher "
            "the teacher of the training",
            level=logging.WARNING,
        )


def load_checkpoint(
    run: str, folder: Path, teacher: str, device: torch.device | str = "cpu"
) -> OneStepSampler:
    """Load the EMA student in one weights folder of `student_folder`, ready to sample on `device`.

    A run that trains meanwhile gets newer checkpoints.
    """
    student, conditioner = (
        empty_student(run, teacher, student_folder(run)[2]),
        pretrained.load_conditioner(teacher),
    )
    _expect_prediction(run, student, teacher)
    own_text = load_student_weights(student, run, conditioner, folder)
    if conditioner.models and not own_text:
        _warn_of_other_teacher(run, teacher)
    sampler = _one_step(student, teacher, device, student_guidance(run, teacher), conditioner)
    return replace(sampler, own_text=own_text)


def untrained_one_step(teacher: str, device: torch.device | str = "cpu") -> OneStepSampler:
    """Build the untrained student: the teacher's weights, used in one step without classifier-free
    guidance."""
    guidance = family_of(teacher).embedded_guidance or DEFAULT_GUIDANCE
    return _one_step(student_from_teacher(teacher), teacher, device, guidance)


def _one_step(
    student: Student,
    teacher: str,
    device: torch.device | str,
    guidance: float,
    conditioner: Conditioner | None = None,
) -> OneStepSampler:
    """Freeze a student and add the teacher's autoencoder, and `conditioner` or the teacher's."""
    device = torch.device(device)
    return OneStepSampler(
        student.requires_grad_(False).to(device).eval(),
        (conditioner or pretrained.load_conditioner(teacher)).to(device),
        pretrained.load_vae(teacher).to(device),
        device,
        guidance,
    )
