"""Walks through the inputs of a student: between noises, between prompts, one noise in many styles, and the
styles of several inputs in one image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from d2g.core.atomic_files import cannot_write
from d2g.core.captioned_grid import captioned_grid
from d2g.core.errors import SettingError
from d2g.core.logs import logger
from d2g.core.png import save_png
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import noise
from d2g.core.video import require_video, save_mp4
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from distill.models.generator_student import GeneratorStudent
from distill.sampling import OneStep, load_student, with_prior, with_psi
from distill.student_files import student_folder
from latent_lpips.distance import LatentLPIPS
from latent_lpips.weights import load_lpips

LENGTH_STEP = 1e-2
"""Distance between the two positions whose images the perceptual path length compares."""
FRAME_MS = 80
"""Milliseconds of a frame in OUT/walk.gif and OUT/walk.mp4."""
ACROSS = 8
"""Images in a row of OUT/strip.png."""


def spherical(first: Tensor, second: Tensor, at: Tensor) -> Tensor:
    """Spherical interpolation of noise tensors [B, ...], row by row, at positions [B] between 0 and 1.

    Its points have the norm of Gaussian noise; those of a straight line are too short (White, Sampling
    Generative Networks, 2016).
    """
    a, b, position = first.flatten(1), second.flatten(1), at.to(first)[:, None]
    cosine = (a * b).sum(1, keepdim=True) / (a.norm(dim=1, keepdim=True) * b.norm(dim=1, keepdim=True))
    angle = cosine.clamp(-1, 1).acos()
    arc = (((1 - position) * angle).sin() * a + (position * angle).sin() * b) / angle.sin()
    # Equal noises have no arc between them.
    return torch.where(angle > 1e-3, arc, torch.lerp(a, b, position)).view_as(first)


def between(first: Conditioning, second: Conditioning, at: Tensor) -> Conditioning:
    """Linear interpolation of encoded prompts, row by row, at positions [B]; padding masks are joined."""

    def mix(a: Tensor, b: Tensor) -> Tensor:
        if not a.is_floating_point():
            return torch.maximum(a, b)
        return torch.lerp(a, b, at.to(a).view(-1, *[1] * (a.dim() - 1)))

    return first.map(mix, second)


@dataclass(frozen=True, eq=False)
class Walk:
    """A path through a student's inputs that visits K + 1 pairs of a noise and a prompt, at 0, 1, ..., K.

    noises: [K + 1, C, h, w]. Neighboring noises are joined by arcs, encoded prompts by straight lines.
    Raises SettingError for different class labels, which have nothing between them.
    """

    one: OneStep
    noises: Tensor
    prompts: Sequence[str]

    def __post_init__(self) -> None:
        if self.one.conditioner.kind == "label" and len(set(self.prompts)) > 1:
            raise SettingError(
                "the student takes class labels, and there is nothing between two classes; give one --prompt "
                "and several --seed"
            )

    @torch.no_grad()
    def latents(self, positions: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] of the student at positions [B] between 0 and K."""
        start = positions.floor().clamp(max=len(self.prompts) - 2).long()
        at = positions - start
        encoded = self.one.conditioner.encode(list(self.prompts))
        left, right = start.tolist(), (start + 1).tolist()
        cond = between(encoded[left], encoded[right], at.to(self.one.device))
        return self.one.latents_of(spherical(self.noises[left], self.noises[right], at), cond)

    def images(self, positions: Tensor, progress: Progress = quiet, batch_size: int = 32) -> Tensor:
        """Images uint8 [N, 3, H, W] at positions [N]."""
        images: list[Tensor] = []
        for part in positions.split(batch_size):
            images += list(self.one.decode(self.latents(part)))
            progress("walk", len(images), len(positions))
        return torch.stack(images)

    def perceptual_length(self, metric: LatentLPIPS, positions: Tensor) -> float:
        """Mean of d(G(t), G(t + e)) / e^2 over positions t, with e = LENGTH_STEP and the distance of latents
        as d: the perceptual path length of StyleGAN (Karras et al. 2019, section 4.1), on latents."""
        starts = positions.clamp(max=len(self.prompts) - 1 - LENGTH_STEP)
        distances = metric(self.latents(starts), self.latents(starts + LENGTH_STEP))
        return float(distances.mean()) / LENGTH_STEP**2


