"""Explore the inputs of a student: interpolation of noise and prompts, prompt edits, and style mixing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from d2g.core.atomic_files import cannot_write
from d2g.core.captioned_grid import captioned_grid
from d2g.core.distributed import process_group
from d2g.core.errors import SettingError
from d2g.core.logs import logger
from d2g.core.png import save_png
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import noise
from d2g.core.video import require_video, save_mp4
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from distill.models.generator_student import GeneratorStudent
from distill.sampling import OneStepSampler, load_student, with_prior, with_psi
from distill.saved_samples import log_earlier_samples
from distill.student_files import student_folder
from latent_lpips.distance import LatentLPIPS
from latent_lpips.weights import load_lpips

LENGTH_STEP = 1e-2
"""e in the perceptual path length: the distance of the two positions that are compared."""
FRAME_MS = 80
"""Milliseconds per frame of OUT/walk.gif and OUT/walk.mp4."""
STRIP_COLUMNS = 8
"""Images in a row of OUT/strip.png."""


def interpolate_noise(start: Tensor, end: Tensor, position: Tensor) -> Tensor:
    """Interpolate noise [B, ...] spherically (slerp), row by row, at positions [B] in [0, 1].

    Points on the arc have the norm of Gaussian noise; points on a straight line have a smaller one (White,
    Sampling Generative Networks, 2016).
    """
    a, b, position = start.flatten(1), end.flatten(1), position.to(start)[:, None]
    cosine = (a * b).sum(1, keepdim=True) / (a.norm(dim=1, keepdim=True) * b.norm(dim=1, keepdim=True))
    angle = cosine.clamp(-1, 1).acos()
    arc = (((1 - position) * angle).sin() * a + (position * angle).sin() * b) / angle.sin()
    # Between nearly equal rows the arc is undefined: use the straight line.
    return torch.where(angle > 1e-3, arc, torch.lerp(a, b, position)).view_as(start)


def interpolate_prompts(start: Conditioning, end: Conditioning, position: Tensor) -> Conditioning:
    """Interpolate encoded prompts linearly, row by row, at positions [B]; masks are united."""

    def interpolate(a: Tensor, b: Tensor) -> Tensor:
        if not a.is_floating_point():
            return torch.maximum(a, b)
        return torch.lerp(a, b, position.to(a).view(-1, *[1] * (a.dim() - 1)))

    return start.map(interpolate, end)


@dataclass(frozen=True, eq=False)
class Walk:
    """A path through K + 1 inputs of a student, each a noise and a prompt, at positions 0, 1, ..., K.

    noises: [K + 1, C, h, w]. Between two inputs, noise is interpolated spherically and encoded prompts
    linearly. Raises SettingError for different class labels, which cannot be interpolated.
    """

    sampler: OneStepSampler
    noises: Tensor
    prompts: Sequence[str]

    def __post_init__(self) -> None:
        if self.sampler.conditioner.kind == "label" and len(set(self.prompts)) > 1:
            raise SettingError(
                "the student takes class labels, and there is nothing between two classes; give one --prompt "
                "and several --seed"
            )

    @torch.no_grad()
    def latents(self, positions: Tensor) -> Tensor:
        """Sample scaled latents [B, C, h, w] at positions [B] in [0, K]."""
        # The two neighboring inputs of each position, and its place between them.
        start = positions.floor().clamp(max=len(self.prompts) - 2).long()
        fraction = positions - start
        encoded = self.sampler.conditioner.encode(list(self.prompts))
        left, right = start.tolist(), (start + 1).tolist()
        cond = interpolate_prompts(encoded[left], encoded[right], fraction.to(self.sampler.device))
        noises = interpolate_noise(self.noises[left], self.noises[right], fraction)
        return self.sampler.latents_of(noises, cond)

    def images(self, positions: Tensor, progress: Progress = quiet, batch_size: int = 32) -> Tensor:
        """Sample images, uint8 [N, 3, H, W] on the CPU, at positions [N] in [0, K]."""
        images: list[Tensor] = []
        for part in positions.split(batch_size):
            images += list(self.sampler.decode(self.latents(part)))
            progress("walk", len(images), len(positions))
        return torch.stack(images)

    def perceptual_length(self, metric: LatentLPIPS, positions: Tensor, batch_size: int = 32) -> float:
        """Compute the perceptual path length: the mean of d(G(t), G(t + e)) / e^2 over positions t [N].

        Here e is LENGTH_STEP, and d is `metric` on latents. Source: StyleGAN (Karras et al. 2019, section
        4.1), on images.
        """
        starts = positions.clamp(max=len(self.prompts) - 1 - LENGTH_STEP)
        distances = [
            metric(self.latents(part), self.latents(part + LENGTH_STEP)) for part in starts.split(batch_size)
        ]
        return float(torch.cat(distances).mean()) / LENGTH_STEP**2


def open_student(name: str, psi: float | None = None) -> OneStepSampler:
    """Load a student for exploration, on this process's GPU or on the CPU.

    psi: truncation of its styles; None leaves the default.

    Raises SettingError for students that draw no image alone (a stage of a cascade, an upsampler), and for a
    psi as `with_psi` does.
    """
    sampler = load_student(name, device=process_group.own_device())
    if sampler.student.family.prior_family is not None:
        raise SettingError(f"student {name} is a stage of a cascade, which cannot be explored alone")
    if sampler.student.prior_shape is not None:
        raise SettingError(
            f"student {name} enlarges the latents of another student, and cannot be explored alone; explore "
            "the other one"
        )
    return with_psi(with_prior(sampler, name, None), name, psi)


def walk_positions(points: int, frames: int) -> Tensor:
    """Positions [frames] of a walk through `points` inputs, about evenly spaced, each input included.

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


