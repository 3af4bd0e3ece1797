"""Whether a teacher is trained: its losses and its samples beside those of networks that know nothing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.json_files import read_json_object
from d2g.core.seeds import Stream, generator, noise
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.edm import EDMSchedule
from d2g.diffusion.latents import decode_uint8, encode, from_uint8
from d2g.diffusion.schedule import Point, Schedule
from d2g.diffusion.scheduler_files import AnySchedule
from d2g.diffusion.teacher import Teacher, load_teacher
from eval.metrics.paired import psnr
from teacher_training.data import read_cache

ROWS = 256
"""Pictures that the losses and the reconstructions are measured on, evenly spread over all."""
SAMPLES = 16
SAMPLE_STEPS = 20

LEAST_GAIN = 0.75
"""A trained network's loss is below this share of the loss of the best denoiser without any structure."""
LEAST_PSNR_GAIN = 3.0
"""A trained autoencoder's PSNR is this many dB above that of the mean picture."""
STD_RANGE = (0.5, 2.0)
"""Standard deviation of scaled latents; and of samples, relative to that of real latents."""


@dataclass(frozen=True, kw_only=True)
class TeacherNumbers:
    """The numbers behind the verdict. Losses are mean squared errors of epsilon over all timesteps.

    `loss`: of the saved weights; `loss_untrained`: of the same network with fresh weights; `loss_zero`: of
    predicting zero; `loss_gaussian`: of the best denoiser that knows mean and variance of each channel alone.
    `psnr`: of reconstructions in dB; `psnr_mean`: of the mean picture. `roughness`: mean squared difference
    of neighboring latents over their variance: 2 for white noise. In pixels there is no autoencoder.
    """

    latents_std: float
    samples_std: float
    latents_roughness: float
    samples_roughness: float
    loss: float
    loss_untrained: float
    loss_zero: float
    loss_gaussian: float
    psnr: float | None
    psnr_mean: float | None

    def faults(self) -> list[str]:
        """List the faults of the teacher, one line each; empty for a trained teacher."""
        lines = []
        # The autoencoder.
        if self.psnr is not None and self.psnr_mean is not None:
            if self.psnr < self.psnr_mean + LEAST_PSNR_GAIN:
                lines.append(
                    f"the autoencoder's reconstructions have a PSNR of {self.psnr:.1f} dB, the mean picture "
                    f"alone has {self.psnr_mean:.1f} dB"
                )
            if not STD_RANGE[0] <= self.latents_std <= STD_RANGE[1]:
                lines.append(f"the latents have standard deviation {self.latents_std:.3g}, expected about 1")
        # The denoiser.
        if not self.loss < LEAST_GAIN * self.loss_gaussian:
            lines.append(
                f"the loss is {self.loss:.3f}; a network without any structure reaches "
                f"{self.loss_gaussian:.3f}, predicting zero {self.loss_zero:.3f}, an untrained network "
                f"{self.loss_untrained:.3f}"
            )
        # Its samples.
        ratio = self.samples_std / self.latents_std if self.latents_std else float("inf")
        if not STD_RANGE[0] <= ratio <= STD_RANGE[1]:
            lines.append(
                f"samples have standard deviation {self.samples_std:.3g}, real latents {self.latents_std:.3g}"
            )
        if not self.samples_roughness < (self.latents_roughness + 2) / 2:
            lines.append(
                f"samples look like noise: roughness {self.samples_roughness:.2f}, real latents "
                f"{self.latents_roughness:.2f}, white noise 2"
            )
        return lines


def verdict_line(numbers: TeacherNumbers) -> str:
    """The verdict in words, with the numbers that it is based on."""
    if faults := numbers.faults():
        return f"this teacher is not trained: {'; '.join(faults)}"
    reconstructions = "" if numbers.psnr is None else f"reconstructions {numbers.psnr:.1f} dB, "
    return (
        f"this teacher is trained: loss {numbers.loss:.3f} (predicting zero: {numbers.loss_zero:.3f}, "
        f"without structure: {numbers.loss_gaussian:.3f}), {reconstructions}"
        f"samples' standard deviation {numbers.samples_std:.2f} "
        f"(real latents: {numbers.latents_std:.2f})"
    )


