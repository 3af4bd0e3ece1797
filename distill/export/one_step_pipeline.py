"""A one-step student as a pipeline that plain diffusers loads, and plain diffusers to check it with.

Which scheduler lands on x_0 in one step? LCMScheduler with one original step: it asks the network at the last
of its timesteps and returns (x - sigma eps) / alpha, its noise comes in between steps only, its initial noise
is not scaled, and a second step is refused, where DDIM's "trailing" would quietly draw something else. For a
student at an earlier timestep the table of betas ends there. For a student of an EDM there is none: EDM's
schedulers start from sqrt(sigma_max^2 + 1) times the noise, not sigma_max.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from d2g.core.atomic_files import write_atomically
from d2g.core.errors import UserError
from d2g.diffusion import pretrained
from d2g.diffusion.edm import EDMSchedule
from d2g.diffusion.families.base import Pipeline
from d2g.diffusion.pipelines import open_pipeline
from d2g.diffusion.schedule import Schedule

# c_skip = 0.25 / (scaling t)^2 of the input stays in a consistency model's answer: nothing, at this scale.
_NO_SKIP = 1e4


def one_step_scheduler(schedule: Schedule, timestep: int) -> Any:
    """The scheduler whose one step gives x_0 from a network told `timestep`, above 0, of a
    variance-preserving schedule: epsilon, v or x_0 predictions, zero terminal SNR as well.
    """
    from diffusers import LCMScheduler

    bars = schedule.alphas_cumprod[: timestep + 1].double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    return LCMScheduler(
        num_train_timesteps=timestep + 1,
        trained_betas=(1 - bars / before).float().tolist(),
        original_inference_steps=1,
        timestep_scaling=_NO_SKIP,
        prediction_type=schedule.prediction,
        steps_offset=1,  # not used here, but StableDiffusionPipeline warns of any other
    )


def pipeline_schedule(teacher: str) -> Schedule:
    """The schedule of a teacher whose students can be stock diffusers pipelines. Raises UserError where no
    pipeline of diffusers draws what the student draws."""
    pipeline, schedule = open_pipeline(teacher), pretrained.load_student_schedule(teacher)
    instead = "export it with --format safetensors or onnx"
    if isinstance(schedule, EDMSchedule):
        raise UserError(
            f"teacher {teacher} is preconditioned as in EDM, and no scheduler of diffusers starts from "
            f"sigma_max times the noise, as its students do; {instead}"
        )
    if not pipeline.family.reads_text:
        config = pretrained.load_on_meta(teacher, "unet").config
        if config.num_class_embeds is not None:
            raise UserError(
                f"teacher {teacher} is told classes, and no pipeline of diffusers tells them to a "
                f"UNet2DModel; {instead}"
            )
        if config.out_channels != config.in_channels:
            raise UserError(
                f"teacher {teacher} gives a learned variance, which {pipeline.kind} does not take off; "
                f"{instead}"
            )
    return schedule


def save_one_step(
    teacher: str, unet: nn.Module, schedule: Schedule, timestep: int, folder: Path, dtype: torch.dtype
) -> None:
    """Write `unet` and the teacher's other pieces to a folder in diffusers layout, all weights in `dtype`.

    A network of text must have the input for a guidance scale (time_cond_proj_dim): with it, diffusers does
    not evaluate twice and extrapolate, whatever scale it is called with. `unet` is left in `dtype`. Raises
    UserError for a folder that cannot be written.
    """
    pipeline = open_pipeline(teacher)
    if pipeline.family.reads_text:
        assert unet.config.time_cond_proj_dim is not None, "diffusers would add classifier-free guidance"  # type: ignore[union-attr]
    components: dict[str, Any] = {"unet": nn.Module.to(unet, dtype)}
    for component in pipeline.components:
        if component.startswith("tokenizer"):
            components[component] = pretrained.load_tokenizer(teacher, component)
        elif component not in ("unet", "scheduler"):
            components[component] = pretrained.load_model(teacher, component, dtype)
    components["scheduler"] = one_step_scheduler(schedule, timestep)
    try:
        _assembled(pipeline, components).save_pretrained(folder, safe_serialization=True)
        _forget_paths(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {folder}: {error}; free space or choose another --out, then run again"
        ) from error


def written_kind(teacher: str) -> str:
    """The class of pipeline that `save_one_step` writes: the teacher's, but that DDIMPipeline would put its
    own scheduler in the place of ours."""
    kind = open_pipeline(teacher).kind
    return "DDPMPipeline" if kind == "DDIMPipeline" else kind


def _assembled(pipeline: Pipeline, components: dict[str, Any]) -> Any:
    import diffusers

    if pipeline.kind == "StableDiffusionPipeline":
        return diffusers.StableDiffusionPipeline(
            **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    if pipeline.kind == "LDMPipeline":
        return diffusers.LDMPipeline(**components)
    if pipeline.kind in ("DDIMPipeline", "DDPMPipeline"):
        return diffusers.DDPMPipeline(**components)
    zeros = pipeline.index.get("force_zeros_for_empty_prompt", True)
    return diffusers.StableDiffusionXLPipeline(**components, force_zeros_for_empty_prompt=zeros)


def _forget_paths(folder: Path) -> None:
    """Take out what the libraries note of where the pieces came from: paths of this machine."""
    for file in sorted(folder.rglob("*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(facts, dict) and facts.pop("_name_or_path", None) is not None:
            write_atomically(file, json.dumps(facts, indent=2) + "\n")


def save_scheduler(schedule: Schedule, timestep: int, folder: Path) -> None:
    """Write `one_step_scheduler` to a folder. Raises UserError where it cannot be written."""
    try:
        one_step_scheduler(schedule, timestep).save_pretrained(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; choose another --out, then run again") from error


def draw_plainly(
    folder: Path,
    noise: Tensor,
    prompts: Sequence[str],
    guidance: float | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """(latents [B, C, h, w], images [B, 3, H, W] in [0, 1]), fp32 on the CPU, of a saved pipeline, as anyone
    would draw them: DiffusionPipeline, no code of ours, one step. `guidance` None: diffusers' own default.
    """
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=False)
    return _drawn(pipe, noise, prompts, guidance, device)


def draw_untold(folder: Path, rows: int, device: torch.device | str = "cpu") -> Tensor:
    """Images [rows, 3, H, W] in [0, 1], fp32 on the CPU, of a saved pipeline of an unconditional network, as
    anyone would draw them. Such pipelines take no noise: theirs is torch.randn of the seed 0.
    """
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=False)
    _placed(pipe, device)
    seed = torch.Generator().manual_seed(0)
    images = pipe(rows, seed, num_inference_steps=1, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def draw_with_adapters(
    teacher: str, folder: Path, noise: Tensor, prompts: Sequence[str], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """As `draw_plainly`, of the teacher's own pipeline with the adapters and the scheduler of `folder`."""
    import diffusers

    pipeline = open_pipeline(teacher)
    components: dict[str, Any] = {
        component: pretrained.load_tokenizer(teacher, component)
        if component.startswith("tokenizer")
        else pretrained.load_model(teacher, component)
        for component in pipeline.components
        if component != "scheduler"
    }
    components["scheduler"] = diffusers.LCMScheduler.from_pretrained(folder / "scheduler")
    pipe = _assembled(pipeline, components)
    with _errors_only():  # it warns that no text encoder has adapters
        pipe.load_lora_weights(folder)
    return _drawn(pipe, noise, prompts, 1.0, device)


def _placed(pipe: Any, device: torch.device | str) -> None:
    """Ready to draw in fp32, adapters too. diffusers' own `to` with a type warns of layers to be kept in
    fp32, of which there are none."""
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            nn.Module.to(component, device, torch.float32)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Nothing below an error from diffusers' own logger."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@torch.no_grad()
def _drawn(
    pipe: Any, noise: Tensor, prompts: Sequence[str], guidance: float | None, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    _placed(pipe, device)
    pipe.watermark = None  # SDXL's, where its package is installed, is put into the pixels afterwards
    scale = {} if guidance is None else {"guidance_scale": guidance}
    found = [
        pipe(list(prompts), num_inference_steps=1, latents=noise.to(device), output_type=kind, **scale).images
        for kind in ("latent", "pt")
    ]
    return found[0].float().cpu(), found[1].float().cpu()
