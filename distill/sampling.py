"""Load a student from a run or an exported folder, and draw images from it in one step."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.config import RESTORE_CONFIG_HINT, from_json, read_json_object
from d2g.core.distributed import checkpoint
from d2g.core.errors import SettingError, UserError
from d2g.core.png import image_grid, save_png
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioner
from d2g.diffusion.latents import decode, to_uint8
from d2g.diffusion.lora import has_lora, merged
from distill.config.components import StudentConfig
from distill.models.student import Student, add_guidance_embedding, student_from_teacher

REMEDIES = {
    "student.json": "export the student again",
    "config.json": RESTORE_CONFIG_HINT,
}
"""Files that say what a student is, and what to do when they are damaged."""


@dataclass(frozen=True)
class OneStep:
    """A student with its teacher's conditioner and autoencoder, on one device."""

    student: Student
    conditioner: Conditioner
    vae: Any
    device: torch.device
    guidance: float = 8.0  # told to a student that is told a scale; others have theirs in the weights

    def __call__(self, prompts: Sequence[str], seed: int = 0) -> Tensor:
        """One image per prompt: uint8 [N, 3, H, W] on the CPU. Image i uses the noise of (seed, i)."""
        return torch.cat([images for images, _ in self.sample(prompts, seed)])

    @property
    def examples(self) -> list[str]:
        """Two prompts that it understands, to compare two forms of it with."""
        return self.conditioner.example_prompts

    @torch.no_grad()
    def latents(self, drawn: Tensor, prompts: Sequence[str]) -> Tensor:
        """Noise [B, C, h, w] and B prompts -> scaled latents [B, C, h, w]: one network evaluation."""
        told = torch.full((len(drawn),), self.guidance) if self.student.guided else None
        latents: Tensor = self.student(drawn.to(self.device), self.conditioner.encode(prompts), told)
        return latents

    @torch.no_grad()
    def images(self, drawn: Tensor, prompts: Sequence[str]) -> Tensor:
        """Noise [B, C, h, w] and B prompts -> uint8 images [B, 3, H, W] on the CPU."""
        return self.decoded(self.latents(drawn, prompts))

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> uint8 images [B, 3, H, W] on the CPU."""
        return to_uint8(decode(self.vae, latents)).cpu()

    def sample(
        self, prompts: Sequence[str], seed: int, start: int = 0, batch_size: int = 32
    ) -> Iterator[tuple[Tensor, list[str]]]:
        """Batches (uint8 images, prompts). Image i uses the noise of (seed, start + i), at any batch size."""
        for first in range(0, len(prompts), batch_size):
            part = list(prompts[first : first + batch_size])
            rows = range(start + first, start + first + len(part))
            yield self.images(noise(seed, rows, self.student.latent_shape), part), part


def student_folder(name: str) -> tuple[Path, str, int]:
    """(folder of weights, teacher, timestep) of an exported student or of a run's newest checkpoint.

    Raises UserError for a folder that is neither, or a run without a checkpoint.
    """
    folder = pretrained.SHIPPED[name] / "student" if name in pretrained.SHIPPED else Path(name)
    for file in REMEDIES:
        if (folder / file).is_file():
            config = read_json_object(folder / file, REMEDIES[file])
            break
    else:
        raise UserError(
            f"student {name}: expected a run of `d2g distill` (config.json) "
            "or an exported student (student.json)"
        )
    if file == "config.json":
        last = checkpoint.latest(folder / "checkpoints")
        if last is None:
            raise UserError(f"student {name}: the run has no checkpoint yet; train it first")
        folder = last.folder
    try:
        return folder, str(config["teacher"]), int(config["student_timestep"])
    except KeyError as error:
        raise UserError(f"student {name}: {file} has no {error}; expected a folder that d2g wrote") from error


def student_tensors(name: str) -> dict[str, Tensor]:
    """The EMA weights of a run, or an exported student's weights: adapters, if any, merged into them."""
    folder, _, _ = student_folder(name)
    tensors = checkpoint.Checkpoint(folder, 0, {}).tensors("ema")
    if not has_lora(tensors):
        return tensors
    config = student_config(name)
    return merged(tensors, config.lora_rank, config.alpha)