def spread_rows(count: int, limit: int = ROWS) -> Tensor:
    """At most `limit` row numbers, evenly spread over `count` rows."""
    return torch.linspace(0, count - 1, min(count, limit)).round().long()


@torch.no_grad()
def reconstruction_psnr(vae: Any, images: Tensor) -> tuple[float, float]:
    """Mean PSNR in dB of the autoencoder on uint8 images [N, 3, S, S], and that of their mean picture."""
    latents = torch.cat([encode(vae, from_uint8(rows)) for rows in images.split(64)])
    decoded = torch.cat(list(decode_uint8(vae, latents)))
    mean = images.float().mean(0, keepdim=True).round().to(torch.uint8).expand_as(images)
    return psnr(decoded, images).mean().item(), psnr(mean, images).mean().item()


@torch.no_grad()
def denoising_loss(teacher: Teacher, cond: Conditioning, latents: Tensor) -> float:
    """Mean squared error of epsilon on latents [N, C, h, w] with the conditioning of N rows.

    Row i has the noise of (0, i); timesteps are evenly spread: equal weights give equal numbers.
    """
    latents = latents.to(teacher.device)
    noisy = _fixed_noise(latents, teacher.schedule)
    inputs, times = teacher.schedule.network_at(noisy.x, noisy.timesteps)
    parts = []
    for start in range(0, len(latents), 64):
        rows = slice(start, start + 64)
        output = teacher.family.forward(
            teacher.network, teacher.config, inputs[rows], times[rows], cond[rows], teacher.space.downscale
        )
        parts.append(output[:, : latents.shape[1]].float())
    # Each row is at a point of its own.
    outputs = torch.cat(parts).split(1)
    rows_at = zip(outputs, noisy.x.split(1), noisy.points, strict=True)
    predicted = torch.cat(
        [teacher.schedule.denoised(output, x, point).epsilon for output, x, point in rows_at]
    )
    return (predicted - noisy.epsilon).square().mean().item()


def gaussian_loss(latents: Tensor, schedule: AnySchedule) -> tuple[float, float]:
    """(loss of the best denoiser that knows mean and variance of each channel alone, loss of predicting 0).

    Both on the noise and timesteps of `denoising_loss`. The denoiser is the posterior mean of a Gaussian.
    """
    noisy = _fixed_noise(latents, schedule)
    alpha, sigma = (
        torch.tensor([getattr(point, name) for point in noisy.points], device=latents.device).view(
            -1, 1, 1, 1
        )
        for name in ("alpha", "sigma")
    )
    mean, variance = latents.mean((0, 2, 3), keepdim=True), latents.var((0, 2, 3), keepdim=True)
    predicted = sigma * (noisy.x - alpha * mean) / (alpha.square() * variance + sigma.square())
    error = (predicted - noisy.epsilon).square().mean()
    return error.item(), noisy.epsilon.square().mean().item()


class NoisyRows(NamedTuple):
    """Noisy latents x [N, C, h, w], their noise, their timesteps [N], and the point of each row."""

    x: Tensor
    epsilon: Tensor
    timesteps: Tensor
    points: list[Point]


def _fixed_noise(latents: Tensor, schedule: AnySchedule) -> NoisyRows:
    """Noisy latents [N, C, h, w] for measuring losses, at evenly spread timesteps or noise levels."""
    # Rows and timesteps are shuffled against each other, so that no class of pictures has low noise alone.
    order = torch.randperm(len(latents), generator=generator(0, Stream.TEACHER_VERDICT))
    timesteps = torch.linspace(0, len(schedule) - 1, len(latents)).round().long()[order]
    epsilon = noise(0, range(len(latents)), tuple(latents.shape[1:])).to(latents.device)
    # The levels of EDM are counted as timesteps are.
    if isinstance(schedule, EDMSchedule):
        points = [schedule.point(sigma) for sigma in schedule.sigma(timesteps).tolist()]
    else:
        assert isinstance(schedule, Schedule), "no other teacher is trained here"
        points = [Point(t, *schedule.alpha_sigma(t)) for t in timesteps.tolist()]
    timesteps = timesteps.to(latents.device)
    return NoisyRows(schedule.diffuse(latents, epsilon, timesteps), epsilon, timesteps, points)


