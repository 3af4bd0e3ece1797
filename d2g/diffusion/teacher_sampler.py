"""A teacher that draws images with its solver; in a cascade, after the teacher of the stage before."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import Stream, generator, noise
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.base import Family
from d2g.diffusion.families.registry import FAMILIES
from d2g.diffusion.pipelines import family_of
from d2g.diffusion.teacher import Teacher, check_solver, load_teacher

TEACHER_STEPS = 50
"""Solver steps of a teacher where none are set."""
PRIOR_STEPS = 60
"""Solver steps of the stage before in a cascade where none are set (Wuerstchen, section 4)."""


@dataclass(frozen=True, kw_only=True)
class SolverSettings:
    """How a teacher draws. guidance: None for its `default_guidance`. prior: the teacher of the stage before,
    in a cascade, with steps and guidance of its own."""

    steps: int = TEACHER_STEPS
    guidance: float | None = None
    solver: str = "teacher"
    prior: str | None = None
    prior_steps: int = PRIOR_STEPS
    prior_guidance: float | None = None


@dataclass(frozen=True)
class TeacherSampler:
    """A loaded teacher with checked settings. prior: the sampler of the stage before, in a cascade."""

    teacher: Teacher
    steps: int
    guidance: float
    solver: Any
    prior: "TeacherSampler | None" = None

    @torch.no_grad()
    def latents(self, seed: int, numbers: Sequence[int], prompts: Sequence[str]) -> Tensor:
        """Scaled latents [B, C, h, w] of these images. Image i has the noise of (seed, i), as students do."""
        start = noise(seed, numbers, self.teacher.latent_shape)
        cond = self.conditioning(seed, numbers, prompts)
        return self.teacher.sample(start, prompts, self.steps, self.guidance, self.solver, cond=cond)

    def conditioning(self, seed: int, numbers: Sequence[int], prompts: Sequence[str]) -> Conditioning:
        """The encoded prompts of these images, with latents that the stage before draws now."""
        unique = list(dict.fromkeys(prompts))  # each different prompt is encoded once
        position = {prompt: i for i, prompt in enumerate(unique)}
        cond = self.teacher.encode(unique)[[position[prompt] for prompt in prompts]]
        prior = self.prior_latents(seed, numbers, prompts)
        return cond if prior is None else cond.with_prior(prior)

    def prior_latents(self, seed: int, numbers: Sequence[int], prompts: Sequence[str]) -> Tensor | None:
        """Latents of the stage before for these images; None where there is no such stage."""
        return None if self.prior is None else self.prior.latents(prior_seed(seed), numbers, prompts)

    @property
    def title(self) -> str:
        """Teacher, steps and guidance, of both stages in a cascade."""
        title = f"{self.teacher.name}, {self.steps} steps, guidance {self.guidance:g}"
        return title if self.prior is None else f"{title}, after {self.prior.title}"


def prior_seed(seed: int) -> int:
    """The seed of the noise of a cascade's first stage when both stages draw from `seed`."""
    return generator(seed, Stream.CASCADE_PRIOR).initial_seed()


def load_sampler(
    name: str,
    settings: SolverSettings,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    size: tuple[int, int] | None = None,
) -> TeacherSampler:
    """Load a teacher that draws images, and the stage before in a cascade.

    size: height and width of the latents, if not those of the network.

    Raises SettingError for a stage that is missing, that cannot draw images, or that the teacher does not
    read, and for settings that a teacher cannot sample with; UserError for a prior of another model.
    """
    before = stage_before("teacher", name, family_of(name), settings.prior)
    if before is not None and family_of(str(settings.prior)) is not before:
        raise UserError(
            f"teacher {settings.prior} is of {family_of(str(settings.prior)).title}; expected one of "
            f"{before.title}, whose latents teacher {name} reads"
        )
    last = _sampler(name, settings.steps, settings.guidance, settings.solver, device, precision, size)
    if before is None:
        return last
    # The stage before solves its own ODE, with the same kind of solver.
    first = _sampler(
        str(settings.prior),
        settings.prior_steps,
        settings.prior_guidance,
        settings.solver,
        device,
        precision,
    )
    teacher = last.teacher
    channels, expected = first.teacher.latent_shape[0], teacher.family.prior_channels(teacher.config)
    if channels != expected:
        raise UserError(
            f"teacher {settings.prior} makes latents of {channels} channels, but teacher {name} reads "
            f"{expected}; give --prior the stage of the same model"
        )
    return TeacherSampler(teacher, last.steps, last.guidance, last.solver, first)


def _sampler(
    name: str,
    steps: int,
    guidance: float | None,
    solver: str,
    device: torch.device | str,
    precision: str,
    size: tuple[int, int] | None = None,
) -> TeacherSampler:
    teacher = load_teacher(name, device, precision)
    if size is not None:
        teacher = replace(teacher, latent_shape=(teacher.latent_shape[0], *size))
    resolved_solver = teacher.default_solver if solver == "teacher" else solver
    scale = teacher.default_guidance if guidance is None else guidance
    check_solver(teacher, resolved_solver, steps, scale)
    return TeacherSampler(teacher, steps, scale, resolved_solver)


def stage_before(
    role: Literal["student", "teacher"], name: str, family: Family, prior: str | None
) -> Family | None:
    """The family of the stage whose latents a student or teacher `name` reads; None where there is none.

    Raises SettingError for a stage that draws no images, and where `prior` is missing or has no effect.
    """
    if not family.draws_images:
        raise SettingError(
            f"{role} {name} is of {family.title}, whose latents are no images; give it to --prior, and to "
            f"--{role} a {role} of the stage that reads them"
        )
    if family.prior_family is None:
        if prior is not None:
            raise SettingError(f"prior is {prior!r}, but {role} {name} reads no other stage; leave it out")
        return None
    before = FAMILIES[family.prior_family]
    if prior is None:
        raise SettingError(
            f"prior is not set, but {role} {name} is of {family.title}, which reads latents of "
            f"{before.title}; give --prior a {role} of that"
        )
    return before
