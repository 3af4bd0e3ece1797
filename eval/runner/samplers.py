"""Samplers as image sources: students, teachers and pipelines. Image i gets the noise of (seed, i)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.config import digest
from d2g.core.distributed import checkpoint
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.diffusers_pipeline import load_any_pipeline, supported_steps
from d2g.diffusion.latents import decode, to_uint8
from d2g.diffusion.solvers import sample_ode
from d2g.diffusion.teacher import PRECISIONS, Teacher, check_solver
from d2g.diffusion.teacher_sampler import TeacherSampler
from d2g.vision.weights import file_sha256
from distill.sampling import OneStepSampler, load_checkpoint, with_prior, with_psi
from distill.student_files import student_folder
from eval.measure.latency import Parts
from eval.measure.source import ImageSource, SampledBatch, views_of
from eval.protocols.config import PIPELINE_STEPS

SampleFn = Callable[[range, list[str]], Tensor]
"""(image numbers, their prompts) -> pixels [B, 3, H, W] in [-1, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRequest:
    """A request for images: image i has prompt i modulo the number of prompts, and the noise of (seed, i)."""

    prompts: Sequence[str]
    seed: int = 0
    device: torch.device | str = "cpu"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise SettingError(f"precision is {self.precision!r}; expected {', '.join(PRECISIONS)}")
        if not self.prompts:
            raise SettingError("there is no prompt to draw; give --prompts a file with some")

    def texts(self, numbers: range) -> list[str]:
        """The prompts of these images."""
        return [self.prompts[number % len(self.prompts)] for number in numbers]

    def facts(self) -> dict[str, Any]:
        """The facts that determine the images, besides the sampler, as JSON."""
        return {"prompts_sha256": digest(list(self.prompts)), "seed": self.seed, "precision": self.precision}


def sampler_source(
    name: str,
    facts: Mapping[str, Any],
    request: SamplingRequest,
    sample: SampleFn,
    parts: Parts | None = None,
) -> ImageSource:
    """A source that samples its images. Raises UserError naming the first image that is not finite."""

    def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
        for first in range(numbers.start, numbers.stop, batch_size):
            part = range(first, min(first + batch_size, numbers.stop))
            texts = request.texts(part)
            pixels = sample(part, texts)
            # A broken image would spoil every metric: name the first.
            broken = (~pixels.isfinite()).flatten(1).any(1).cpu().nonzero()
            if len(broken):
                row = int(broken[0])
                raise UserError(
                    f"{name}: image {part[row]} ({texts[row][:80]!r}) is not finite; try precision fp32, or "
                    "look for broken weights"
                )
            yield SampledBatch(first=first, views=views_of(to_uint8(pixels), sizes), prompts=texts)

    return ImageSource(name=name, facts={**facts, **request.facts()}, draw=draw, parts=parts)


def one_step_source(
    name: str,
    sampler: OneStepSampler,
    request: SamplingRequest,
    *,
    noise_scale: float = 1.0,
    facts: Mapping[str, Any] | None = None,
) -> ImageSource:
    """A source of a loaded student. `noise_scale` below 1 shrinks the noise towards its mean, like truncation
    in a GAN: images become more typical and less diverse.
    """

    def scaled_noise(numbers: range) -> Tensor:
        return noise(request.seed, numbers, sampler.student.noise_shape) * noise_scale

    @torch.no_grad()
    def sample(numbers: range, texts: list[str]) -> Tensor:
        prior = sampler.prior_latents(request.seed, numbers, texts)
        return decode(sampler.vae, sampler.latents(scaled_noise(numbers), texts, prior))

    # The parts that latency is measured of.
    def parts(batch: int) -> dict[str, Callable[[], object]]:
        texts, inputs = request.texts(range(batch)), scaled_noise(range(batch)).to(request.device)
        cond, latents = sampler.conditioner.encode(texts), torch.zeros(batch, *sampler.student.latent_shape)
        if (prior := sampler.prior_latents(request.seed, range(batch), texts)) is not None:
            cond = cond.with_prior(prior)
        stage_before = (
            {}
            if prior is None
            else {"prior": lambda: sampler.prior_latents(request.seed, range(batch), texts)}
        )
        return {
            **stage_before,
            "text": lambda: sampler.conditioner.encode(texts),
            "network": lambda: sampler.latents_of(inputs, cond),
            "decoder": torch.no_grad()(lambda: to_uint8(decode(sampler.vae, latents.to(request.device)))),
        }

    all_facts = {"kind": "student", "noise_scale": noise_scale, **(facts or {})}
    return sampler_source(name, all_facts, request, sample, parts)


def student_source(
    name: str,
    request: SamplingRequest,
    *,
    teacher: str | None = None,
    folder: Path | None = None,
    title: str = "",
    noise_scale: float = 1.0,
    psi: float = 1.0,
    prior: str | None = None,
    guidance: float | None = None,
) -> ImageSource:
    """A source of a student: a run, an export, or a shipped name.

    folder: its weights, a checkpoint of a run (the newest). title: its name in reports and errors (`name`).
    psi: truncation of its styles, 1 for none. prior: the student of the stage before, in a cascade. guidance:
    the scale to imitate, for a student that takes it as an input; others ignore it. Raises SettingError for a
    psi below 1 of a student without styles.
    """
    newest, named_teacher, timestep = student_folder(name)
    base, weights, title = teacher or named_teacher, folder or newest, title or name
    sampler = load_checkpoint(name, weights, base, request.device)

    # Settings of the sampler, and the precision of the network.
    sampler = with_psi(with_prior(sampler, name, prior), name, None if psi == 1 else psi)
    sampler = sampler if guidance is None else replace(sampler, guidance=guidance)
    torch.nn.Module.to(
        sampler.student.network, PRECISIONS[request.precision]
    )  # diffusers' own `to` warns without need

    # The result file records everything that the images depend on.
    facts = {
        "weights_sha256": file_sha256(weights / "ema.safetensors"),
        "teacher_sha256": pretrained.weights_sha256(base),
        "timestep": timestep,
    }
    if psi != 1:
        facts["psi"] = psi
    if sampler.student.guided:
        facts["guidance"] = sampler.guidance
    if prior is not None:
        facts["prior_sha256"] = file_sha256(student_folder(prior)[0] / "ema.safetensors")
        title = f"{title} after {prior}"
    return one_step_source(title, sampler, request, noise_scale=noise_scale, facts=facts)


def checkpoints(run: str) -> list[Path]:
    """The checkpoint folders of a run, oldest first. Raises UserError when there are none."""
    folder = Path(run) / "checkpoints"
    folders = checkpoint.list_checkpoints(folder)
    if not folders:
        raise UserError(f"{folder} holds no checkpoint; give a run of `d2g distill` that has some")
    return folders


def ode_source(
    teacher: Teacher,
    request: SamplingRequest,
    *,
    steps: int = 50,
    guidance: float = 3.0,
    solver: str = "teacher",
) -> ImageSource:
    """A source of a loaded teacher of images, which integrates its ODE from the same noise that its students
    get."""
    resolved_solver = teacher.default_solver if solver == "teacher" else solver
    check_solver(teacher, resolved_solver, steps, guidance)
    return teacher_sampler_source(TeacherSampler(teacher, steps, guidance, resolved_solver), request)


def teacher_sampler_source(sampler: TeacherSampler, request: SamplingRequest) -> ImageSource:
    """A source of a teacher, in a cascade after the stage before."""
    teacher, vae = sampler.teacher, pretrained.load_vae(sampler.teacher.name).to(sampler.teacher.device)

    @torch.no_grad()
    def sample(numbers: range, texts: list[str]) -> Tensor:
        return decode(vae, sampler.latents(request.seed, numbers, texts))

    # The stages of the sampler, each on inputs that exist already, so that latency is measured per stage.
    def parts(batch: int) -> dict[str, Callable[[], object]]:
        texts, numbers = request.texts(range(batch)), range(batch)
        inputs = noise(request.seed, numbers, teacher.latent_shape).to(teacher.device)
        denoise = teacher.denoiser(sampler.conditioning(request.seed, numbers, texts), sampler.guidance)
        stage_before = (
            {}
            if sampler.prior is None
            else {"prior": lambda: sampler.prior_latents(request.seed, numbers, texts)}
        )
        return {
            **stage_before,
            "text": torch.no_grad()(lambda: teacher.encode(texts)),
            "network": lambda: sample_ode(denoise, inputs, teacher.schedule, sampler.steps, sampler.solver),
            "decoder": torch.no_grad()(lambda: to_uint8(decode(vae, inputs))),
        }

    facts = {"kind": "teacher", **_teacher_facts(sampler)}
    return sampler_source(sampler.title, facts, request, sample, parts)


def _teacher_facts(sampler: TeacherSampler) -> dict[str, Any]:
    """The facts that determine a teacher's images, besides prompts and noise, as JSON."""
    facts = {
        "weights_sha256": pretrained.weights_sha256(sampler.teacher.name),
        "teacher_facts": sampler.teacher.facts,
        "solver": sampler.solver,
        "steps": sampler.steps,
        "guidance": sampler.guidance,
    }
    return facts if sampler.prior is None else {**facts, "prior": _teacher_facts(sampler.prior)}


def pipeline_source(
    name: str, request: SamplingRequest, *, steps: int = PIPELINE_STEPS, guidance: float | None = None
) -> ImageSource:
    """A source of any diffusers pipeline with its own scheduler, to measure what others publish."""
    pipe = load_any_pipeline(name, request.device, PRECISIONS[request.precision], steps, guidance)
    steps = supported_steps(pipe, steps, PIPELINE_STEPS)

    def sample(numbers: range, texts: list[str]) -> Tensor:
        return pipe.images(request.seed, numbers, texts, steps, guidance) * 2 - 1

    def parts(batch: int) -> dict[str, Callable[[], object]]:
        return {"pipeline": lambda: sample(range(batch), request.texts(range(batch)))}

    # What identifies the images in a result.
    facts = {
        "kind": "pipeline",
        "pipeline": type(pipe.pipe).__name__,
        "files_sha256": _folder_sha256(Path(name)) if Path(name).is_dir() else "",
        "scheduler": type(getattr(pipe.pipe, "scheduler", None)).__name__,
        "name": name,
        "steps": steps,
        "guidance": guidance,
    }
    title = f"{name}, {steps} steps" + ("" if guidance is None else f", guidance {guidance:g}")
    return sampler_source(title, facts, request, sample, parts)


def _folder_sha256(folder: Path) -> str:
    files = [
        path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".safetensors", ".bin", ".txt")
    ]
    return digest([(path.relative_to(folder).as_posix(), file_sha256(path)) for path in files])
