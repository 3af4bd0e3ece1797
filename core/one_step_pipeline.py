"""A one-step student as a pipeline that plain diffusers loads, and plain diffusers to check it with.

Which scheduler lands on x_0 in one step? LCMScheduler with one original step: it asks the network at the last
of its timesteps and returns (x - sigma eps) / alpha, its noise comes in between steps only, its initial noise
is not scaled, and a second step is refused, where DDIM's "trailing" would quietly draw something else. For a
student at an earlier timestep the table of betas ends there.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from core import pretrained
from core.checkpoint import write_atomically
from core.errors import UserError
from core.pipelines import Pipeline, open_pipeline
from core.schedule import Schedule

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


def save_one_step(
    teacher: str, unet: nn.Module, schedule: Schedule, timestep: int, folder: Path, dtype: torch.dtype
) -> None:
    """Write `unet` and the teacher's other pieces to a folder in diffusers layout, all weights in `dtype`.

    The network must have the input for a guidance scale (time_cond_proj_dim): with it, diffusers does not
    evaluate twice and extrapolate, whatever scale it is called with. `unet` is left in `dtype`. Raises
    UserError for a folder that cannot be written.
    """
    pipeline = open_pipeline(teacher)
    assert unet.config.time_cond_proj_dim is not None, "diffusers would add classifier-free guidance"  # type: ignore[union-attr]
    pieces: dict[str, Any] = {"unet": nn.Module.to(unet, dtype)}
    for piece in pipeline.pieces:
        if piece.startswith("tokenizer"):
            pieces[piece] = pretrained.load_tokenizer(teacher, piece)
        elif piece not in ("unet", "scheduler"):
            pieces[piece] = pretrained.load_model(teacher, piece, dtype)
    pieces["scheduler"] = one_step_scheduler(schedule, timestep)
    try:
        _assembled(pipeline, pieces).save_pretrained(folder, safe_serialization=True)
        _forget_paths(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {folder}: {error}; free space or choose another --out, then run again"
        ) from error


def _assembled(pipeline: Pipeline, pieces: dict[str, Any]) -> Any:
    import diffusers

    if pipeline.kind == "StableDiffusionPipeline":
        return diffusers.StableDiffusionPipeline(
            **pieces, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    zeros = pipeline.index.get("force_zeros_for_empty_prompt", True)
    return diffusers.StableDiffusionXLPipeline(**pieces, force_zeros_for_empty_prompt=zeros)


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


def draw_with_adapters(
    teacher: str, folder: Path, noise: Tensor, prompts: Sequence[str], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """As `draw_plainly`, of the teacher's own pipeline with the adapters and the scheduler of `folder`."""
    import diffusers

    pipeline = open_pipeline(teacher)
    pieces: dict[str, Any] = {
        piece: pretrained.load_tokenizer(teacher, piece)
        if piece.startswith("tokenizer")
        else pretrained.load_model(teacher, piece)
        for piece in pipeline.pieces
        if piece != "scheduler"
    }
    pieces["scheduler"] = diffusers.LCMScheduler.from_pretrained(folder / "scheduler")
    pipe = _assembled(pipeline, pieces)
    pipe.load_lora_weights(folder)
    return _drawn(pipe, noise, prompts, 1.0, device)


@torch.no_grad()
def _drawn(
    pipe: Any, noise: Tensor, prompts: Sequence[str], guidance: float | None, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(device, torch.float32)
    pipe.watermark = None  # SDXL's, where its package is installed, is put into the pixels afterwards
    scale = {} if guidance is None else {"guidance_scale": guidance}
    found = [
        pipe(list(prompts), num_inference_steps=1, latents=noise.to(device), output_type=kind, **scale).images
        for kind in ("latent", "pt")
    ]
    return found[0].float().cpu(), found[1].float().cpu()