def roughness(latents: Tensor) -> float:
    """Mean squared difference of neighbors in [N, C, h, w] over the variance: 2 for white noise."""
    squares = (latents.diff(dim=2).square().mean() + latents.diff(dim=3).square().mean()) / 2
    return (squares / latents.var().clamp(min=1e-12)).item()


@torch.no_grad()
def measure_teacher(
    folder: Path, images: Tensor, captions: Sequence[str], device: torch.device | str = "cpu"
) -> TeacherNumbers:
    """Measure the teacher in `folder` with the weights on disk, on uint8 images [N, 3, S, S] and captions."""
    name = str(folder)
    teacher, vae = load_teacher(name, device), pretrained.load_vae(name).to(device)
    rows = spread_rows(len(images))
    images, texts = images[rows], [captions[row] for row in rows.tolist()]
    latents = torch.cat([encode(vae, from_uint8(part)) for part in images.split(64)])
    # Losses of the saved network, of a fresh one, and of two that are no networks.
    cond = teacher.conditioner.encode(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = type(teacher.network).from_config(teacher.config).eval().to(device)
    gaussian, zero = gaussian_loss(latents, teacher.schedule)
    # Samples with the captions of the pictures.
    samples = draw_samples(teacher, texts[:SAMPLES])
    in_pixels = teacher.family.autoencoder is None
    quality, quality_of_mean = (None, None) if in_pixels else reconstruction_psnr(vae, images)
    return TeacherNumbers(
        latents_std=latents.std().item(),
        samples_std=samples.std().item(),
        latents_roughness=roughness(latents),
        samples_roughness=roughness(samples),
        loss=denoising_loss(teacher, cond, latents),
        loss_untrained=denoising_loss(replace(teacher, network=fresh), cond, latents),
        loss_zero=zero,
        loss_gaussian=gaussian,
        psnr=quality,
        psnr_mean=quality_of_mean,
    )


def draw_samples(teacher: Teacher, prompts: Sequence[str]) -> Tensor:
    """Latents [N, C, h, w] of N prompts with the noise of seed 0, as verdict and previews draw them."""
    latent_noise = noise(0, range(len(prompts)), teacher.latent_shape)
    solver, guidance = teacher.default_solver, teacher.default_guidance
    return teacher.sample(latent_noise, prompts, SAMPLE_STEPS, guidance, solver)


def judge_teacher(
    folder: Path, images: Tensor, captions: Sequence[str], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Measure a finished teacher and write FOLDER/training/verdict.json; returns its content."""
    numbers = measure_teacher(folder, images, captions, device)
    verdict = {
        "trained": not numbers.faults(),
        "verdict": verdict_line(numbers),
        "numbers": asdict(numbers),
        "weights_sha256": pretrained.weights_sha256(str(folder)),
    }
    write_atomically(folder / "training" / "verdict.json", json.dumps(verdict, indent=1))
    return verdict


class RecordedVerdict(TypedDict):
    """The content of FOLDER/training/verdict.json."""

    trained: bool
    verdict: str
    numbers: dict[str, Any]
    weights_sha256: str
    """Digest of the weights that were measured."""


def recorded_verdict(folder: Path) -> Mapping[str, Any] | None:
    """The verdict that `d2g teacher train` wrote into this folder; None without one, and if the weights have
    changed since. Raises UserError if the file is damaged."""
    file = folder / "training" / "verdict.json"
    if not file.is_file():
        return None
    verdict = read_json_object(
        file, f"delete {file}; `d2g teacher info {folder}` measures it again", RecordedVerdict
    )
    return verdict if verdict["weights_sha256"] == pretrained.weights_sha256(str(folder)) else None


def current_verdict(folder: Path) -> Mapping[str, Any] | None:
    """The verdict on a teacher of `d2g teacher train`; None for other teachers.

    It is measured again, on the pictures in FOLDER/training, where `recorded_verdict` has none.
    """
    if (verdict := recorded_verdict(folder)) is not None:
        return verdict
    if not (folder / "training" / "images.npy").is_file():
        return None
    pictures = read_cache(folder / "training", f"restore {folder}")
    return judge_teacher(folder, pictures.images, pictures.prompts)