def open_student(name: str, psi: float | None = None) -> OneStep:
    """Load a student that draws images alone, with its styles truncated by psi.

    Raises SettingError for a stage of a cascade, for an upsampler, and for a psi as `with_psi` does.
    """
    one = load_student(name)
    if one.student.family.prior_family is not None:
        raise SettingError(f"student {name} is a stage of a cascade, which cannot be explored alone")
    if one.student.prior_shape is not None:
        raise SettingError(
            f"student {name} enlarges the latents of another student, and cannot be explored alone; explore "
            "the other one"
        )
    return with_psi(with_prior(one, name, None), name, psi)


def walk_positions(points: int, frames: int) -> Tensor:
    """Positions [frames] of a walk, as evenly spaced as they can be while every point is one of them.

    Raises SettingError for fewer than two points, and for fewer frames than points.
    """
    if points < 2:
        raise SettingError("a walk needs two points; give several --prompt or several --seed")
    if frames < points:
        raise SettingError(
            f"--frames is {frames}, but the walk has {points} points; expected at least {points}"
        )
    segments = points - 1
    steps = [(frames - 1 + number) // segments for number in range(segments)]
    parts = [torch.linspace(number, number + 1, count + 1)[:-1] for number, count in enumerate(steps)]
    return torch.cat([*parts, torch.tensor([float(segments)])])


def in_pairs(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    """The prompt and the seed of each point; a single prompt or seed serves all points.

    Raises SettingError for lists that do not fit.
    """
    points = max(len(prompts), len(seeds))
    if {len(prompts), len(seeds)} - {1, points}:
        raise SettingError(
            f"there are {len(prompts)} prompts and {len(seeds)} seeds; expected equal numbers, or one of "
            "either"
        )
    texts = list(prompts) * (points if len(prompts) == 1 else 1)
    return texts, list(seeds) * (points if len(seeds) == 1 else 1)


def path_metric(name: str, one: OneStep, weights: Path | None) -> LatentLPIPS | None:
    """The LatentLPIPS for path lengths: `weights`, or that in the teacher's folder; None without.

    Raises UserError for weights of another latent space.
    """
    folder = weights or pretrained.resolve(student_folder(name)[1]) / "latent_lpips"
    if weights is None and not folder.is_dir():
        return None
    return load_lpips(folder, one.student.latent_shape[0], device=one.device)


def save_walk(
    name: str,
    one: OneStep,
    prompts: Sequence[str],
    seeds: Sequence[int],
    frames: int,
    out: Path,
    *,
    noise_scale: float = 1.0,
    metric: LatentLPIPS | None = None,
    mp4: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Draw a walk: OUT/00000.png, ..., OUT/strip.png with positions, OUT/walk.gif, and OUT/walk.mp4 on wish.

    prompts, seeds: the points; one of the two may be a single value, which all points share. Seed s is the
    noise of `d2g sample --seed s`, image 0. noise_scale: below 1, noise nearer to its mean gives more
    typical images. metric: of the teacher's latents, for the path length. Raises SettingError for lists that
    do not fit and as `Walk` does, UserError if OUT cannot be written, or without a package for the mp4.
    """
    if mp4:
        require_video()
    # A point is a prompt and a seed; a single one serves all points.
    positions = walk_positions(max(len(prompts), len(seeds)), frames)
    texts, numbers = in_pairs(prompts, seeds)
    walk = Walk(one, _noises(one, numbers) * noise_scale, texts)
    images = walk.images(positions, progress)
    # The strip names the points, and the positions between them.
    labels = [
        f"seed {numbers[int(at)]}: {texts[int(at)]}" if at == int(at) else f"{at:.2f}"
        for at in positions.tolist()
    ]
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        save_png(image, out / f"{number:05d}.png", {"label": label})
    save_png(captioned_grid(images, labels, f"{Path(name).name}, one step", ACROSS), out / "strip.png", {})
    _save_gif(images, out / "walk.gif")
    if mp4:
        save_mp4(_forth_and_back(images), out / "walk.mp4", FRAME_MS)
    length = walk.perceptual_length(metric, positions[:-1]) if metric is not None else None
    if length is None:
        logger.info("no path length: the teacher has no folder latent_lpips; give --lpips")
    return {"out": str(out), "images": frames, "perceptual_path_length": length}


def save_edits(
    name: str,
    one: OneStep,
    prompt: str,
    target: str,
    seeds: Sequence[int],
    strengths: Sequence[float],
    out: Path,
    *,
    noise_scale: float = 1.0,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Move from one prompt in the direction of another with the noise fixed (StyleGAN-T, figure 7):
    OUT/edit.png, a row per seed and a column per strength.

    strengths: of the step from `prompt` (0) to `target` (1) in the space of encoded prompts; above 1 it goes
    beyond. Raises SettingError for a student without text.
    """
    if one.conditioner.kind != "text":
        raise SettingError(
            f"student {name} takes no text to edit; use `d2g explore walk` with several --seed"
        )
    columns = len(strengths)
    first, last = (one.conditioner.encode([text] * columns) for text in (prompt, target))
    cond = between(first, last, torch.tensor(list(strengths), device=one.device))
    images, labels = list[Tensor](), list[str]()
    for seed in seeds:
        # One noise per row of the grid.
        start = noise(seed, range(1), one.student.noise_shape) * noise_scale
        with torch.no_grad():
            images += list(one.decode(one.latents_of(start.expand(columns, -1, -1, -1), cond)))
        labels += [f"seed {seed}, {strength:g}" for strength in strengths]
        progress("edit", len(images), columns * len(seeds))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        save_png(image, out / f"{number:05d}.png", {"label": label})
    heading = f"{Path(name).name}, one step: {prompt} (0) to {target} (1)"
    save_png(captioned_grid(torch.stack(images), labels, heading, columns), out / "edit.png", {})
    return {"out": str(out), "images": len(images)}


def style_prompts(subjects: Sequence[str], styles: Sequence[str], template: str) -> list[str]:
    """The prompts of all subjects in all styles, made by a template with `{subject}` and `{style}`.

    Raises SettingError for a template without them.
    """
    for part in ("{subject}", "{style}"):
        if part not in template:
            raise SettingError(f"--template is {template!r}; expected {{subject}} and {{style}} in it")
    return [
        template.replace("{subject}", subject).replace("{style}", style)
        for subject in subjects
        for style in styles
    ]


def save_styles(
    name: str,
    one: OneStep,
    subjects: Sequence[str],
    styles: Sequence[str],
    template: str,
    seed: int,
    out: Path,
    *,
    noise_scale: float = 1.0,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Draw every subject in every style from one noise (paper, figure 8): OUT/styles.png, a row per subject.

    template: as in `style_prompts`. Raises SettingError as that does, and for a student without text.
    """
    prompts = style_prompts(subjects, styles, template)
    if one.conditioner.kind != "text":
        raise SettingError(f"student {name} takes no text, so it has no styles; use `d2g explore walk`")
    # All prompts share one noise.
    start, images = noise(seed, range(1), one.student.noise_shape) * noise_scale, list[Tensor]()
    for prompt in prompts:
        images += list(one.images(start, [prompt]))
        progress("styles", len(images), len(prompts))
    heading = f"{Path(name).name}, one step, seed {seed} in all images"
    save_png(captioned_grid(torch.stack(images), prompts, heading, len(styles)), out / "styles.png", {})
    return {"out": str(out), "images": len(images)}


@torch.no_grad()
def mixed_latents(one: OneStep, noises: Tensor, prompts: Sequence[str], blocks: Tensor) -> Tensor:
    """Scaled latents [B, C, h, w] whose blocks have styles of different inputs (StyleGAN, Karras et al. 2019,
    section 3.1; GigaGAN calls that of prompts prompt mixing).

    noises [S, *noise_shape] and S prompts: the inputs. blocks: int64 [B, K], for each of the K blocks of an
    image the number of the input whose style, spatial noise and text it has.
    """
    student = one.student
    assert isinstance(student, GeneratorStudent)
    cond = one.conditioner.encode(list(prompts))
    styles = student.styles(noises.to(one.device), cond, one.psi)
    sources = blocks.to(one.device)
    return student.draw([style.rows(sources[:, block]) for block, style in enumerate(styles)])


def coarse_sides(sides: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """Columns of a mix: sides of the last block by the first point, of a network whose blocks have `sides`.

    All of them without `chosen`, from the largest (the first point alone) to 0 (the other one alone). Raises
    SettingError for a side that no block has.
    """
    known = [0, *sides]
    for side in chosen:
        if side not in known:
            raise SettingError(
                f"--coarse is {side}; expected {', '.join(map(str, known[:-1]))} or {known[-1]}"
            )
    return list(chosen) or known[::-1]


def save_mix(
    name: str,
    one: OneStep,
    prompts: Sequence[str],
    seeds: Sequence[int],
    coarse: Sequence[int],
    out: Path,
    *,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Mix the styles of the first point with those of each other one: OUT/mix.png, a row per other point and
    a column for each number in `coarse`.

    A point is a prompt and a seed, as in `save_walk`. The first point gives the styles of blocks up to this
    side in latents, the other one those of larger blocks; [] for all sides, and 0. Raises SettingError for a
    student without styles, for less than two points, for lists that do not fit, and as `coarse_sides` does.
    """
    if not isinstance(one.student, GeneratorStudent):
        raise SettingError(
            f"student {name} has no styles to mix; use `d2g explore edit` between prompts, or `d2g explore "
            "walk` between prompts or noises"
        )
    texts, numbers = in_pairs(prompts, seeds)
    if len(texts) < 2:
        raise SettingError("a mix needs two points; give several --prompt or several --seed")
    sides = [max(size) for size in one.student.network.block_sizes]
    columns = coarse_sides(sides, coarse)
    # One image per other point and column: from which point each of its blocks is.
    choices = [(other, side) for other in range(1, len(texts)) for side in columns]
    blocks = torch.tensor([[0 if size <= side else other for size in sides] for other, side in choices])
    noises, images = _noises(one, numbers), list[Tensor]()
    for part in blocks.split(32):
        images += list(one.decode(mixed_latents(one, noises, texts, part)))
        progress("mix", len(images), len(blocks))
    # Points are named by what differs between them; an image of one point says all of it.
    names = [f"prompt {number}" for number in range(1, len(texts) + 1)]
    full = [f"{name}: {text}" for name, text in zip(names, texts, strict=True)]
    shared = f", seed {numbers[0]} in all images"
    if len(prompts) == 1:
        names = full = [f"seed {number}" for number in numbers]
        shared = f": {texts[0]}"
    elif len(seeds) > 1:
        names = full = [f"seed {number}: {text}" for number, text in zip(numbers, texts, strict=True)]
        shared = ""
    labels = [
        f"up to {side}: {names[0]}; above: {names[other]}"
        if 0 < side < sides[-1]
        else full[0 if side else other]
        for other, side in choices
    ]
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        save_png(image, out / f"{number:05d}.png", {"label": label})
    grid = captioned_grid(torch.stack(images), labels, f"{Path(name).name}, one step{shared}", len(columns))
    save_png(grid, out / "mix.png", {})
    return {"out": str(out), "images": len(images), "block_sides": sides}


def _noises(one: OneStep, seeds: Sequence[int]) -> Tensor:
    """Noise [S, *noise_shape]: that of `d2g sample --seed s`, image 0, for each seed s."""
    return torch.cat([noise(number, range(1), one.student.noise_shape) for number in seeds])


def _forth_and_back(images: Tensor) -> Tensor:
    """Frames of an endless animation."""
    return torch.cat([images, images[1:-1].flip(0)])


def _save_gif(images: Tensor, path: Path) -> None:
    """An endless animation, forward and back."""
    frames = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in _forth_and_back(images)]
    try:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    except OSError as error:
        raise cannot_write(path, error) from error
