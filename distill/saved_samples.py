"""Images of a student, of its teacher, or of both, as files with a grid: what `d2g sample` writes.

Each batch is written when it is drawn, so that memory does not grow with the number of images, and what an
interrupted command has drawn stays.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.captioned_grid import captioned_grid
from d2g.core.distributed import process_group
from d2g.core.errors import SettingError
from d2g.core.logs import logger
from d2g.core.png import image_grid, save_png
from d2g.core.progress import Progress, quiet
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode, to_uint8
from d2g.diffusion.teacher_sampler import SolverSettings, load_sampler
from distill.sampling import load_student, with_prior, with_psi
from distill.student_files import kind_settings, pairs_guidance, pairs_size, teacher_prior

GRID_IMAGES = 64
"""Largest number of images in a grid."""


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
    batches = _student_batches(name, prompts, seed, batch_size, teacher, guidance, prior=prior, psi=psi)
    _, seconds = _write_images(batches, prompts, seed, out, "sample", progress)
    return {"out": str(out), "images": len(prompts), "seconds_per_image": seconds}


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
    batches = _teacher_batches(name, prompts, seed, batch_size, settings)
    _, seconds = _write_images(batches, prompts, seed, out, "sample teacher", progress)
    return {"out": str(out), "images": len(prompts), "seconds_per_image": seconds}


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
    it is the scale of the student's pairs. In a cascade, the prior
    of the settings is the student of the stage before; the teacher draws after that student's teacher. An
    upsampler enlarges what the student of the settings' prior draws, and its teacher draws alone.
    """
    prior = settings.prior
    if settings.guidance is None:
        settings = replace(settings, guidance=pairs_guidance(student, teacher))
    student_batches = _student_batches(
        student, prompts, seed, batch_size, teacher, settings.guidance, must_take_guidance=False, prior=prior
    )
    images, seconds = _write_images(student_batches, prompts, seed, out / "student", "sample", progress)
    settings = replace(settings, prior=teacher_prior(teacher, prior))
    teacher_batches = _teacher_batches(teacher, prompts, seed, batch_size, settings, pairs_size(student))
    teacher_images, teacher_seconds = _write_images(
        teacher_batches, prompts, seed, out / "teacher", "sample teacher", progress
    )
    # Rows of student and teacher, side by side.
    rows = [image for pair in zip(images, teacher_images, strict=True) for image in pair]
    if len({image.shape for image in rows}) == 1:
        steps = f"{settings.prior_steps} + {settings.steps}" if settings.prior else f"{settings.steps}"
        names = ("one step" if prior is None else "two steps", f"teacher, {steps} steps")
        titles = [f"{name}: {text}" for text in prompts for name in names]
        same_noise = kind_settings(student).is_diffusion
        shared = "on the same noise" if same_noise else "with noise of their own"
        heading = f"{Path(student).name} and its teacher {Path(teacher).name} {shared}, seed {seed}"
        across = 2 if len(rows) <= 16 else 8
        rows, titles = rows[:GRID_IMAGES], titles[:GRID_IMAGES]
        save_png(captioned_grid(torch.stack(rows), titles, heading, across), out / "grid.png", {})
    log_earlier_samples(out, 0)
    return {
        "out": str(out),
        "images": 2 * len(prompts),
        "seconds_per_image": seconds,
        "teacher_seconds_per_image": teacher_seconds,
    }


def _student_batches(
    name: str,
    prompts: Sequence[str],
    seed: int,
    batch_size: int,
    teacher: str | None,
    guidance: float | None,
    must_take_guidance: bool = True,
    prior: str | None = None,
    psi: float | None = None,
) -> Iterator[Tensor]:
    """Load a student, and draw an image per prompt: batches of uint8 [B, 3, H, W] on the CPU."""
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
    return (images for images, _ in one_step.sample(prompts, seed, batch_size=batch_size))


def _teacher_batches(
    name: str,
    prompts: Sequence[str],
    seed: int,
    batch_size: int,
    settings: SolverSettings,
    size: tuple[int, int] | None = None,
) -> Iterator[Tensor]:
    """Load a teacher, and draw an image per prompt: batches of uint8 [B, 3, H, W] on the CPU.

    size: height and width of the latents, if not those of the network.
    """
    sampler = load_sampler(name, settings, process_group.own_device(), size=size)
    vae = pretrained.load_vae(name).to(sampler.teacher.device)

    @torch.no_grad()
    def draw(first: int) -> Tensor:
        # Image i has the noise of (seed, i), as a student's.
        part = list(prompts[first : first + batch_size])
        latents = sampler.latents(seed, range(first, first + len(part)), part)
        return to_uint8(decode(vae, latents)).cpu()

    return map(draw, range(0, len(prompts), batch_size))


def _write_images(
    batches: Iterator[Tensor], prompts: Sequence[str], seed: int, out: Path, label: str, progress: Progress
) -> tuple[list[Tensor], float]:
    """Write one file per image as batches are drawn, then a grid of the first ones.

    Returns the images of the grid, and the seconds per image without those of writing.
    """
    first: list[Tensor] = []
    number, seconds, started = 0, 0.0, time.monotonic()
    for images in batches:
        seconds += time.monotonic() - started
        for image in images:
            text = {"prompt": prompts[number], "seed": str(seed), "index": str(number)}
            save_png(image, out / f"{number:05d}.png", text)
            number += 1
        first += list(images[: GRID_IMAGES - len(first)])
        progress(label, number, len(prompts))
        started = time.monotonic()
    save_png(image_grid(torch.stack(first)), out / "grid.png", {})
    log_earlier_samples(out, number)
    return first, seconds / number


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
