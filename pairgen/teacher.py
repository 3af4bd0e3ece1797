"""A diffusion teacher as a sampler needs it: text in, epsilon out, whatever the network predicts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from core import pretrained
from core.latents import LatentSpace, latent_space
from core.pretrained import TextEncoder
from core.schedule import Schedule, Spacing, predict_epsilon
from pairgen.sample import Denoise, Solver, guided, sample_ode

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """A frozen Stable-Diffusion-shaped teacher on one device. Build with `load_teacher`."""

    name: str
    unet: Any
    text: TextEncoder
    schedule: Schedule
    space: LatentSpace
    device: torch.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the resolution the UNet was trained at."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.unet.config.in_channels), int(height), int(width)

    @torch.no_grad()
    def denoiser(self, prompts: Sequence[str], guidance: float) -> Denoise:
        """A callable (x_t [B, C, h, w], t) -> epsilon with classifier-free guidance baked in.

        The unconditional branch is the encoded empty string, as in SD 1.x; guidance 1 does not evaluate it.
        """
        dtype = next(self.unet.parameters()).dtype
        unique = list(dict.fromkeys(prompts))
        encoded = self.text.encode([*unique, ""])
        hidden = encoded[[unique.index(p) for p in prompts]]
        if guidance != 1:
            hidden = torch.cat([encoded[-1:].expand_as(hidden), hidden])
        hidden = hidden.to(self.device, dtype)

        @torch.no_grad()
        def denoise(x: Tensor, t: int) -> Tensor:
            doubled = x if guidance == 1 else torch.cat([x, x])
            output = self.unet(doubled.to(dtype), t, hidden).sample.float()
            if guidance != 1:
                empty, conditional = output.chunk(2)
                output = guided(conditional, empty, guidance)
            return predict_epsilon(output, x, *self.schedule.alpha_sigma(t), self.schedule.prediction)

        return denoise

    def sample(
        self, noise: Tensor, prompts: Sequence[str], steps: int, guidance: float, solver: Solver
    ) -> Tensor:
        """Noise [B, C, h, w] and B prompts -> scaled latents [B, C, h, w] in fp32, on the teacher's
        device.
        """
        denoise = self.denoiser(prompts, guidance)
        return sample_ode(denoise, noise.to(self.device), self.schedule, steps, solver, self.schedule.spacing)


def load_teacher(
    name: str,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    spacing: Spacing | Literal["teacher"] = "teacher",
    final_alpha: str = "one",
) -> Teacher:
    """Load a teacher from a folder or hub id. `spacing` and `final_alpha` as in PairConfig override the
    scheduler's.
    """
    device = torch.device(device)
    schedule = pretrained.load_schedule(name)
    if spacing != "teacher":
        schedule = replace(schedule, spacing=spacing)
    if final_alpha == "one":
        schedule = replace(schedule, final_alpha_one=True)
    unet = pretrained.load_unet(name, PRECISIONS[precision]).to(device)
    text = pretrained.load_text_encoder(name).to(device)
    return Teacher(name, unet, text, schedule, latent_space(pretrained.load_vae(name)), device)


def describe_teacher(name: str) -> dict[str, Any]:
    """What `d2g teacher info` prints, found out from the files."""
    folder, teacher = pretrained.resolve(name), load_teacher(name, final_alpha="teacher")
    index = json.loads((folder / "model_index.json").read_text())
    parts = {"unet": teacher.unet, "text_encoder": teacher.text, "vae": pretrained.load_vae(name)}
    return {
        "pipeline": index.get("_class_name", "unknown"),
        "prediction_type": teacher.schedule.prediction,
        "latent_shape": list(teacher.latent_shape),
        "latent_space": asdict(teacher.space),
        "params": {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()},
        "solver_defaults": {
            "spacing": teacher.schedule.spacing,
            "steps_offset": teacher.schedule.steps_offset,
            "final_alpha_one": teacher.schedule.final_alpha_one,
            "train_steps": len(teacher.schedule),
        },
        "conditioning": {
            "text": type(teacher.text.model).__name__,
            "tokens": teacher.text.tokenizer.model_max_length,
        },
        "sha256": pretrained.weights_sha256(name),
    }
