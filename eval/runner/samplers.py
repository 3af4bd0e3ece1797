"""Samplers as `eval.measure.source.ImageSource`: students, teachers, pipelines. Image i has the noise of (seed, i)."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.config import digest
from d2g.core.distributed import checkpoint
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.diffusers_pipeline import load_any_pipeline
from d2g.diffusion.latents import decode, to_uint8
from d2g.diffusion.solvers import sample_ode
from d2g.diffusion.teacher import PRECISIONS, Teacher, check_solver
from distill.sampling import OneStep, load_checkpoint, load_one_step, student_folder
from eval.measure.latency import Parts
from eval.measure.source import ImageSource, SampledBatch, views_of

SampleFn = Callable[[range, list[str]], Tensor]
"""(numbers, their prompts) -> pixels [B, 3, H, W] in [-1, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRequest:
    """What is drawn: image i shows prompt i (round and round) from the noise of (seed, i)."""

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
        """What decides images beside the sampler."""
        return {"prompts_sha256": digest(list(self.prompts)), "seed": self.seed, "precision": self.precision}


def sampler_source(
    name: str, facts: Mapping[str, Any], drawing: SamplingRequest, make: SampleFn, parts: Parts | None = None
) -> ImageSource:
    """A source that makes its images. Raises UserError for one that is not finite, by number and prompt."""

    def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
        for first in range(numbers.start, numbers.stop, batch_size):
            part = range(first, min(first + batch_size, numbers.stop))
            texts = drawing.texts(part)
            pixels = make(part, texts)
            broken = (~pixels.isfinite()).flatten(1).any(1).nonzero()
            if len(broken):
                row = int(broken[0])
                raise UserError(
                    f"{name}: image {part[row]} ({texts[row][:80]!r}) is not finite; try precision fp32, or "
                    "look for broken weights"
                )
            yield SampledBatch(first=first, views=views_of(to_uint8(pixels), sizes), prompts=texts)

    return ImageSource(name=name, facts={**facts, **drawing.facts()}, draw=draw, parts=parts)


def one_step_source(
    name: str,
    one: OneStep,
    drawing: SamplingRequest,
    *,
    noise_scale: float = 1.0,
    facts: Mapping[str, Any] | None = None,
) -> ImageSource:
    """A student in memory. `noise_scale` shrinks the noise towards its mean, as truncation does in a GAN:
    more typical images, fewer kinds of them.
    """

    def drawn(numbers: range) -> Tensor:
        return noise(drawing.seed, numbers, one.student.latent_shape) * noise_scale

    @torch.no_grad()
    def make(numbers: range, texts: list[str]) -> Tensor:
        return decode(one.vae, one.latents(drawn(numbers), texts))

    def parts(batch: int) -> dict[str, Callable[[], object]]:
        texts, inputs = drawing.texts(range(batch)), drawn(range(batch)).to(drawing.device)
        hidden = one.text.encode(texts)
        return {
            "text": lambda: one.text.encode(texts),
            "network": torch.no_grad()(lambda: one.student(inputs, hidden)),
            "decoder": torch.no_grad()(lambda: to_uint8(decode(one.vae, inputs))),
        }

    known = {"kind": "student", "noise_scale": noise_scale, **(facts or {})}
    return sampler_source(name, known, drawing, make, parts)


def student_source(
    name: str,
    drawing: SamplingRequest,
    *,
    teacher: str | None = None,
    folder: Path | None = None,
    noise_scale: float = 1.0,
) -> ImageSource:
    """A distilled student: a run, one of its checkpoints (`folder`), an export, or a shipped name."""
    weights, own, timestep = student_folder(name)
    base = teacher or own
    if folder is None:
        one, shown = load_one_step(name, teacher, drawing.device), name
    else:
        one, shown = load_checkpoint(name, folder, base, drawing.device), f"{name}, {int(folder.name)} images"
    torch.nn.Module.to(one.student.unet, PRECISIONS[drawing.precision])  # diffusers' own warns for nothing
    facts = {
        "weights_sha256": _sha256((folder or weights) / "ema.safetensors"),
        "teacher_sha256": pretrained.weights_sha256(base),
        "timestep": timestep,
    }
    return one_step_source(shown, one, drawing, noise_scale=noise_scale, facts=facts)


def checkpoints(run: str) -> list[Path]:
    """The checkpoint folders of a run, oldest first. Raises UserError where there is none."""
    folder = Path(run) / "checkpoints"
    found = checkpoint.all_whole(folder)
    if not found:
        raise UserError(f"{folder} holds no checkpoint; give a run of `d2g distill` that has some")
    return found


def ode_source(
    teacher: Teacher,
    drawing: SamplingRequest,
    *,
    steps: int = 50,
    guidance: float = 3.0,
    solver: str = "teacher",
) -> ImageSource:
    """A teacher in memory, by its ODE, with the noise that its students get."""
    vae = pretrained.load_vae(teacher.name).to(teacher.device)
    chosen: Any = teacher.default_solver if solver == "teacher" else solver
    check_solver(teacher, chosen, steps, guidance)

    @torch.no_grad()
    def make(numbers: range, texts: list[str]) -> Tensor:
        drawn = noise(drawing.seed, numbers, teacher.latent_shape)
        return decode(vae, teacher.sample(drawn, texts, steps, guidance, chosen))

    def parts(batch: int) -> dict[str, Callable[[], object]]:
        texts = drawing.texts(range(batch))
        inputs = noise(drawing.seed, range(batch), teacher.latent_shape).to(teacher.device)
        denoise = teacher.denoiser(teacher.encode(texts), guidance)
        return {
            "text": torch.no_grad()(lambda: teacher.encode(texts)),
            "network": lambda: sample_ode(denoise, inputs, teacher.schedule, steps, chosen),
            "decoder": torch.no_grad()(lambda: to_uint8(decode(vae, inputs))),
        }

    facts = {
        "kind": "teacher",
        "weights_sha256": pretrained.weights_sha256(teacher.name),
        "teacher_facts": teacher.facts,
        "solver": chosen,
        "steps": steps,
        "guidance": guidance,
    }
    shown = f"{teacher.name}, {steps} steps, guidance {guidance:g}"
    return sampler_source(shown, facts, drawing, make, parts)


def pipeline_source(
    name: str, drawing: SamplingRequest, *, steps: int = 50, guidance: float | None = None
) -> ImageSource:
    """Any diffusers pipeline, with its own scheduler: what others ship, measured alike."""
    pipe = load_any_pipeline(name, drawing.device, PRECISIONS[drawing.precision], steps, guidance)

    def make(numbers: range, texts: list[str]) -> Tensor:
        return pipe.images(drawing.seed, numbers, texts, steps, guidance) * 2 - 1

    def parts(batch: int) -> dict[str, Callable[[], object]]:
        return {"pipeline": lambda: make(range(batch), drawing.texts(range(batch)))}

    facts = {
        "kind": "pipeline",
        "pipeline": type(pipe.pipe).__name__,
        "files_sha256": _folder_sha256(Path(name)) if Path(name).is_dir() else "",
        "scheduler": type(getattr(pipe.pipe, "scheduler", None)).__name__,
        "name": name,
        "steps": steps,
        "guidance": guidance,
    }
    shown = f"{name}, {steps} steps" + ("" if guidance is None else f", guidance {guidance:g}")
    return sampler_source(shown, facts, drawing, make, parts)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder_sha256(folder: Path) -> str:
    files = [
        path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".safetensors", ".bin", ".txt")
    ]
    return digest([(path.relative_to(folder).as_posix(), _sha256(path)) for path in files])