def pair_inputs(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    """Return the prompt and the seed of each point. A single prompt or seed is used for all points.

    Raises SettingError for lists of different lengths above 1.
    """
    points = max(len(prompts), len(seeds))
    if {len(prompts), len(seeds)} - {1, points}:
        raise SettingError(
            f"there are {len(prompts)} prompts and {len(seeds)} seeds; expected equal numbers, or one of "
            "either"
        )
    texts = list(prompts) * (points if len(prompts) == 1 else 1)
    return texts, list(seeds) * (points if len(seeds) == 1 else 1)


def path_metric(name: str, sampler: OneStepSampler, weights: Path | None) -> LatentLPIPS | None:
    """Load the LatentLPIPS for path lengths from `weights`, or from the teacher's folder; None if absent.

    Raises UserError for weights of another latent space.
    """
    folder = weights or pretrained.resolve(student_folder(name)[1]) / "latent_lpips"
    if weights is None and not folder.is_dir():
        return None
    return load_lpips(folder, sampler.student.latent_shape[0], device=sampler.device)


def save_walk(
    name: str,
    sampler: OneStepSampler,
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
    """Write the images of a walk, OUT/strip.png, OUT/walk.gif, and with `mp4` OUT/walk.mp4.

    Each point of the walk has a prompt and a seed; all points share a single prompt or seed. Seed s gives the
    noise of image 0 of `d2g sample --seed s`. noise_scale: factor of the noise; below 1 the images are more
    typical. metric: LatentLPIPS for the path length. Returns the command's JSON. Raises SettingError as
    `pair_inputs` and `Walk` do, UserError if OUT cannot be written, or if the package for mp4 is missing.
    """
    if mp4:
        require_video()
    positions = walk_positions(max(len(prompts), len(seeds)), frames)
    texts, numbers = pair_inputs(prompts, seeds)
    walk = Walk(sampler, _noises(sampler, numbers) * noise_scale, texts)
    images = walk.images(positions, progress)

    # Label each point by its seed and prompt, and frames between points by their position.
    labels = [
        f"seed {numbers[int(t)]}: {texts[int(t)]}" if t == int(t) else f"{t:.2f}" for t in positions.tolist()
    ]

    # Write frames, strip and animations.
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        save_png(image, out / f"{number:05d}.png", {"label": label})
    log_earlier_samples(out, len(images))
    save_png(
        captioned_grid(images, labels, f"{Path(name).name}, one step", STRIP_COLUMNS), out / "strip.png", {}
    )
    _save_gif(images, out / "walk.gif")
    if mp4:
        save_mp4(_forth_and_back(images), out / "walk.mp4", FRAME_MS)

    # The path length, if there is a metric.
    length = walk.perceptual_length(metric, positions[:-1]) if metric is not None else None
    if length is None:
        logger.info("no path length: the teacher has no folder latent_lpips; give --lpips")
    return {"out": str(out), "images": frames, "perceptual_path_length": length}


def save_edits(
    name: str,
    sampler: OneStepSampler,
    prompt: str,
    target: str,
    seeds: Sequence[int],
    strengths: Sequence[float],
    out: Path,
    *,
    noise_scale: float = 1.0,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Write OUT/edit.png: `prompt` edited towards `target` with the noise fixed (StyleGAN-T, figure 7).

    The grid has a row per seed and a column per strength. A strength is a position between the encoded
    prompts: 0 is `prompt`, 1 `target`, above 1 beyond it. Raises SettingError for a student without text.
    """
    if sampler.conditioner.kind != "text":
        raise SettingError(
            f"student {name} takes no text to edit; use `d2g explore walk` with several --seed"
        )
    columns = len(strengths)
    start, end = (sampler.conditioner.encode([text] * columns) for text in (prompt, target))
    cond = interpolate_prompts(start, end, torch.tensor(list(strengths), device=sampler.device))
    images, labels = list[Tensor](), list[str]()
    for seed in seeds:
        # One noise per row of the grid.
        row_noise = noise(seed, range(1), sampler.student.noise_shape) * noise_scale
        with torch.no_grad():
            images += list(sampler.decode(sampler.latents_of(row_noise.expand(columns, -1, -1, -1), cond)))
        labels += [f"seed {seed}, {strength:g}" for strength in strengths]
        progress("edit", len(images), columns * len(seeds))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        save_png(image, out / f"{number:05d}.png", {"label": label})
    log_earlier_samples(out, len(images))
    heading = f"{Path(name).name}, one step: {prompt} (0) to {target} (1)"
    save_png(captioned_grid(torch.stack(images), labels, heading, columns), out / "edit.png", {})
    return {"out": str(out), "images": len(images)}


def style_prompts(subjects: Sequence[str], styles: Sequence[str], template: str) -> list[str]:
    """Fill a template with `{subject}` and `{style}`: the prompts of all styles for each subject in turn.

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
    sampler: OneStepSampler,
    subjects: Sequence[str],
    styles: Sequence[str],
    template: str,
    seed: int,
    out: Path,
    *,
    noise_scale: float = 1.0,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Write OUT/styles.png: every subject in every style from one noise (StyleGAN-T, figure 8).

    The grid has a row per subject. template: as in `style_prompts`. Raises SettingError as that does, and for
    a student without text.
    """
    prompts = style_prompts(subjects, styles, template)
    if sampler.conditioner.kind != "text":
        raise SettingError(f"student {name} takes no text, so it has no styles; use `d2g explore walk`")
    # All prompts share one noise.
    shared_noise = noise(seed, range(1), sampler.student.noise_shape) * noise_scale
    images: list[Tensor] = []
    for prompt in prompts:
        images += list(sampler.images(shared_noise, [prompt]))
        progress("styles", len(images), len(prompts))
    heading = f"{Path(name).name}, one step, seed {seed} in all images"
    save_png(captioned_grid(torch.stack(images), prompts, heading, len(styles)), out / "styles.png", {})
    return {"out": str(out), "images": len(images)}


@torch.no_grad()
def mixed_latents(sampler: OneStepSampler, noises: Tensor, prompts: Sequence[str], blocks: Tensor) -> Tensor:
    """Sample scaled latents [B, C, h, w] with style mixing (StyleGAN, Karras et al. 2019, section 3.1).

    noises [S, *noise_shape] and S prompts are the inputs. blocks [B, K], int64: for each of the K blocks of
    an image, the number of the input that gives its style, spatial noise and text. GigaGAN calls the mixing
    of prompts prompt mixing.
    """
    student = sampler.student
    assert isinstance(student, GeneratorStudent)
    cond = sampler.conditioner.encode(list(prompts)).to(sampler.device)
    styles = student.styles(noises.to(sampler.device), cond, sampler.psi)
    sources = blocks.to(sampler.device)
    return student.draw([style.rows(sources[:, block]) for block, style in enumerate(styles)])


def coarse_sides(sides: Sequence[int], coarse: Sequence[int]) -> list[int]:
    """Return the columns of a mix: for each, the side of the last block that has the first point's style.

    sides: of the network's blocks. coarse: the columns that the user wants; [] for all, from the largest side
    (the first point alone) to 0 (the other point alone). Raises SettingError for a side that no block has.
    """
    valid = [0, *sides]
    for side in coarse:
        if side not in valid:
            raise SettingError(
                f"--coarse is {side}; expected {', '.join(map(str, valid[:-1]))} or {valid[-1]}"
            )
    return list(coarse) or valid[::-1]


def save_mix(
    name: str,
    sampler: OneStepSampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    coarse: Sequence[int],
    out: Path,
    *,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Write OUT/mix.png: the styles of the first point mixed with those of each other point.

    A point is a prompt and a seed, as in `save_walk`. The grid has a row per other point and a column per
    number in `coarse`: blocks up to this side, in latents, have the style of the first point, larger blocks
    that of the other point. Raises SettingError for a student without styles, for fewer than two points, and
    as `pair_inputs` and `coarse_sides` do.
    """
    if not isinstance(sampler.student, GeneratorStudent):
        raise SettingError(
            f"student {name} has no styles to mix; use `d2g explore edit` between prompts, or `d2g explore "
            "walk` between prompts or noises"
        )
    texts, numbers = pair_inputs(prompts, seeds)
    if len(texts) < 2:
        raise SettingError("a mix needs two points; give several --prompt or several --seed")
    sides = [max(size) for size in sampler.student.network.block_sizes]
    columns = coarse_sides(sides, coarse)

    # For each image, a pair of other point and column, the point that each block takes its style from.
    choices = [(other, side) for other in range(1, len(texts)) for side in columns]
    blocks = torch.tensor([[0 if size <= side else other for size in sides] for other, side in choices])
    noises, images = _noises(sampler, numbers), list[Tensor]()
    for part in blocks.split(32):
        images += list(sampler.decode(mixed_latents(sampler, noises, texts, part)))
        progress("mix", len(images), len(blocks))

    # Name the points by what differs between them. `full` also says what they share.
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

    # Write the images and the grid.
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        save_png(image, out / f"{number:05d}.png", {"label": label})
    log_earlier_samples(out, len(images))
    grid = captioned_grid(torch.stack(images), labels, f"{Path(name).name}, one step{shared}", len(columns))
    save_png(grid, out / "mix.png", {})
    return {"out": str(out), "images": len(images), "block_sides": sides}


def _noises(sampler: OneStepSampler, seeds: Sequence[int]) -> Tensor:
    """Noise [S, *noise_shape] of S seeds: for seed s that of image 0 of `d2g sample --seed s`."""
    return torch.cat([noise(number, range(1), sampler.student.noise_shape) for number in seeds])


def _forth_and_back(images: Tensor) -> Tensor:
    """Frames [N, 3, H, W] of a loop: forward, then backward without the end points."""
    return torch.cat([images, images[1:-1].flip(0)])


def _save_gif(images: Tensor, path: Path) -> None:
    """Write the loop as a GIF. Raises UserError if it cannot be written."""
    frames = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in _forth_and_back(images)]
    try:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    except OSError as error:
        raise cannot_write(path, error) from error