def student_config(name: str) -> StudentConfig:
    """What a run's student is beside the teacher's network."""
    config = read_json_object(Path(name) / "config.json", REMEDIES["config.json"])
    return from_json(StudentConfig, config["student"])


def load_student_weights(student: Student, name: str) -> None:
    """Put the EMA weights of a run, or an exported student's weights, into a bare `student`, strictly.

    Adapters are merged first; one that was told the guidance scale makes `student` one that is.
    """
    tensors = student_tensors(name)
    if "unet.time_embedding.cond_proj.weight" in tensors and not student.guided:
        add_guidance_embedding(student.unet)
    try:
        student.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"student {name} does not fit its teacher: {first}") from error


def own_prompts(name: str, teacher: str | None = None) -> list[str]:
    """What a student draws where nobody says: every class in turn, or nothing. Raises SettingError for one
    that is told text."""
    found = pretrained.default_prompts(teacher or student_folder(name)[1])
    if not found:
        raise SettingError("nothing to draw; give --prompt TEXT or --prompts FILE")
    return found


def load_student(name: str, teacher: str | None = None, device: torch.device | str = "cpu") -> OneStep:
    """Load a student with the conditioner and the autoencoder around it, ready to generate images.

    name: an exported folder, a run's folder (its newest checkpoint), or "miniature", which ships with the
    package. `teacher` replaces the teacher that the student's folder names. Raises UserError for a folder
    that holds no student, or weights that do not fit the teacher.

    >>> student = load_student("miniature")
    >>> student(["a red circle on a white background"], seed=0).dtype
    torch.uint8
    """
    _, own, timestep = student_folder(name)
    source = teacher or own
    student = student_from_teacher(source, timestep)
    load_student_weights(student, name)
    device = torch.device(device)
    return OneStep(
        student.to(device).eval().requires_grad_(False),
        pretrained.load_conditioner(source).to(device),
        pretrained.load_vae(source).to(device),
        device,
    )


def load_checkpoint(run: str, folder: Path, teacher: str, device: torch.device | str = "cpu") -> OneStep:
    """Load the averaged student of one checkpoint folder of `run`, ready to sample on `device`."""
    student = student_from_teacher(teacher, student_folder(run)[2])
    ema = checkpoint.open_checkpoint(folder).tensors("ema")
    student.load_state_dict({name: tensor.float() for name, tensor in ema.items()})
    device = torch.device(device)
    return OneStep(
        student.to(device).eval().requires_grad_(False),
        pretrained.load_conditioner(teacher).to(device),
        pretrained.load_vae(teacher).to(device),
        device,
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
) -> dict[str, Any]:
    """Draw one image per prompt and write OUT/00000.png … with the prompt in each file, and OUT/grid.png.

    guidance: the scale to imitate. Raises SettingError for a student that is told none.
    """
    one = load_student(name, teacher, "cuda" if torch.cuda.is_available() else "cpu")
    if guidance is not None:
        if not one.student.guided:
            raise SettingError(
                f"student {name} has its guidance in its weights; leave --guidance out, or train one with "
                "student.guidance_conditioning=true"
            )
        one = replace(one, guidance=guidance)
    started, everything = time.monotonic(), []
    for images, _ in one.sample(prompts, seed, batch_size=batch_size):
        everything += list(images)
        progress("sample", len(everything), len(prompts))
    seconds = time.monotonic() - started
    for number, (image, prompt) in enumerate(zip(everything, prompts, strict=True)):
        save_png(
            image, out / f"{number:05d}.png", {"prompt": prompt, "seed": str(seed), "index": str(number)}
        )
    save_png(image_grid(torch.stack(everything[:64])), out / "grid.png", {})
    return {"out": str(out), "images": len(everything), "seconds_per_image": seconds / len(everything)}


def untrained_one_step(teacher: str, device: torch.device | str = "cpu") -> OneStep:
    """The teacher itself in one step, without guidance: where every student starts."""
    device = torch.device(device)
    return OneStep(
        student_from_teacher(teacher).to(device).eval(),
        pretrained.load_conditioner(teacher).to(device),
        pretrained.load_vae(teacher).to(device),
        device,
    )
